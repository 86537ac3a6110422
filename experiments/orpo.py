"""ORPO on the embedded world: SFT on the better response with an odds ratio, no reference (arXiv:2403.07691).

  python -m rlhf_jax --config=experiments/orpo.py --workdir=runs/orpo

β is the λ of the paper. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('orpo', tiny, loss='orpo', beta=1.0, reference='')
