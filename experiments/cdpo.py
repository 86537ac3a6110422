"""cDPO on TinyWorld: DPO that takes a tenth of the labels to be wrong.

Mitchell 2023; docs/methods/cdpo.md. With smoothed labels the best margin
is finite, which suits noisy annotators.

  python -m rlhf_jax --config=experiments/cdpo.py --workdir=runs/cdpo

Expected: on the test split of seed 0 it wins against SFT by substance in 60.8% (57.9 – 63.8)
  sampled and 59.8% (55.4 – 64.5) greedy, at a KL of 2.01 nats. docs/methods.md has all methods.
Time: 86 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.cdpo.label_smoothing=0.2, which assumes twice as many wrong labels.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'cdpo',
    tiny,
    loss='dpo',
    beta=0.1,
    label_smoothing=0.1,
  )
