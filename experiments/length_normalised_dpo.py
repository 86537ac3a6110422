r"""Length-normalised DPO on TinyWorld: log-ratios per token.

Tülu 3, Lambert et al. 2024, arXiv:2411.15124; docs/methods/length_normalised_dpo.md. β is per
token, hence larger than that of DPO.

  python -m rlhf_jax --config=experiments/length_normalised_dpo.py \
    --workdir=runs/length_normalised_dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 59.6% (56.4 – 62.9)
  sampled and 57.3% (52.4 – 62.4) greedy, at a KL of 1.76 nats. docs/methods.md has all methods.
Time: 81 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.length_normalised_dpo.beta=5.0, which keeps the policy closer to the reference.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'length_normalised_dpo',
    tiny,
    loss='length_normalised',
    beta=2.0,
  )
