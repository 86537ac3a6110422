"""DPO of whole rankings on the embedded world: the likelihood of the order of K responses (arXiv:2305.18290, A.3).

  python -m rlhf_jax --config=experiments/plackett_luce_dpo.py --workdir=runs/plackett_luce_dpo

With K = 2 it is DPO. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('plackett_luce_dpo', tiny, loss='plackett_luce', beta=0.1)
