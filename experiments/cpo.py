"""CPO on TinyWorld: DPO without a reference, held by SFT on the better response.

Xu et al. 2024, arXiv:2401.08417; docs/methods/cpo.md. No KL term limits the distance from
SFT: watch the KL in the table.

  python -m rlhf_jax --config=experiments/cpo.py --workdir=runs/cpo

Expected: on the test split of seed 0 it wins against SFT by substance in 62.2% (59.1 – 65.6)
  sampled and 61.4% (57.2 – 66.3) greedy, at a KL of 0.86 nats. docs/methods.md has all methods.
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
