"""SFT → reward model → PPO on SmolLM2-135M-Instruct with adapters (LoRA) on one frozen base.

  python -m rlhf_jax --config=experiments/smollm2_lora.py --workdir=runs/smollm2_lora --config.data=DIR

As experiments/smollm2_human_feedback.py, data and weights too; rank 8 on all seven matrices, and tenfold learning rates.
TODO
"""

import ml_collections

import smollm2_human_feedback


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """tiny: three steps of each stage."""
  config = smollm2_human_feedback.get_config(tiny)
  for name in config.stages:
    config[name].lora = dict(rank=8, alpha=16.0)
    config[name].optimizer.learning_rate *= 10
  return config
