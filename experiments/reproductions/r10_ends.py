"""R10: a penalty for responses without an end keeps them ending.

Stiennon et al. 2020, arXiv:2009.01325; Huang et al. 2024, arXiv:2403.17031. And a constant that is
added to all scores changes no advantage of a group.

  python scripts/reproduce.py --config=experiments/reproductions/r10_ends.py

Expected: 95% of the responses or more end with the penalty, 10 points more than without; a constant
  changes group advantages by 1e-5 at most; docs/reproductions.md has the figures and the plot.
Time: 24 s on one CPU core. On a GPU it would say no more.
Try: --config.settings.penalty=-0.1, a penalty that is worth paying.
"""

import ml_collections
import sizes


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R10',
    text='A penalty for responses without an end keeps them ending; a constant added to all scores '
    'changes no group advantage',
    source='Stiennon et al. 2020; Huang et al. 2024',
    arrangement='every token is worth something, so length pays; PPO with β 0.02, with and without '
    'a score of −1 for responses that do not end',
    bands={
      'rate of ends, with the penalty': (0.95, None),
      'gain of the penalty': (0.10, None),
      'largest change by a constant': (None, 1e-5),
    },
    reported=('rate of ends, without the penalty', 'rate of ends, reference'),
    settings=dict(
      world=sizes.sequences(),
      penalty=-1.0,
      ppo=dict(steps=400, responses=512, rate=0.02, coefficient=0.02, value_coefficient=0.5),
    ),
  )
