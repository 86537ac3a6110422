"""R5: RL over-optimises, and spends more KL than best-of-n until it does.

Gao et al. 2022, arXiv:2210.10760, sections 2 and 3. As there, a network is trained by PPO without a
KL penalty, from the reference that best-of-n samples from.

  python scripts/reproduce.py --config=experiments/reproductions/r5_rl.py

Expected: the gold reward ends more than two standard errors below its peak while the proxy ends at
  its maximum, d (α − β log d) fits with R² ≥ 0.9, and the KL at the peak is above that of
  best-of-n; docs/reproductions.md has the figures and the plot.
Time: 24 s on one CPU core. FILE:gpu has 48 tokens, a policy of 512 units, 16,384 pairs and steps of
  2,048 responses; it was never run on a GPU.
Try: --config.settings.ppo.rate=0.001, faster, with fewer points before the peak.
"""

import ml_collections
import sizes


def get_config(size: str = 'cpu') -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  is_large = sizes.check_size(size)
  pairs = 16_384 if is_large else 1024
  world = sizes.sequences(is_large, length=24)
  # Four updates from the same responses, as Stiennon et al. make.
  ppo = dict(steps=200, responses=128, epochs=4, rate=3e-4, value_coefficient=0.5)
  if is_large:
    ppo |= dict(steps=2000, responses=2048, rate=1e-4)
  return sizes.make_config(
    claim='R5',
    text='RL over-optimises, and spends more KL than best-of-n until it does',
    source='Gao et al. 2022',
    arrangement=f'PPO on a network without a KL penalty, on a proxy from {pairs:,} pairs; '
    f'responses of {world["length"]} tokens; {ppo["steps"]:,} rollouts of {ppo["responses"]:,}',
    bands={
      '(gold peak − last gold) / 2 SE': (1.0, None),
      'last proxy / largest proxy': (0.98, None),
      'R² of d (α − β log d)': (0.9, None),
      'KL of RL / of best-of-n, at their peaks': (1.0, None),
    },
    reported=(
      'gold at the peak',
      'gold at the peak of best-of-n',
      'last gold',
      'KL at the peak',
      'last KL',
    ),
    note='The proxy rises to its end while the gold reward falls on two seeds of three, and RL '
    'spends several times the KL of best-of-n. (With a table of logits for a policy, responses of '
    '12 tokens and one update for each batch it spent 0.66 times as much: such a policy goes the '
    'shortest way.) The form misses its band: on seed 0, whose proxy has learnt that the gold '
    'reward turns, nothing falls and R² is 0.63; on the others it is 0.90 and 0.92.',
    settings=dict(
      world=world,
      proxy=sizes.proxy(is_large),
      pairs=pairs,
      pool=400_000 if is_large else 30_000,
      largest_n=65_536 if is_large else 4096,
      width=512 if is_large else 32,
      ppo=ppo,
    ),
  )
