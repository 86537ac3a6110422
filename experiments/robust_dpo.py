"""Robust DPO on TinyWorld: unbiased where a tenth of the labels is flipped.

Chowdhury et al. 2024, arXiv:2403.00409; docs/methods/robust_dpo.md. The loss can be negative, and
has no lower bound.

  python -m rlhf_jax --config=experiments/robust_dpo.py --workdir=runs/robust_dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 59.1% (56.2 – 62.2)
  sampled and 56.4% (52.4 – 60.4) greedy, at a KL of 1.74 nats. docs/methods.md has all methods.
Time: 87 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.robust_dpo.optimizer.learning_rate=4e-4, the rate of DPO.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'robust_dpo',
    tiny,
    loss='robust',
    beta=0.1,
    label_smoothing=0.1,
    optimizer=dict(learning_rate=2e-4),
  )
