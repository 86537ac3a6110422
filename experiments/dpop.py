"""DPO-Positive on TinyWorld: the better response may not become less likely.

Pal et al. 2024, arXiv:2402.13228; docs/methods/dpop.md.
The λ of the paper is `dpop_lambda`.

  python -m rlhf_jax --config=experiments/dpop.py --workdir=runs/dpop

Expected: wins 65.6, 65.9 and 67.2% against SFT on seeds 0, 1 and 2 (lowest 95% bound 61.8%), at a
  KL of 0.98 nats.
Time: 88 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.dpop.dpop_lambda=5.0, a stronger penalty.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'dpop',
    tiny,
    loss='dpop',
    beta=0.1,
    dpop_lambda=0.5,
  )
