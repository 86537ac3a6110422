"""IPO on TinyWorld: steers the margin to 1/(2β) instead of ever upwards.

Azar et al. 2023, arXiv:2310.12036; docs/methods/ipo.md. The margin is per token, as the authors of
IPO confirmed.

  python -m rlhf_jax --config=experiments/ipo.py --workdir=runs/ipo

Expected: on the test split of seed 0 it wins against SFT by substance in 59.1% (55.6 – 62.8)
  sampled and 55.8% (51.9 – 59.5) greedy, at a KL of 0.94 nats. docs/methods.md has all methods.
Time: 94 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.ipo.loss=ipo_sum, the formula on sums, as the paper has it.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'ipo',
    tiny,
    loss='ipo',
    beta=0.3,
    optimizer=dict(learning_rate=2e-4),
  )
