"""PPO against three reward models on TinyWorld, whose mean is harder to please by one's mistake.

All learn from the same rankings. One begins with the base model in place of the SFT model, and one
sees the rankings in other batches, so that they err in different places. Coste et al. 2023,
arXiv:2310.02743; docs/methods/ppo_ensemble.md.

  python -m rlhf_jax --config=experiments/ppo_ensemble.py --workdir=runs/ppo_ensemble

Expected: on the test split of seed 0 it wins against SFT by substance in 70.4% (66.8 – 74.3)
  sampled and 63.0% (59.1 – 68.1) greedy, at a KL of 2.34 nats. docs/methods.md has all methods.
Time: 6 minutes on two CPU cores, after the quickstart's first four stages (6 minutes).
Try: "--config.ppo_ensemble.reward=('reward','reward_of_base')", two of the three.
"""

from typing import Any

import ml_collections
import quickstart

REWARDS = ('reward', 'reward_of_base', 'reward_again')


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  of_quickstart = quickstart.get_config(tiny)
  reward = dict(of_quickstart.reward.to_dict(), kind='reward')
  ppo = dict(of_quickstart.ppo.to_dict(), kind='ppo')
  return quickstart.continue_with(
    'ppo_ensemble',
    tiny,
    ('pretrain', 'sft', 'feedback', 'reward'),
    reward_of_base=dict(reward, init='pretrain'),
    reward_again=_in_larger_batches(reward),
    ppo_ensemble=dict(ppo, reward=REWARDS, reward_weights=(1 / 3, 1 / 3, 1 / 3)),
  )


def _in_larger_batches(reward: dict[str, Any]) -> dict[str, Any]:
  """Returns a reward model's section with batches of twice the size, over as many rankings."""
  return dict(
    reward,
    batch_size=16,
    optimizer=dict(reward['optimizer'], learning_rate=7e-4),
    loop=dict(steps=160, eval_every=80, save_every=80),
  )
