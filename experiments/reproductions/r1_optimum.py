"""R1: PPO, RLOO, Dr. GRPO and DPO reach the same optimum, the reference tilted by the reward.

Ziegler et al. 2019, arXiv:1909.08593; Korbak et al. 2022, arXiv:2205.11275; Rafailov et al. 2023,
arXiv:2305.18290. All responses can be listed, so that the optimum and the distances are exact.

  python scripts/reproduce.py --config=experiments/reproductions/r1_optimum.py

Expected: every method ends within 0.05 nats of the optimum and 0.03 σ of its value, and all
  within 0.1 nats of each other; docs/reproductions.md has the figures and the plot.
Time: 37 s on one CPU core. On a GPU it would say no more: the world is as small as it must be.
Try: --config.settings.beta=0.2, an optimum that is further away.
"""

import ml_collections
import sizes


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R1',
    text='PPO, RLOO, Dr. GRPO and DPO reach the same optimum, the tilted reference',
    source='Ziegler et al. 2019; Rafailov et al. 2023; Korbak et al. 2022',
    arrangement='1,296 responses; β 0.5 as a penalty in the reward, or in the loss of DPO on '
    'pairs of all responses with Bradley–Terry labels; 3,000 steps of 512 responses',
    bands={
      'largest KL to the optimum': (None, 0.05),
      'largest regret / σ_r': (None, 0.03),
      'largest difference of methods': (None, 0.1),
    },
    reported=('KL of the reference to the optimum',),
    settings=dict(
      tokens=6,
      length=4,
      rows=512,  # responses, or pairs, of a step
      beta=0.5,
      training=dict(steps=3000, rate=0.03, kept=10),  # kept: points of the plot
    ),
  )
