"""KTO on TinyWorld: single responses, desirable or not, without pairs.

Ethayarajh et al. 2024, arXiv:2402.01306; docs/methods/kto.md. The best response to each prompt
counts as desirable, the worst as undesirable.

  python -m rlhf_jax --config=experiments/kto.py --workdir=runs/kto

Expected: wins 69.6, 67.2 and 66.8% against SFT on seeds 0, 1 and 2 (lowest 95% bound 62.6%), at a
  KL of 2.59 nats.
Time: 128 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.kto.beta=0.3, which keeps the policy closer to the reference.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'kto',
    tiny,
    loss='kto',
    beta=0.1,
  )
