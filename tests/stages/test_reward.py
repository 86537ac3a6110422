import functools
import json
import types

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
def compiled(mesh, parts, loss, likelihood):
  changes = dict(head=True, likelihood_head=True) if likelihood else {}
  definitions = testing.make_definitions(testing.make_layout(mesh), **changes)
  options = reward.Options(
    loss=loss,
    microbatches=parts,
    likelihood=likelihood,
    language_model_coefficient=0.5 * likelihood,
  )
  return definitions, training.compile_train_step(reward.train_step, definitions, options)


def train(batch, mesh='one device', parts=1, loss='pairwise', count=1, likelihood=False):
  """(parameters, metrics of each step) after some steps on one batch."""
  definitions, step = compiled(mesh, parts, loss, likelihood)
  state = testing.make_state(definitions)
  history = []
  for _ in range(count):
    state, metrics = step(state, batch)
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module', params=[False, True], ids=['plain', 'likelihood'])
def first(request):
  """The first step, and what it was made with."""
  return train(rankings(), likelihood=request.param), request.param


@pytest.mark.parametrize('loss', ['pairwise', 'plackett_luce', 'plain_pairs'])
def test_loss_falls(loss):
  _, history = train(rankings(), loss=loss, count=8)
  assert history[-1]['loss'] < 0.8 * history[0]['loss']
  assert history[-1]['accuracy'] > history[0]['accuracy']


@pytest.mark.parametrize('mesh', ['data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(first, mesh):
  want, likelihood = first
  testing.assert_trees_close(train(rankings(), mesh, 2, likelihood=likelihood), want, mesh)


def test_microbatches_padding_and_order_change_nothing(first):
  batch = rankings()
  rng = np.random.default_rng(1)
  want, likelihood = first

  def pad(left, right):
    def pad_one(x):
      return x if x.ndim == 2 else np.pad(x, ((0, 0), (0, 0), (left, right)))

    return jax.tree.map(pad_one, batch)

  rows = rng.permutation(B)
  places = rng.permutation(K)
  for what, changed, parts in [
    ('micro-batches', batch, 4),
    ('order of rows', jax.tree.map(lambda x: x[rows], batch), 1),
    ('order of places', jax.tree.map(lambda x: x[:, places], batch), 1),
    ('more padding', pad(0, 7), 1),
    ('padding on the left', pad(7, 0), 1),
  ]:
    got = train(changed, parts=parts, likelihood=likelihood)
    testing.assert_trees_close(got, want, what)


def with_likelihood(params, weights=(0.02, -0.03)):
  """Parameters whose head sees likelihoods, in another measure than it begins with."""
  return {**params, 'score': {**params['score'], 'likelihood': np.float32(weights)}}


def numpy_logprobs(model, params, batch):
  """Hidden states [B, K, T, D], and log-probabilities of the tokens behind them, by numpy."""
  rows = [x.reshape(-1, T) for x in (batch.tokens, batch.positions, batch.segment_ids)]
  hidden = np.asarray(model.apply(params, *rows)[0], np.float64).reshape(B, K, T, -1)
  logits = hidden @ np.asarray(params['embedding'], np.float64).T
  logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  behind = batch.tokens[:, :, 1:, None].astype(int)
  return hidden, np.take_along_axis(logprobs[:, :, :-1], behind, axis=-1)[..., 0]


def test_what_the_likelihood_adds_to_a_score():
  model = testing.make_model(likelihood_head=True)
  params = with_likelihood(testing.make_params(model))
  batch = rankings()
  response = reward.response_tokens(batch)
  got = reward.last_scores(
    model, params, batch.tokens, batch.positions, batch.segment_ids, response
  )
  hidden, logprobs = numpy_logprobs(model, params, batch)
  for row, place in np.ndindex(B, K):
    length, begins = batch.segment_ids[row, place].sum(), batch.begins[row, place]
    of_response = logprobs[row, place, begins - 1 : length - 1]
    last = hidden[row, place, length - 1]
    want = last @ params['score']['kernel'] + params['score']['bias']
    want += len(last) * (0.02 * np.mean(of_response) - 0.03 * np.min(of_response))
    np.testing.assert_allclose(got[row, place], want, rtol=1e-4, atol=1e-4)


def test_the_language_model_loss_is_of_the_responses_that_are_ranked_first():
  model = testing.make_model(likelihood_head=True)
  params = testing.make_params(model)
  batch = rankings()

  def total(coefficient):
    options = reward.Options(likelihood=True, language_model_coefficient=coefficient)
    return reward.loss(params, batch, model, options)

  plain, weighted = total(0.0), total(0.25)
  nll, count = weighted.means['language_model_loss']
  best = (batch.group > 0) & (batch.ranks == 1)
  assert count == best.sum() > 0
  np.testing.assert_allclose(weighted.total - plain.total, 0.25 * nll, rtol=1e-4)
  _, logprobs = numpy_logprobs(model, params, batch)
  want = 0.0
  for row, place in zip(*np.nonzero(best), strict=True):
    length, begins = batch.segment_ids[row, place].sum(), batch.begins[row, place]
    want -= np.mean(logprobs[row, place, begins - 1 : length - 1])
  np.testing.assert_allclose(nll, want, rtol=1e-4)


@pytest.mark.parametrize('likelihood', [False, True])
def test_score_of_a_response_is_that_of_its_ranking(likelihood):
  """Left-padded prompts with cut responses score as the right-padded rankings learned from."""
  model = testing.make_model(likelihood_head=likelihood)
  params = testing.make_params(model)
  if likelihood:
    params = with_likelihood(params)
  rng = np.random.default_rng(2)
  prompt_lengths = rng.integers(1, 7, 8)
  response_lengths = rng.integers(1, 6, 8)
  right = np.zeros((4, 2, 12), np.int32)
  segments = np.zeros_like(right)
  response = np.zeros(right.shape, bool)
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
    response[row // 2, row % 2, p : p + r] = True
    prompts.tokens[row, 9 - p :] = text[:p]
    prompts.mask[row, 9 - p :] = True
    samples.tokens[row, :r] = text[p:]
    samples.mask[row, :r] = True
  positions = np.where(segments > 0, np.arange(12), 0)
  want = reward.last_scores(model, params, right, positions, segments, response)
  assert np.std(want) > 0.1
  for parts, packed_rows in ((1, 0), (4, 0), (1, 2)):
    options = types.SimpleNamespace(parts=parts, packed_rows=packed_rows)
    score = reward.build_score(model, testing.make_layout(), options)
    got = score(params, prompts, samples)
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
    score = reward.last_scores(
      model, state.params, tokens, positions, np.ones_like(tokens), np.zeros(tokens.shape, bool)
    )
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
