"""REINFORCE++ on TinyWorld: advantages whitened over the batch, KL token by token.

Hu 2025, arXiv:2501.03262; docs/methods/reinforce_plus_plus.md.
One response to each of 64 prompts.

  python -m rlhf_jax --config=experiments/reinforce_plus_plus.py --workdir=runs/reinforce_plus_plus

Expected: on the test split of seed 0 it wins against SFT by substance in 60.6% (57.1 – 64.8)
  sampled and 57.6% (53.4 – 63.0) greedy, at a KL of 0.51 nats. docs/methods.md has all methods.
Time: 84 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.reinforce_plus_plus.minibatches=4, more updates a step.
"""

import ml_collections
import rloo


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return rloo.policy_gradient_experiment(
    'reinforce_plus_plus',
    tiny,
    batch_size=64,
    num_samples=1,
    advantage='batch_baseline',
    whiten_advantages=True,
    kl_place='tokens',
    kl_coefficient=0.25,
    minibatches=2,
  )
