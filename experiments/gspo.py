"""GSPO on TinyWorld: the ratio of whole responses, clipped narrowly.

Zheng et al. 2025, arXiv:2507.18071; docs/methods/gspo.md. With a single minibatch the ratio would
always be 1, so there are four. Published without a KL penalty. The small one used here keeps the
policy from forgetting the facts, which the reward model does not know.

  python -m rlhf_jax --config=experiments/gspo.py --workdir=runs/gspo

Expected: on the test split of seed 0 it wins against SFT by substance in 58.5% (56.0 – 61.3)
  sampled and 59.1% (55.0 – 64.3) greedy, at a KL of 0.42 nats. docs/methods.md has all methods.
Time: 68 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.gspo.kl_coefficient=0, as published.
"""

import ml_collections
import rloo


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return rloo.policy_gradient_experiment(
    'gspo',
    tiny,
    advantage='standardised',
    loss='gspo',
    reduce='sequence_mean',
    clip_low=3e-4,
    clip_high=4e-4,
    minibatches=4,
    kl_coefficient=0.1,
  )
