"""R9: the adaptive coefficient brings the KL to its target.

Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

  python scripts/reproduce.py --config=experiments/reproductions/r9_adaptive_kl.py

Expected: in the last fifth of the steps the mean KL is within 20% of its target;
  docs/reproductions.md has the figures and the plot.
Time: 13 s on one CPU core. On a GPU it would say no more.
Try: --config.settings.ppo.target=3.0, another target.
"""

import ml_collections
import sizes


def get_config() -> ml_collections.ConfigDict:
  """Returns the claim, its bands and its settings."""
  return sizes.make_config(
    claim='R9',
    text='The adaptive coefficient brings the KL to its target',
    source='Ziegler et al. 2019',
    arrangement='PPO on a linear reward, target 6 nats, β 0.15 at first, horizon 10,000 '
    'episodes; 600 rollouts of 512',
    bands={'mean KL of the last fifth / target': (0.8, 1.2)},
    reported=('last β',),
    note='A policy that learns more slowly than β moves makes the KL swing around its target: with '
    'a horizon of 5,120 and a learning rate of 0.02 it ranged from 3 to 24 nats.',
    settings=dict(
      world=sizes.sequences(),
      ppo=dict(
        steps=600,
        responses=512,
        rate=0.05,
        coefficient=0.15,
        target=6.0,
        horizon=10_000.0,
        value_coefficient=0.5,
      ),
    ),
  )
