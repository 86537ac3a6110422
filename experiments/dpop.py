"""DPO-Positive on TinyWorld: the better response may not become less likely.

Pal et al. 2024, arXiv:2402.13228; docs/methods/dpop.md.
The λ of the paper is `dpop_lambda`.

  python -m rlhf_jax --config=experiments/dpop.py --workdir=runs/dpop

Expected: on the test split of seed 0 it wins against SFT by substance in 61.1% (57.9 – 64.6)
  sampled and 60.5% (56.8 – 64.6) greedy, at a KL of 0.75 nats. docs/methods.md has all methods.
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
