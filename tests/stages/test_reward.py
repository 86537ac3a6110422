import functools
import json

import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import sources
from rlhf_jax.errors import UserError
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Prompts, Rankings, Samples

B, K, T = 16, 4, 12


def rankings(T=T, seed=0):
  """Rankings of 2, 3 and 4 responses, with ties and empty places."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, 13, (B, K))
  tokens = rng.integers(2, 64, (B, K, T if T > 12 else 12)).astype(np.int32)[..., :T]
  group = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]] * (B // 4), np.int32)
  inside = np.arange(T) < lengths[..., None]
  return Rankings(
    tokens=np.where(inside, tokens, 0),
    positions=np.where(inside, np.arange(T), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=group,
    ranks=rng.integers(1, 4, (B, K)).astype(np.int32),
    index=np.zeros((B, K), np.int32),
    begins=lengths // 2,
    confidence=np.ones((B, K), np.float32),
    reference_logprobs=np.zeros((B, K), np.float32),
  )


@functools.cache
def compiled(mesh, parts, loss):
  definitions = testing.make_definitions(testing.make_layout(mesh))
  options = reward.Options(loss=loss, microbatches=parts)
  return definitions, training.compile_train_step(reward.train_step, definitions, options)


def train(batch, mesh='one device', parts=1, loss='pairwise', count=1):
  """(parameters, metrics of each step) after some steps on one batch."""
  definitions, step = compiled(mesh, parts, loss)
  state = testing.make_state(definitions)
  history = []
  for _ in range(count):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module')
def first():
  return train(rankings())


@pytest.mark.parametrize('loss', ['pairwise', 'plackett_luce', 'plain_pairs'])
def test_loss_falls(loss):
  _, history = train(rankings(), loss=loss, count=8)
  assert history[-1]['loss'] < 0.8 * history[0]['loss']
  assert history[-1]['accuracy'] > history[0]['accuracy']


@pytest.mark.parametrize('mesh', ['data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(first, mesh):
  testing.assert_trees_close(train(rankings(), mesh, 2), first, mesh)


def test_microbatches_padding_and_order_change_nothing(first):
  batch = rankings()
  rng = np.random.default_rng(1)

  def pad(left, right):
    def pad_one(x):
      return x if x.ndim == 2 else np.pad(x, ((0, 0), (0, 0), (left, right)))

    return jax.tree.map(pad_one, batch)

  testing.assert_trees_close(train(batch, parts=4), first, 'micro-batches')
  rows = rng.permutation(B)
  places = rng.permutation(K)
  testing.assert_trees_close(train(jax.tree.map(lambda x: x[rows], batch)), first, 'order of rows')
  testing.assert_trees_close(
    train(jax.tree.map(lambda x: x[:, places], batch)), first, 'order of places'
  )
  testing.assert_trees_close(train(pad(0, 7)), first, 'more padding')
  testing.assert_trees_close(train(pad(7, 0)), first, 'padding on the left')


def test_score_of_a_response_is_that_of_its_ranking():
  """Left-padded prompts with cut responses score as the right-padded rankings learned from."""
  model = testing.make_model()
  params = testing.make_params(model)
  rng = np.random.default_rng(2)
  prompt_lengths = rng.integers(1, 7, 8)
  response_lengths = rng.integers(1, 6, 8)
  right = np.zeros((4, 2, 12), np.int32)
  segments = np.zeros_like(right)
  prompts = Prompts(
    np.zeros((8, 9), np.int32), np.zeros((8, 9), bool), np.arange(8, dtype=np.int32)
  )
  samples = Samples(
    np.zeros((8, 5), np.int32),
    np.zeros((8, 5), bool),
    np.zeros((8, 5), np.float32),
    np.ones(8, bool),
  )
  for row, (p, r) in enumerate(zip(prompt_lengths, response_lengths)):
    text = rng.integers(2, 64, p + r).astype(np.int32)
    right[row // 2, row % 2, : p + r] = text
    segments[row // 2, row % 2, : p + r] = 1
    prompts.tokens[row, 9 - p :] = text[:p]
    prompts.mask[row, 9 - p :] = True
    samples.tokens[row, :r] = text[p:]
    samples.mask[row, :r] = True
  positions = np.where(segments > 0, np.arange(12), 0)
  want = reward.last_scores(model, params, right, positions, segments)
  assert np.std(want) > 0.1
  for parts in (1, 4):
    got = reward.build_score(model, parts)(params, prompts, samples)
    np.testing.assert_allclose(got, np.ravel(want), rtol=1e-5, atol=1e-5)


def test_an_unknown_loss_is_refused():
  with pytest.raises(
    UserError,
    match="r.loss: expected one of pairwise, plackett_luce, plain_pairs, got 'hinge'",
  ):
    reward.check_options(reward.Options(loss='hinge'), 'r')


def test_demonstrations_score_0_after_the_end(context):
  made = context('reward', 'reward.data.path=', 'reward.centre_records=5')
  options = made.read_options(reward.STAGE)
  rows = sources.load_records(options.demonstrations, 'demonstration', 'train')
  rows = sources.spread_evenly(rows, 5)
  jsonl = made.workdir / 'train.jsonl'
  message = '{"role": "user", "content": "Hi"}'
  jsonl.write_text(f'{{"messages": [{message}], "responses": ["a", "b"], "ranks": [1, 2]}}\n')
  made = context('reward', f'reward.data.path={jsonl}', 'reward.centre_records=5')
  stage = reward.build(made, made.read_options(reward.STAGE))
  state = stage.init()
  before = float(state.params['score']['bias'])
  state = stage.finish(state)
  model = ModelStore(made).open('random', head=True).model
  scores = []
  for row in rows:  # each alone, without padding
    ids = made.tokenizer.prompt(row.messages) + made.tokenizer.response(row.response)
    tokens = np.array([ids])
    positions = np.arange(tokens.shape[1])[None]
    score = reward.last_scores(model, state.params, tokens, positions, np.ones_like(tokens))
    scores.append(score)
  assert abs(np.mean(scores)) < 1e-5
  assert abs(float(state.params['score']['bias']) - before) > 1e-4
  values, _ = stage.evaluate(state)
  assert values['pairs'] == 1.0 and values['accuracy'] in (0.0, 1.0)
  assert values['length_accuracy'] == 0.5


def test_rankings_that_are_all_ties(context, capsys):
  """Nothing to learn is refused; nothing to measure is said, and no accuracy is made up."""

  def build(train, held_out):
    made = context('reward', 'reward.data.path=', 'reward.centre=False')
    for split, ranks in (('train', train), ('validation', held_out)):
      row = {'prompt': 'Hi', 'responses': ['a', 'b'], 'ranks': ranks}
      (made.workdir / f'{split}.jsonl').write_text(json.dumps(row) + '\n')
    path = made.workdir / '{split}.jsonl'
    made = context('reward', f'reward.data.path={path}', 'reward.centre=False')
    return reward.build(made, made.read_options(reward.STAGE))

  with pytest.raises(UserError, match='all responses are ties, so there is nothing to learn'):
    build([1, 1], [1, 2])
  stage = build([1, 2], [1, 1])
  assert 'no held-out pair is ordered' in capsys.readouterr().out
  assert stage.evaluate(stage.init())[0] == {'pairs': 0.0}
