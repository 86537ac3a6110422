"""REINFORCE on TinyWorld: policy gradient with the batch's mean as baseline.

Williams 1992; docs/methods/reinforce.md.
One response to each of 64 prompts.

  python -m rlhf_jax --config=experiments/reinforce.py --workdir=runs/reinforce

Expected: on the test split of seed 0 it wins against SFT by substance in 58.3% (55.1 – 62.0)
  sampled and 57.9% (53.6 – 63.0) greedy, at a KL of 0.32 nats. docs/methods.md has all methods.
Time: 88 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.reinforce.kl_coefficient=0.1, which lets the policy move further from SFT.
"""

import ml_collections
import rloo


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return rloo.policy_gradient_experiment(
    'reinforce',
    tiny,
    batch_size=64,
    num_samples=1,
    advantage='batch_baseline',
    loss='reinforce',
    reduce='sequence_sum',
    kl_coefficient=0.25,
  )
