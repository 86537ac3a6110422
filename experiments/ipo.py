"""IPO on the embedded world: the margin is steered to 1/(2β) instead of upwards (arXiv:2310.12036).

  python -m rlhf_jax --config=experiments/ipo.py --workdir=runs/ipo

Per token, as its authors confirmed; `loss=ipo_sum` is the one on sums. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('ipo', tiny, loss='ipo', beta=0.3, optimizer=dict(learning_rate=2e-4))
