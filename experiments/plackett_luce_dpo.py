"""DPO of whole rankings on TinyWorld: the likelihood of the order of K responses.

Rafailov et al. 2023, arXiv:2305.18290, appendix A.3; docs/methods/plackett_luce_dpo.md. With K = 2
it is DPO.

  python -m rlhf_jax --config=experiments/plackett_luce_dpo.py --workdir=runs/plackett_luce_dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 60.1% (56.9 – 63.3)
  sampled and 57.3% (51.4 – 62.6) greedy, at a KL of 2.78 nats. docs/methods.md has all methods.
Time: 84 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.plackett_luce_dpo.beta=0.05, which lets the policy move further from SFT.
"""

import dpo
import ml_collections


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return dpo.preference_experiment(
    'plackett_luce_dpo',
    tiny,
    loss='plackett_luce',
    beta=0.1,
  )
