"""CPO on TinyWorld: DPO without a reference, held by SFT on the better response.

Xu et al. 2024, arXiv:2401.08417; docs/methods/cpo.md. No KL term limits the distance from
SFT: watch the KL in the table.

  python -m rlhf_jax --config=experiments/cpo.py --workdir=runs/cpo

Expected: wins 62.6, 62.6 and 65.9% against SFT on seeds 0, 1 and 2 (lowest 95% bound 58.5%), at a
  KL of 1.47 nats.
Time: 79 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.cpo.nll_coefficient=1.0, a larger weight of the SFT term.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'cpo',
    tiny,
    loss='cpo',
    beta=0.1,
    nll_coefficient=0.2,
    reference='',
  )
