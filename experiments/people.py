"""RLHF with people who rank: two rounds of sampling, collection, reward model and PPO.

In each round the current policy responds to the prompts, people rank the responses in the web
application `rlhf_jax.collect`, the reward model learns from the rankings of all rounds so far,
and PPO continues from the current policy. docs/collect.md shows how people are invited. To try
the experiment without people, let the simulated people of TinyWorld answer over HTTP:

  python scripts/simulate_people.py --config=experiments/people.py --workdir=runs/people

or let people rank. The first command stops where it needs them; repeat it when they have finished:

  python -m rlhf_jax --config=experiments/people.py --workdir=runs/people
  python -m rlhf_jax.collect --workdir=runs/people/collect

Expected: with simulated people on seed 0, helpful responses on the validation split go from 30.1%
  (SFT) to 55.6% (46.8 – 64.2), sampled; docs/collect.md has other seeds and the comparison with
  the simulation within the run.
Time: with simulated people 8 minutes on two CPU cores, after the quickstart's first two stages.
Try: --config.rankings1.source=simulated --config.rankings2.source=simulated, which simulates the
  people within the run and needs no server.
"""

from typing import Any

import ml_collections
import quickstart

ROUNDS = 2


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  sections = {}
  policy = 'sft'
  for number in range(1, ROUNDS + 1):
    sections[f'rankings{number}'] = _collect(policy)
    sections[f'reward{number}'] = _learn_reward(number)
    sections[f'ppo{number}'] = _optimise(policy, number)
    policy = f'ppo{number}'
  return quickstart.continue_with(policy, tiny, ('pretrain', 'sft'), **sections)


def _collect(policy: str) -> dict[str, Any]:
  """Returns a stage in which people rank responses of a policy."""
  return dict(
    kind='feedback',
    source='people',
    policies=(policy,),
    num_samples=4,
    max_length=30,
    sampling=dict(temperature=0.7),  # as in the quickstart
  )


def _learn_reward(number: int) -> dict[str, Any]:
  """Returns a stage that trains a reward model on the rankings of the first rounds."""
  rounds = range(1, number + 1)
  return dict(
    kind='reward',
    batch_size=8,
    responses_per_row=4,  # all samples of a prompt
    max_length=62,
    likelihood=True,
    language_model_coefficient=0.5,
    loop=dict(steps=160, eval_every=0, save_every=160),  # a new head need not be measured
    data=dict(
      source='jsonl',
      path=tuple(f'{{workdir}}/rankings{each}/{{split}}.jsonl' for each in rounds),
    ),
    optimizer=dict(learning_rate=5e-4, warmup_steps=10),
  )


def _optimise(policy: str, number: int) -> dict[str, Any]:
  """Returns a stage that continues PPO from a policy, with the reward model of a round."""
  return dict(
    kind='ppo',
    init=policy,
    reward=f'reward{number}',
    value=f'reward{number}',
    batch_size=64,
    max_length=30,
    epochs=1,
    minibatches=2,
    kl_coefficient=0.06,
    loop=dict(steps=50, eval_every=50, save_every=50),
    optimizer=dict(learning_rate=4e-4),
  )
