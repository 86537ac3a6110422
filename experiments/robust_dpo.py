"""Robust DPO on the embedded world: unbiased where a tenth of the labels is flipped (arXiv:2403.00409).

  python -m rlhf_jax --config=experiments/robust_dpo.py --workdir=runs/robust_dpo

The loss may be negative. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('robust_dpo', tiny, loss='robust', beta=0.1, label_smoothing=0.1, optimizer=dict(learning_rate=2e-4))
