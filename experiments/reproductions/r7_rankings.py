"""R7: all pairs of a ranking as one element cost K passes, and do not overfit more.

Ouyang et al. 2022, arXiv:2203.02155, section 3.5.

  python scripts/reproduce.py --config=experiments/reproductions/r7_rankings.py

Expected: the held-out log-loss is not more than 0.005 above that of shuffled pairs, for a fifth of
  the responses scored; docs/reproductions.md has the figures and the plot.
Time: 46 s on one CPU core. On a GPU it would say no more.
Try: --config.settings.passes=32, where shuffled pairs have every chance to overfit.
"""

import ml_collections
import sizes


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R7',
    text='All pairs of a ranking as one element cost K passes and do not overfit more',
    source='Ouyang et al. 2022',
    arrangement='400 rankings of 6 with noisy labels, 8 passes, the same number of updates and of '
    'pairs in each; held-out log-loss on 1,000 rankings',
    bands={
      'log-loss of batched minus shuffled': (None, 0.005),
      'responses scored for a ranking, batched / shuffled': (0.19, 0.21),
    },
    reported=('log-loss, batched', 'log-loss, shuffled', 'log-loss, Plackett–Luce'),
    settings=dict(
      world=sizes.sequences(),
      proxy=dict(units=32, rate=3e-3, batch=16),  # rankings of an update
      responses=6,  # K
      rankings=400,
      passes=8,
      held_out=1000,
    ),
  )
