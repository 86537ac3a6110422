"""SFT → reward model → PPO at the size of Llama 3.1 8B.

  python -m rlhf_jax.plan --config=experiments/llama_8b_ppo.py --topology=v5p:4x4x8
  python -m rlhf_jax.plan --config=experiments/llama_8b_ppo.py --topology=gpu:8xh100 --config.ppo.microbatches=8

How to train: experiments/llama_1b_ppo.py. Not trained at this size.
"""

import llama_1b_ppo


def get_config(tiny: bool = False):
  """tiny: that of the 1B model."""
  config = llama_1b_ppo.get_config(tiny)
  if not tiny:
    config.model.update(embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, tied=False)
  return config
