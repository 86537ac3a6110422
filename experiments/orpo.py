"""ORPO on TinyWorld: SFT on the better response with an odds ratio against the worse.

Hong et al. 2024, arXiv:2403.07691; docs/methods/orpo.md.
No reference. The λ of the paper is `beta`.

  python -m rlhf_jax --config=experiments/orpo.py --workdir=runs/orpo

Expected: on the test split of seed 0 it wins against SFT by substance in 59.0% (55.8 – 62.6)
  sampled and 61.5% (57.7 – 66.2) greedy, at a KL of 0.57 nats. docs/methods.md has all methods.
Time: 82 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.orpo.beta=0.1, TRL's default.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'orpo',
    tiny,
    loss='orpo',
    beta=1.0,
    reference='',
  )
