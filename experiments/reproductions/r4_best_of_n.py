"""R4: best-of-n over-optimises: the proxy rises, the gold reward turns.

Gao et al. 2022, arXiv:2210.10760, sections 2 and 3.

  python scripts/reproduce.py --config=experiments/reproductions/r4_best_of_n.py

Expected: the gold reward peaks inside the range of n and ends at 85% of its peak or less, the proxy
  never falls, and d (α − β d) fits the gold reward with R² ≥ 0.95; docs/reproductions.md has the
  figures and the plot.
Time: 11 s on one CPU core. FILE:gpu has 48 tokens, responses of 48, proxies of 4 units, 16,384
  pairs and n to 65,536; it was never run on a GPU.
Try: --config.settings.pairs=256, a proxy that knows less.
"""

import ml_collections
import sizes


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  is_large = sizes.check_size(size)
  pairs = 16_384 if is_large else 1024
  pool = 400_000 if is_large else 60_000
  largest_n = 65_536 if is_large else 4096
  return sizes.make_config(
    claim='R4',
    text='Best-of-n over-optimises: the proxy rises, the gold reward turns',
    source='Gao et al. 2022',
    arrangement=f'a proxy from {pairs:,} gold-labelled pairs; n to {largest_n:,}, without bias '
    f'from {pool:,} samples',
    bands={
      'place of the gold peak (0 first, 1 last)': (0.08, 0.92),
      'last gold / peak': (None, 0.85),
      'least rise of the proxy': (0.0, None),
      'R² of d (α − β d)': (0.95, None),
      'α': (0.0, None),
      'β': (0.0, None),
    },
    reported=('gold at the peak', 'accuracy of the proxy', 'KL at the peak'),
    seeds=tuple(range(10)),  # it takes a second for each, and they differ much
    note='The gold reward turns at n = 300 on average, while the proxy goes on rising; on '
    'three of ten seeds it still rises at n = 4,096. The form misses its band a little: '
    'where the gold reward turns early it falls faster than d², and R² is 0.80 to 0.93; '
    'on the other five seeds it is 0.97 or more. Three seeds were run first, with R² '
    '0.947; the other seven were added after that was seen. A gold reward that turns more '
    'steeply (fall 4) under larger proxies (32 units) had 0.93, too.',
    settings=dict(
      world=sizes.sequences(is_large),
      proxy=sizes.proxy(is_large),
      pairs=pairs,
      pool=pool,
      largest_n=largest_n,
    ),
  )
