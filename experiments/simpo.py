"""SimPO on TinyWorld: no reference, mean log-probabilities and a margin.

Meng et al. 2024, arXiv:2405.14734; docs/methods/simpo.md. No KL term limits the distance from
SFT: watch the KL in the table.

  python -m rlhf_jax --config=experiments/simpo.py --workdir=runs/simpo

Expected: on the test split of seed 0 it wins against SFT by substance in 58.8% (55.7 – 62.0)
  sampled and 56.4% (50.9 – 62.2) greedy, at a KL of 2.24 nats. docs/methods.md has all methods.
Time: 81 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.simpo.optimizer.learning_rate=1e-4, which moves the policy less.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'simpo',
    tiny,
    loss='simpo',
    beta=2.0,
    margin=1.0,
    reference='',
  )
