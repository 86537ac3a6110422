"""CISPO on TinyWorld: clipped importance weights, so that every token keeps its gradient.

MiniMax 2025, arXiv:2506.13585; docs/methods/cispo.md. With a single minibatch the weights would
always be 1, so there are two. Published without a KL penalty. The small one used here keeps the
policy from forgetting the facts, which the reward model does not know.

  python -m rlhf_jax --config=experiments/cispo.py --workdir=runs/cispo

Expected: on the test split of seed 0 it wins against SFT by substance in 60.5% (57.1 – 64.3)
  sampled and 59.2% (55.1 – 64.4) greedy, at a KL of 0.57 nats. docs/methods.md has all methods.
Time: 73 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.cispo.kl_coefficient=0, as published.
"""

import ml_collections
import rloo


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return rloo.policy_gradient_experiment(
    'cispo',
    tiny,
    advantage='standardised',
    loss='cispo',
    minibatches=2,
    kl_coefficient=0.1,
  )
