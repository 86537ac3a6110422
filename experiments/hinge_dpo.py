"""SLiC's hinge on DPO's margin, on the embedded world (arXiv:2305.10425, 2309.06657).

  python -m rlhf_jax --config=experiments/hinge_dpo.py --workdir=runs/hinge_dpo

Pairs whose margin is 1/β teach nothing more. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('hinge_dpo', tiny, loss='hinge', beta=0.1)
