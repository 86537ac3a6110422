"""SLiC's hinge on DPO's margin, on TinyWorld.

Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2024, arXiv:2309.06657; docs/methods/hinge_dpo.md.
A pair whose margin is above 1/β teaches nothing more.

  python -m rlhf_jax --config=experiments/hinge_dpo.py --workdir=runs/hinge_dpo

Expected: wins 66.7, 71.5 and 68.0% against SFT on seeds 0, 1 and 2 (lowest 95% bound 62.4%), at a
  KL of 6.59 nats.
Time: 82 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.hinge_dpo.beta=0.2, which halves the margin at which a pair stops teaching.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'hinge_dpo',
    tiny,
    loss='hinge',
    beta=0.1,
  )
