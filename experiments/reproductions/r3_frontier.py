"""R3: the frontier of reward against KL: optimum, PPO, DPO, best-of-n, and PPO without a penalty.

Ziegler et al. 2019, arXiv:1909.08593; Gao et al. 2022, arXiv:2210.10760. All responses can be
listed, so that every point is exact.

  python scripts/reproduce.py --config=experiments/reproductions/r3_frontier.py

Expected: nothing is above the optimum at its KL; PPO and DPO with a penalty reach 70 to 100% of its
  gain, best-of-n at least 85% up to 3 nats; PPO without a penalty is at most 0.02 above
  best-of-n; docs/reproductions.md has the figures and the plot.
Time: 29 s on one CPU core. On a GPU it would say no more: the world is as small as it must be.
Try: --config.settings.betas="(1.0, 0.5)", other places on the frontier.
"""

import ml_collections
import sizes


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R3',
    text='No method is above the tilted reference at its KL; PPO and DPO with a penalty reach most '
    'of it; PPO without one spends more KL than best-of-n',
    source='Ziegler et al. 2019; Gao et al. 2022',
    arrangement='1,296 responses; β 0.7, 0.4 and 0.25; all figures exact',
    bands={
      'largest reward above the oracle': (None, 0.005),
      'least share of the oracle, PPO': (0.7, 1.005),
      'least share of the oracle, DPO': (0.7, 1.005),
      'least share of the oracle, best of n': (0.85, 1.005),
      'PPO with β = 0 minus best of n': (None, 0.02),
    },
    settings=dict(
      tokens=6,
      length=4,
      rows=512,
      betas=(0.7, 0.4, 0.25),
      training=dict(steps=3000, rate=0.03, kept=1),
      without_penalty=dict(steps=600, rate=0.01, kept=20),  # kept: points on its way
    ),
  )
