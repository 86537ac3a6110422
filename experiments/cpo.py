"""CPO on the embedded world: no reference, DPO against a uniform one, and SFT on the better (arXiv:2401.08417).

  python -m rlhf_jax --config=experiments/cpo.py --workdir=runs/cpo

No KL holds it: watch it in the table. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('cpo', tiny, loss='cpo', beta=0.1, nll_coefficient=0.2, reference='')
