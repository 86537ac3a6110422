"""Several rewards in one: what stages that learn from their own answers are told."""

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.stages.shared import rollout
from rlhf_jax.types import Samples

MODEL, SHORT = 'random', 'rlhf_jax.rewards.builtin.text:length(most=8,unit="characters")'


def made(context, *overrides):
  """(scores, metrics) of eight answers by the reward of the tiny RLOO."""
  on = context('rloo', 'rloo.reward_functions.workers=0', 'rloo.reference=random', *overrides, experiment='rloo')
  (rows, examples), _ = rollout.read_prompts(on)
  prompts = next(iter(batches.prompts_once(examples[:4], 4)))
  rng = np.random.default_rng(0)
  mask = np.arange(9) < rng.integers(1, 10, 8)[:, None]
  samples = Samples(np.where(mask, rng.integers(5, 300, (8, 9)), 0).astype(np.int32), mask,
                    np.zeros((8, 9), np.float32), np.ones(8, bool))
  score, = rollout.build_scores(on, rows)
  return jax.device_get(score(*on.layout.place((prompts, samples))))


@pytest.mark.parametrize('weights', [(), (2.0, -0.5)])
@pytest.mark.parametrize('standardise', [False, True])
def test_a_reward_model_and_a_program_are_weighed_and_standardised_apart(context, weights, standardise):
  alone = [made(context, f'rloo.reward=({name!r},)')[0].astype(np.float64) for name in (MODEL, SHORT)]
  total, metrics = made(context, f'rloo.reward=({MODEL!r}, {SHORT!r})', f'rloo.reward_weights={weights}',
                        f'rloo.standardise_rewards={standardise}')
  one = lambda x: (x - x.mean()) / x.std() if standardise else x
  assert min(x.std() for x in alone) > 1e-3, alone
  np.testing.assert_allclose(total, sum(w * one(x) for w, x in zip(weights or (1, 1), alone)), rtol=1e-4, atol=1e-5)
  for name, values in zip((MODEL, SHORT), alone):  # as they are, before weights
    np.testing.assert_allclose(metrics[f'reward/{name}'], values.mean(), rtol=1e-5)
  assert metrics['reward/failed'] == 0


def test_a_reward_that_is_all_the_same_adds_nothing_when_standardised(context):
  alone, _ = made(context, f'rloo.reward=({MODEL!r},)', 'rloo.standardise_rewards=True')
  both, _ = made(context, f'rloo.reward=({MODEL!r}, "rlhf_jax.rewards.builtin.text:length(most=99)")',
                 'rloo.standardise_rewards=True')
  np.testing.assert_allclose(both, alone, atol=1e-4)


def test_one_weight_for_each(context):
  with pytest.raises(UserError, match='config.rloo.reward_weights: expected 2 numbers, got 1'):
    made(context, f'rloo.reward=({MODEL!r}, {SHORT!r})', 'rloo.reward_weights=(1.0,)')
