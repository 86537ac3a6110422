"""R15: the controlled win rate finds the truth behind a judge's likes, and intervals cover it.

Dubois et al. 2024, arXiv:2404.04475; Chiang et al. 2024, arXiv:2403.04132. The judges are
simulated (scripts/check_statistics.py), so that the truth is known.

  python scripts/reproduce.py --config=experiments/reproductions/r15_evaluator.py

Expected: the controlled figures are within 3 points of the truth, and 90 to 99% of the intervals
  cover it; docs/reproductions.md has the figures and the plot.
Time: 41 s on one CPU core. On a GPU it would say no more: it is NumPy.
Try: --config.settings.trials=20, fewer trials for each seed.
"""

import ml_collections
import sizes

COVERED = (0.90, 0.99)


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R15',
    text='The controlled win rate finds the truth behind a judge’s likes; intervals cover it',
    source='Dubois et al. 2024; Chiang et al. 2024',
    arrangement='simulated judges who like length, lists and the first place; four models, 300 '
    'prompts; 70 trials for each seed (scripts/check_statistics.py)',
    bands={
      'win rate, controlled: mean error, points': (None, 3.0),
      'win rate, controlled: covered': COVERED,
      'win rate, unbiased judge: covered': COVERED,
      'rating, plain: covered': COVERED,
      'rating, controlled: covered': COVERED,
      'rating, controlled: mean error, hundredths of a nat': (None, 3.0),
    },
    reported=('win rate, plain: mean error, points', 'win rate, plain: covered'),
    settings=dict(trials=70),  # for each seed; three seeds make the 200 of the claim
  )
