"""cDPO on the embedded world: DPO that believes a tenth of the labels to be wrong (Mitchell 2023).

  python -m rlhf_jax --config=experiments/cdpo.py --workdir=runs/cdpo

With noisy annotators the margin then has a finite optimum. What to expect: docs/methods.md.
"""

import dpo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return dpo.like('cdpo', tiny, loss='dpo', beta=0.1, label_smoothing=0.1)
