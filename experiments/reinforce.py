"""REINFORCE with the batch's mean as baseline, on the embedded world (Williams 1992).

  python -m rlhf_jax --config=experiments/reinforce.py --workdir=runs/reinforce

An answer to each of 64 prompts. What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('reinforce', tiny, batch_size=64, num_samples=1, advantage='batch_baseline', loss='reinforce',
                   reduce='sequence_sum', kl_coefficient=0.25)
