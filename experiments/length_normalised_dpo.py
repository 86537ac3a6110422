"""Length-normalised DPO on the embedded world: log-ratios per token (Tülu 3, arXiv:2411.15124).

  python -m rlhf_jax --config=experiments/length_normalised_dpo.py --workdir=runs/length_normalised_dpo

β is per token, hence larger. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('length_normalised_dpo', tiny, loss='length_normalised', beta=2.0)
