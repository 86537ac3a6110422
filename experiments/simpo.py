"""SimPO on the embedded world: no reference, mean log-probabilities and a margin (arXiv:2405.14734).

  python -m rlhf_jax --config=experiments/simpo.py --workdir=runs/simpo

No KL holds it: watch it in the table. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('simpo', tiny, loss='simpo', beta=2.0, margin=1.0, reference='')
