import functools

import jax
import ml_collections
import numpy as np
import pytest

from rlhf_jax.data import sources
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import reward
from rlhf_jax.types import Prompts, Rankings, Samples

OPTIMIZER = ml_collections.ConfigDict({**steps.OPTIMIZER, 'learning_rate': 1e-2, 'eps': 1e-5})  # not all noise
B, K, T = 16, 4, 12


def rankings(T=T, seed=0):
  """Rankings of 2, 3 and 4 responses, with ties and empty places."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, 13, (B, K))
  tokens = rng.integers(2, 64, (B, K, T if T > 12 else 12)).astype(np.int32)[..., :T]
  group = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]] * (B // 4), np.int32)
  ranks = rng.integers(1, 4, (B, K)).astype(np.int32)
  inside = np.arange(T) < lengths[..., None]
  return Rankings(tokens=np.where(inside, tokens, 0), positions=np.where(inside, np.arange(T), 0).astype(np.int32),
                  segment_ids=inside.astype(np.int32), group=group, ranks=ranks, index=np.zeros((B, K), np.int32),
                  begins=lengths // 2, confidence=np.ones((B, K), np.float32),
                  reference_logprobs=np.zeros((B, K), np.float32))


@functools.cache
def build(tiny, mesh, parts, loss):
  on = tiny.layout(mesh)
  model, optimizer = tiny.model(on), steps.make_optimizer(OPTIMIZER, 10)
  init = lambda: steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  return init, steps.build(reward.build_loss(model, loss), optimizer, on, parts)


def train(tiny, batch, mesh='one device', parts=1, loss='pairwise', count=1):
  """(parameters, metrics of each step) after some steps on one batch."""
  init, step = build(tiny, mesh, parts, loss)
  state, history = init(), []
  for _ in range(count):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module')
def first(tiny):
  return train(tiny, rankings())


@pytest.mark.parametrize('loss', ['pairwise', 'plackett_luce', 'plain_pairs'])
def test_loss_falls(tiny, loss):
  _, history = train(tiny, rankings(), loss=loss, count=8)
  assert history[-1]['loss'] < 0.8 * history[0]['loss'] and history[-1]['accuracy'] > history[0]['accuracy']


@pytest.mark.parametrize('mesh', ['data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(tiny, first, mesh):
  tiny.close(train(tiny, rankings(), mesh, 2), first, mesh)


def test_microbatches_padding_and_order_change_nothing(tiny, first):
  batch, rng = rankings(), np.random.default_rng(1)
  tiny.close(train(tiny, batch, parts=4), first, 'micro-batches')
  rows, places = rng.permutation(B), rng.permutation(K)
  tiny.close(train(tiny, jax.tree.map(lambda x: x[rows], batch)), first, 'order of rows')
  tiny.close(train(tiny, jax.tree.map(lambda x: x[:, places], batch)), first, 'order of places')
  wide = lambda side: lambda x: x if x.ndim == 2 else np.pad(x, ((0, 0), (0, 0), side))
  tiny.close(train(tiny, jax.tree.map(wide((0, 7)), batch)), first, 'more padding')
  tiny.close(train(tiny, jax.tree.map(wide((7, 0)), batch)), first, 'padding on the left')


def test_score_of_an_answer_is_that_of_its_ranking(tiny):
  """PPO's left-padded prompts and cut answers score as the right-padded rankings that the model learned from."""
  model = tiny.model(tiny.layout())
  params = tiny.params(model, tiny.layout())
  rng = np.random.default_rng(2)
  lengths, answers = rng.integers(1, 7, 8), rng.integers(1, 6, 8)
  texts = [rng.integers(2, 64, p + r).astype(np.int32) for p, r in zip(lengths, answers)]
  right = np.zeros((4, 2, 12), np.int32)
  segments = np.zeros_like(right)
  prompts = Prompts(np.zeros((8, 9), np.int32), np.zeros((8, 9), bool), np.arange(8, dtype=np.int32))
  samples = Samples(np.zeros((8, 5), np.int32), np.zeros((8, 5), bool), np.zeros((8, 5), np.float32),
                    np.ones(8, bool))
  for row, (text, p, r) in enumerate(zip(texts, lengths, answers)):
    right[row // 2, row % 2, :p + r], segments[row // 2, row % 2, :p + r] = text, 1
    prompts.tokens[row, 9 - p:], prompts.mask[row, 9 - p:] = text[:p], True
    samples.tokens[row, :r], samples.mask[row, :r] = text[p:], True
  positions = np.where(segments > 0, np.arange(12), 0)
  want = reward.last_scores(model, params, right, positions, segments)
  assert np.std(want) > 0.1
  for parts in (1, 4):
    got = reward.build_score(model, parts)(params, prompts, samples)
    np.testing.assert_allclose(got, np.ravel(want), rtol=1e-5, atol=1e-5)


def test_an_unknown_loss_is_refused(tiny):
  with pytest.raises(UserError, match="reward.loss: expected one of pairwise, plackett_luce, plain_pairs, got 'hinge'"):
    reward.build_loss(tiny.model(tiny.layout()), 'hinge')


def test_demonstrations_score_0_after_the_end(context):
  made = context('reward', 'reward.data.path=', 'reward.centre_records=5')
  rows = sources.spread_evenly(sources.load_records(made.section.demonstrations, 'demonstration', 'train'), 5)
  jsonl = made.workdir / 'train.jsonl'
  jsonl.write_text('{"messages": [{"role": "user", "content": "Hi"}], "responses": ["a", "b"], "ranks": [1, 2]}\n')
  made = context('reward', f'reward.data.path={jsonl}', 'reward.centre_records=5')
  stage = reward.build(made)
  state = stage.init()
  before = float(state.params['score']['bias'])
  state = stage.finish(state)
  model, _ = reward.common.open_model(made, 'random', head=True)
  scores = []
  for row in rows:  # each alone, without padding
    tokens = np.array([made.tokenizer.prompt(row.messages) + made.tokenizer.response(row.response)])
    positions = np.arange(tokens.shape[1])[None]
    scores.append(reward.last_scores(model, state.params, tokens, positions, np.ones_like(tokens)))
  assert abs(np.mean(scores)) < 1e-5 and abs(float(state.params['score']['bias']) - before) > 1e-4
  values, _ = stage.evaluate(state)
  assert values['pairs'] == 1.0 and values['accuracy'] in (0.0, 1.0) and values['length_accuracy'] == 0.5
