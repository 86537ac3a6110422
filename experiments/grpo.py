"""GRPO on the embedded world: rewards standardised within the group, KL in the loss (arXiv:2402.03300).

  python -m rlhf_jax --config=experiments/grpo.py --workdir=runs/grpo

With standardised rewards β does not mean what it means in RLOO. What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('grpo', tiny, advantage='standardised', reduce='sequence_mean', kl_place='loss', kl_coefficient=0.25)
