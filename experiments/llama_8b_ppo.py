"""SFT → reward model → PPO at the size of Llama 3.1 8B.

  python -m rlhf_jax.plan --config=experiments/llama_8b_ppo.py --topology=v5p:4x4x8

To train: the command of experiments/llama_1b_ppo.py with this file.

Expected: a model of this size was never trained here. By the plan, on 128 v5p the program of PPO
  that needs most memory takes 46.4 of 95 GiB on each device (docs/plan.md).
Time: a PPO step of 512 prompts takes 5.5 s on 128 v5p at best, by the same plan.
Try: --topology=gpu:8xh100 --config.ppo.microbatches=8
"""

import llama_1b_ppo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny is that of the 1B model."""
  config = llama_1b_ppo.get_config(tiny)
  if not tiny:
    config.model.update(
      embed=4096,
      layers=32,
      heads=32,
      kv_heads=8,
      head_dim=128,
      mlp=14336,
      tied=False,
    )
  return config
