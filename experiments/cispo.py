"""CISPO on the embedded world: clipped importance weights, every token keeps its gradient (arXiv:2506.13585).

  python -m rlhf_jax --config=experiments/cispo.py --workdir=runs/cispo

Two minibatches, so that weights differ from 1.
Published without a KL penalty; without this small one it drifts off the facts, of which this reward model knows nothing.
What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('cispo', tiny, advantage='standardised', loss='cispo', minibatches=2, kl_coefficient=0.1)
