"""Several rewards in one: what stages that learn from their own responses are given."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from rlhf_jax import testing
from rlhf_jax.data import batches, records
from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.stages import policy_gradient, reward
from rlhf_jax.stages.shared import rollout, scores
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Samples

MODEL = 'random'
SHORT = 'rlhf_jax.rewards.builtin.text:length(most=8,unit="characters")'


def scored(context, *overrides):
  """(scores, metrics) of eight responses by the reward of the tiny RLOO."""
  has_function = any(SHORT in override for override in overrides)
  workers = ['rloo.reward_functions.workers=0'] if has_function else []
  made = context(
    'rloo',
    *workers,
    'rloo.reference=random',
    *overrides,
    experiment='rloo',
  )
  options = made.read_options(policy_gradient.STAGE)
  train, _ = rollout.read_prompts(made, options)
  prompts = next(iter(batches.prompts_once(train.examples[:4], 4)))
  rng = np.random.default_rng(0)
  mask = np.arange(9) < rng.integers(1, 10, 8)[:, None]
  samples = Samples(
    tokens=np.where(mask, rng.integers(5, 300, (8, 9)), 0).astype(np.int32),
    mask=mask,
    logprobs=np.zeros((8, 9), np.float32),
    ended=np.ones(8, bool),
  )
  (score,) = scores.open_scores(made, ModelStore(made), options, train.records)
  return jax.device_get(score(*made.layout.place((prompts, samples))))


@pytest.mark.parametrize('weights', [(), (2.0, -0.5)])
@pytest.mark.parametrize('standardise', [False, True])
def test_a_reward_model_and_a_function_are_weighed_and_standardised_apart(
  context, weights, standardise
):
  alone = []
  for name in (MODEL, SHORT):
    values, _ = scored(context, f'rloo.reward=({name!r},)')
    alone.append(values.astype(np.float64))
  total, metrics = scored(
    context,
    f'rloo.reward=({MODEL!r}, {SHORT!r})',
    f'rloo.reward_weights={weights}',
    f'rloo.standardise_rewards={standardise}',
  )
  assert min(x.std() for x in alone) > 1e-3, alone
  want = 0
  for weight, x in zip(weights or (1, 1), alone):
    want = want + weight * ((x - x.mean()) / x.std() if standardise else x)
  np.testing.assert_allclose(total, want, rtol=1e-4, atol=1e-5)
  for name, values in zip((MODEL, SHORT), alone):  # as they are, before weights
    np.testing.assert_allclose(metrics[f'reward/{name}'], values.mean(), rtol=1e-5)
  assert metrics['reward/failed'] == 0


def test_a_reward_that_is_all_the_same_adds_nothing_when_standardised(context):
  same = 'rlhf_jax.rewards.builtin.text:length(most=99)'
  alone, _ = scored(context, f'rloo.reward=({MODEL!r},)', 'rloo.standardise_rewards=True')
  both, _ = scored(context, f'rloo.reward=({MODEL!r}, "{same}")', 'rloo.standardise_rewards=True')
  np.testing.assert_allclose(both, alone, atol=1e-4)


def test_one_weight_for_each(context):
  with pytest.raises(UserError, match='config.rloo.reward_weights: expected 2 numbers, got 1'):
    scored(context, f'rloo.reward=({MODEL!r}, {SHORT!r})', 'rloo.reward_weights=(1.0,)')


@pytest.fixture(scope='module')
def other_reward(tokenizer, tmp_path_factory):
  """A reward model whose tokenizer has the same tokens under other ids, and that tokenizer."""
  values = json.loads(tokenizer.core.to_str())
  vocabulary = values['model']['vocab']
  special = {token['content'] for token in values['added_tokens']}
  words = [token for token in vocabulary if token not in special]
  ids = [vocabulary[token] for token in words]
  vocabulary.update(zip(words, reversed(ids)))
  core = tokenizers.Tokenizer.from_str(json.dumps(values))
  other = Tokenizer(core, tokenizer.template, **tokenizer._roles)
  model = testing.make_model(vocab_size=tokenizer.vocab_size)
  params = testing.make_params(model)
  directory = tmp_path_factory.mktemp('reward') / 'model'
  pretrained.export_model(directory, model.config, params, other)
  return str(directory), other, model, params


def test_a_reward_model_with_other_ids_reads_the_texts_again(context, tokenizer, other_reward):
  directory, other, model, params = other_reward
  overrides = ('rloo.reference=random', f'rloo.reward=({directory!r},)')
  made = context('rloo', *overrides, experiment='rloo')
  options = made.read_options(policy_gradient.STAGE)
  train, _ = rollout.read_prompts(made, options)
  prompts = next(iter(batches.prompts_once(train.examples[:2], 2)))
  texts = ['yes, it is', 'no', 'a b c', 'four words in all']
  tokens = np.full((4, 24), tokenizer.pad_id, np.int32)
  mask = np.zeros((4, 24), bool)
  for row, text in enumerate(texts):
    ids = tokenizer.response(text)
    tokens[row, : len(ids)] = ids
    mask[row, : len(ids)] = True
  samples = Samples(tokens, mask, np.zeros((4, 24), np.float32), np.ones(4, bool))
  (score,) = scores.open_scores(made, ModelStore(made), options, train.records)
  got, _ = jax.device_get(score(*made.layout.place((prompts, samples))))
  for row, text in enumerate(texts):
    record = train.records[prompts.index[row // 2]]
    exchange = other.exchange(records.conversation(record), text)
    ids = np.asarray([exchange.prompt + exchange.response])
    positions = np.arange(ids.shape[1])[None]
    no_response = np.zeros(ids.shape, bool)
    want = reward.last_scores(model, params, ids, positions, np.ones_like(ids), no_response)
    np.testing.assert_allclose(got[row], want[0], atol=1e-5)


def test_other_models_must_agree_on_what_ids_mean(context, other_reward):
  directory, *_ = other_reward
  made = context('rloo', experiment='rloo')
  with pytest.raises(UserError, match="has another tokenizer than the run: id .* is '.*' to it"):
    ModelStore(made).open(directory)


def test_minibatches_are_rows_of_the_batch_in_the_new_order():
  layout = testing.make_layout()
  batch = {'tokens': np.arange(12).reshape(6, 2), 'score': np.arange(6.0)}
  order = np.array([5, 0, 3, 1, 4, 2])
  cut = rollout.shuffled_minibatches(layout, jax.tree.map(jnp.asarray, batch), order, 3)
  np.testing.assert_array_equal(cut['score'], [[5, 0], [3, 1], [4, 2]])
  np.testing.assert_array_equal(cut['tokens'][1], [[6, 7], [2, 3]])
