"""GSPO on the embedded world: the ratio of whole answers, clipped narrowly (arXiv:2507.18071).

  python -m rlhf_jax --config=experiments/gspo.py --workdir=runs/gspo

Four minibatches, or its ratio would always be 1.
Published without a KL penalty; without this small one it drifts off the facts, of which this reward model knows nothing.
What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('gspo', tiny, advantage='standardised', loss='gspo', reduce='sequence_mean', clip_low=3e-4, clip_high=4e-4,
                   minibatches=4, kl_coefficient=0.1)
