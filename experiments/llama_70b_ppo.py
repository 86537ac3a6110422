"""SFT → reward model → PPO at the size of Llama 3.1 70B.

  python -m rlhf_jax.plan --config=experiments/llama_70b_ppo.py --topology=v5p:4x4x8

To train: the command of experiments/llama_1b_ppo.py with this file.

Expected: a model of this size was never trained here. By the plan, on 128 v5p the program of PPO
  that needs most memory takes 60.2 of 95 GiB on each device (docs/plan.md).
Time: a PPO step of 512 prompts takes 30.5 s on 128 v5p at best, by the same plan.
Try: --stage=ppo --sweep, which compares meshes.
"""

import llama_1b_ppo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny is that of the 1B model."""
  config = llama_1b_ppo.get_config(tiny)
  if not tiny:
    config.model.update(
      embed=8192,
      layers=80,
      heads=64,
      kv_heads=8,
      head_dim=128,
      mlp=28672,
      tied=False,
    )
  return config
