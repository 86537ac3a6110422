"""KTO on the embedded world: single responses, good or bad, no pairs (arXiv:2402.01306).

  python -m rlhf_jax --config=experiments/kto.py --workdir=runs/kto

The best response of each prompt is taken as good, the worst as bad. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('kto', tiny, loss='kto', beta=0.1)
