"""DAPO on the embedded world: clip-higher, dynamic sampling, overlong penalty, token mean (arXiv:2503.14476).

  python -m rlhf_jax --config=experiments/dapo.py --workdir=runs/dapo

`response/extra` counts the answers sampled again.
Published without a KL penalty; without this small one it drifts off the facts, of which this reward model knows nothing.
What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('dapo', tiny, advantage='standardised', clip_high=0.28, resampling=2, overlong_buffer=8, kl_coefficient=0.1)
