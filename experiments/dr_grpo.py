"""Dr. GRPO on the embedded world: no division by deviation or length (arXiv:2503.20783).

  python -m rlhf_jax --config=experiments/dr_grpo.py --workdir=runs/dr_grpo

Published without a KL penalty; without this small one it drifts off the facts, of which this reward model knows nothing.
What to expect: docs/methods.md.
"""

import rloo


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return rloo.like('dr_grpo', tiny, advantage='above_mean', reduce='constant', kl_coefficient=0.1)
