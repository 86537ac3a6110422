r"""SFT → reward model → PPO on SmolLM2-135M-Instruct with adapters (LoRA) on one frozen base.

As experiments/smollm2_human_feedback.py, with its data and weights; rank 8 on all seven matrices
and ten times its learning rates. Policy, reference, value model and reward model share the base's
arrays. Each stage leaves adapter/ (PEFT's format, 10 MB) and export/.

  python -m rlhf_jax --config=experiments/smollm2_lora.py --workdir=runs/smollm2_lora \
    --config.data=DIR

Expected: SFT takes the held-out loss from 2.81 to 2.53 nats per token (all parameters: 2.48); its
  checkpoint is 26 MB. Reward model and PPO were run in the tiny form only. One seed.
Time: not measured; SFT ran on two busy CPU cores.
Try: --config.sft.lora.base=int8, and the same for reward and ppo, for a smaller base
  (pip install -e '.[qwix]').
"""

import ml_collections
import smollm2_human_feedback


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes three steps of each stage."""
  config = smollm2_human_feedback.get_config(tiny)
  for name in config.stages:
    config[name].lora = dict(rank=8, alpha=16.0)
    config[name].optimizer.learning_rate *= 10
  return config
