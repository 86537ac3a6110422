r"""SFT → reward model → PPO on SmolLM2-135M-Instruct with adapters (LoRA) on one frozen base.

This is experiments/smollm2_human_feedback.py, with its data and weights, but with adapters of rank
8 on all seven matrices of a layer and ten times the learning rates. Policy, reference, value model
and reward model share the arrays of the base. Each stage leaves adapter/ (PEFT's format, 10 MB) and
export/.

  python -m rlhf_jax --config=experiments/smollm2_lora.py --workdir=runs/smollm2_lora \
    --config.data=DIR

Expected: SFT takes the held-out loss from 2.81 to 2.53 nats per token (with all parameters: 2.48),
  one seed; its checkpoint is 26 MB. Reward model and PPO were run for three steps only (`:tiny`),
  so there are no results for them.
Time: about 35 minutes on two CPU cores beside other work: 40 steps of SFT, reward model and PPO at
  8.5, 12 and 25 s (measured in `:tiny`, after compilation), and the final table.
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
