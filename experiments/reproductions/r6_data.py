"""R6: the accuracy of a reward model grows with its data.

Stiennon et al. 2020, arXiv:2009.01325, figure 6; Gao et al. 2022, arXiv:2210.10760.

  python scripts/reproduce.py --config=experiments/reproductions/r6_data.py

Expected: held-out accuracy rises with every doubling, by 10 points or more from 256 to 16,384
  pairs, and is 60% or more at 2,048; docs/reproductions.md has the figures and the plot.
Time: 26 s on one CPU core. FILE:gpu has 48 tokens, responses of 48, networks of 512 units, twelve
  doublings, to 1,048,576 pairs; it was never run on a GPU.
Try: --config.settings.proxy.units=8, a smaller reward model.
"""

import ml_collections
import sizes


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  is_large = sizes.check_size(size)
  doublings = 12 if is_large else 6
  most = 256 * 2**doublings
  return sizes.make_config(
    claim='R6',
    text='The accuracy of a reward model grows with its data',
    source='Stiennon et al. 2020; Gao et al. 2022',
    arrangement=f'256 to {most:,} gold-labelled pairs, one pass in batches of 32; 4,000 held-out '
    'pairs',
    bands={
      'gain from the fewest to the most pairs': (0.10, None),
      'least step of doubling': (0.0, None),
      'accuracy with eight times the fewest': (0.60, None),
    },
    settings=dict(
      world=sizes.sequences(is_large),
      proxy=dict(units=512 if is_large else 32, rate=3e-3 if is_large else 1e-2, batch=32),
      fewest=256,
      doublings=doublings,
    ),
  )
