"""DPO-Positive on the embedded world: the better response may not become less likely (arXiv:2402.13228).

  python -m rlhf_jax --config=experiments/dpop.py --workdir=runs/dpop

λ is `sft_coefficient`. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('dpop', tiny, loss='dpop', beta=0.1, nll_coefficient=0.5)
