"""SimPO on TinyWorld: no reference, mean log-probabilities and a margin.

Meng et al. 2024, arXiv:2405.14734; docs/methods/simpo.md. No KL term limits the distance from
SFT: watch the KL in the table.

  python -m rlhf_jax --config=experiments/simpo.py --workdir=runs/simpo

Expected: wins 50.9, 51.7 and 51.4% against SFT on seeds 0, 1 and 2 (lowest 95% bound 46.3%), at a
  KL of 14.23 nats.
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
