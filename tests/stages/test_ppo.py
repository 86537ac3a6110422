import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import heads
from rlhf_jax.rewards.functions import RewardFunctionOptions
from rlhf_jax.stages import ppo, sft
from rlhf_jax.stages.shared import rollout as rollout_lib
from rlhf_jax.stages.shared import scores as scores_lib
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.stages.shared.rollout import RolloutParts
from rlhf_jax.types import Prompts, Samples, Sequences

N, P, R = 32, 6, 7
SAMPLING = SamplingOptions(max_new_tokens=R, temperature=0.7)
STEERED = {'kl_target': 0.1, 'kl_horizon': 640.0}  # nats; a fifth of 32 / 640 is 1% a step


def make_options(**changes):
  """Options that show every term: KL, whitening, two epochs; one minibatch unless changed."""
  return ppo.Options(**{'minibatches': 1, 'sampling': SAMPLING, **changes})


@functools.cache
def compiled(mesh='one device', rate=3e-3, **changes):
  definitions = testing.make_ppo_definitions(testing.make_layout(mesh), rate)
  options = make_options(**changes)
  step = training.compile_train_step(ppo.train_step, definitions, options)
  reference = testing.make_params(definitions.model, definitions.layout, seed=5)
  return definitions, options, step, reference


def rollout(seed=0):
  """Prompts, responses of 1 to R tokens, some cut before their end, and scores."""
  scores = np.random.default_rng(seed).normal(size=N).astype(np.float32)
  return testing.make_prompts(N, P, seed), testing.make_samples(N, R, seed + 1), scores


def documents(seed=0):
  rng = np.random.default_rng(seed)
  inside = np.arange(9) < rng.integers(3, 10, (N, 1))
  return Sequences(
    tokens=np.where(inside, rng.integers(2, 64, (N, 9)), 0).astype(np.int32),
    positions=np.where(inside, np.arange(9), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    loss_mask=(inside & (np.arange(9) > 0)).astype(np.float32),
  )


def update(data, mesh='one device', pretraining=None, coefficient=0.05, **changes):
  """(everything that is trained, metrics) after one update from given responses."""
  definitions, options, step, reference = compiled(mesh, **changes)
  state = testing.make_ppo_state(
    definitions, dataclasses.replace(options, kl_coefficient=coefficient)
  )
  scored = testing.score_samples(*definitions.layout.place((*data, pretraining)))
  state, metrics = step(state, scored, reference)
  return jax.device_get(((state.params, state.value_params, state.kl_coefficient), metrics))


def below_32(prompts, samples):
  """The share of tokens below 32, half of what a random policy says."""
  good = jnp.sum(samples.mask & (samples.tokens < 32), 1)
  return good / jnp.sum(samples.mask, 1), {}


def make_iterate(score, **changes):
  """iterate(state, host prompts) with a reward, and the first state."""
  definitions, options, step, reference = compiled(**changes)
  generate = sampler.build_sampler(definitions.model, SAMPLING, (testing.EOS_ID,), testing.PAD_ID)
  parts = RolloutParts(definitions, None, generate, step, None, None)

  def iterate(state, prompts, reference=reference):
    return ppo.iterate(state, (prompts, None), parts, jax.jit(score), reference, definitions.layout)

  return iterate, testing.make_ppo_state(definitions, options)


@pytest.fixture(scope='module')
def first():
  return update(rollout())


@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param('fsdp 8', marks=pytest.mark.slow),
    pytest.param('data 4, tensor 2', marks=pytest.mark.slow),
    pytest.param('data 2, context 4', marks=pytest.mark.slow),
    'data 2, fsdp 2, tensor 2',
  ],
)
def test_same_numbers_on_every_mesh(mesh):
  how = {'pretraining': documents(), 'pretraining_coefficient': 0.5, 'minibatches': 2}
  want = update(rollout(), **how)
  testing.assert_trees_close(update(rollout(), mesh, **how), want, mesh)


def test_microbatches_padding_and_order_change_nothing(first):
  prompts, samples, scores = data = rollout()
  testing.assert_trees_close(update(data, microbatches=4), first, 'micro-batches')
  order = np.random.default_rng(1).permutation(N)
  testing.assert_trees_close(update(jax.tree.map(lambda x: x[order], data)), first, 'order')

  def widen(x, *side):
    return x if x.ndim == 1 else np.pad(x, ((0, 0), side))

  wider_prompts = jax.tree.map(lambda x: widen(x, 3, 0), prompts)
  wider_samples = jax.tree.map(lambda x: widen(x, 0, 2), samples)
  padded = (wider_prompts, wider_samples, scores)
  testing.assert_trees_close(update(padded), first, 'more padding')


def test_first_step_from_the_reference():
  """Policy = reference: KL 0, ratio 1, and the sampler's logprobs are the training forward's."""

  def count(prompts, samples):
    return jnp.sum(samples.mask, axis=1).astype(jnp.float32), {}

  iterate, state = make_iterate(count)
  reference = jax.tree.map(jnp.copy, state.params)
  state, metrics = iterate(state, rollout()[0], reference)
  assert abs(metrics['kl']) < 1e-5 and abs(metrics['policy/first_ratio'] - 1) < 1e-5
  assert metrics['policy/sampler_gap'] < 1e-5
  assert metrics['response/length'] == metrics['reward/score'] > 1 and int(state.step) == 1


def test_a_score_reaches_the_metrics_unchanged():
  prompts, samples, _ = rollout()
  data = (prompts, samples.replace(ended=np.ones(N, bool)), np.full(N, 0.75, np.float32))
  _, metrics = update(data, coefficient=0.0)
  np.testing.assert_allclose([metrics['reward/mean'], metrics['reward/score']], 0.75, rtol=1e-6)
  assert metrics['kl'] != 0


def test_the_value_after_the_end_token_is_learned_where_the_score_stands_there():
  prompts, samples, _ = rollout()
  data = (prompts, samples.replace(ended=np.ones(N, bool)), np.full(N, 0.75, np.float32))
  (_, at_end, _), _ = update(data, coefficient=0.0)
  (_, after_end, _), metrics = update(data, coefficient=0.0, score_place='after_eos')
  np.testing.assert_allclose(metrics['reward/mean'], 0.75, rtol=1e-6)
  model = testing.make_model()
  sequences = sampler.join_sequences(prompts, samples)
  short = np.flatnonzero(samples.mask.sum(1) < R)
  last = P + samples.mask[short].sum(1) - 1

  @jax.jit
  def all_values(params):
    inputs = (sequences.tokens, sequences.positions, sequences.segment_ids)
    hidden, _ = model.apply(params, *inputs)
    return heads.scalar_scores(params, hidden)

  def error(params):
    return np.mean((np.asarray(all_values(params))[short, last] - 0.75) ** 2)

  before = error(jax.device_get(testing.make_params(model, seed=2)))
  assert error(after_end) - before < min(0.0, error(at_end) - before)


def test_a_response_without_an_end_scores_what_config_says():
  prompts, samples, scores = rollout()
  _, metrics = update((prompts, samples, scores), coefficient=0.0)
  want = np.where(samples.ended, scores, -1.0).mean()
  np.testing.assert_allclose(metrics['reward/mean'], want, rtol=1e-5)
  np.testing.assert_allclose(metrics['reward/score'], scores.mean(), rtol=1e-5)


def test_a_single_update_needs_no_forward_pass_before_it():
  """One update by `update_once` is that of `update_in_minibatches`, in one part or in four."""
  how = {'pretraining': documents(), 'pretraining_coefficient': 0.5, 'epochs': 1, **STEERED}
  once = update(rollout(), **how)
  assert once[1]['policy/first_ratio'] == 1
  testing.assert_trees_close(once, update(rollout(), microbatches=4, **how), 'micro-batches')


@pytest.mark.slow
def test_exact_numerics_take_the_samplers_logprobs_and_measure_their_gap(monkeypatch):
  """The step of honest log-probabilities is the one that computes them; others are seen."""
  config = dataclasses.replace(testing.MODEL_CONFIG, numerics='exact')
  monkeypatch.setattr(testing, 'MODEL_CONFIG', config)
  definitions = testing.make_ppo_definitions(testing.make_layout(), 3e-3)
  prompts, samples, scores = rollout()
  model, params = definitions.model, testing.make_params(definitions.model)
  sequences = sampler.join_sequences(prompts, samples)
  responses = (model, params, sequences, R, SAMPLING.temperature)
  honest = jax.jit(lambda: rollout_lib.forward_responses(*responses).logprobs)()
  honest = np.where(samples.mask, honest, 0.0)

  @functools.cache
  def prepare(sampler_every):
    how = dict(epochs=1, minibatches=2, microbatches=2, weight_limit=0.0)
    options = make_options(**how, sampler_every=sampler_every)
    return options, training.compile_train_step(ppo.train_step, definitions, options)

  def step(logprobs, sampler_every=1):
    options, made = prepare(sampler_every)
    scored = testing.score_samples(prompts, samples.replace(logprobs=logprobs), scores)
    reference = testing.make_params(model, seed=5)
    state, metrics = made(testing.make_ppo_state(definitions, options), scored, reference)
    return jax.device_get((state.params, metrics))

  got, metrics = step(honest)
  want, computed = step(honest, sampler_every=2)
  testing.assert_trees_close(got, want, 'parameters', 1e-5)
  for name in ('kl', 'loss', 'policy/first_ratio'):
    np.testing.assert_allclose(metrics[name], computed[name], rtol=1e-5)
  assert metrics.keys() == computed.keys() and metrics['policy/sampler_gap'] < 1e-6
  _, metrics = step(np.where(samples.mask, honest - 0.25, 0.0))
  gaps = [metrics['policy/sampler_gap'], metrics['policy/sampler_gap_mean']]
  np.testing.assert_allclose(gaps, 0.25, rtol=1e-5)


@pytest.mark.slow  # tests/stages/test_absolute.py has the update with this term
def test_pretraining_term_is_its_own_mean():
  model = testing.make_model()
  text = documents()
  params = testing.make_params(model)
  hidden, _ = model.apply(params, text.tokens, text.positions, text.segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], text.tokens[:, 1:])
  nll = -np.average(logprobs, weights=text.loss_mask[:, 1:])
  _, metrics = update(
    rollout(), pretraining=text, pretraining_coefficient=0.5, epochs=1, microbatches=4
  )
  np.testing.assert_allclose(metrics['pretraining/loss'], nll, rtol=1e-5)
  rest = metrics['policy/loss'] + 0.1 * metrics['value/loss']
  np.testing.assert_allclose(metrics['loss'], rest + 0.5 * nll, rtol=1e-5)


def test_coefficient_is_steered_to_the_target(first):
  assert first[1]['kl'] > 0.12
  np.testing.assert_allclose(first[0][2], 0.05, rtol=1e-6)
  (*_, coefficient), metrics = update(rollout(), **STEERED)
  np.testing.assert_allclose(coefficient, 0.05 * 1.01, rtol=1e-5)
  np.testing.assert_allclose(metrics['kl_coefficient'], 0.05, rtol=1e-6)


def test_an_older_sampler_is_renewed_and_weighed():
  """With sampler_every=2 the second step's responses are those of the first policy."""

  def count(prompts, samples):
    return jnp.sum(samples.mask, 1).astype(jnp.float32), {}

  def is_current(state):
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.sampler_params), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)

  iterate, state = make_iterate(count, sampler_every=2, rate=1e-2)
  state, first = iterate(state, rollout(0)[0])
  assert not is_current(state) and first['weight/mean'] == pytest.approx(1, abs=1e-4)
  state, second = iterate(state, rollout(1)[0])
  assert is_current(state) and second['policy/sampler_gap'] > 1e-3
  assert abs(second['weight/mean'] - 1) > 1e-4 and second['weight/effective_share'] < 0.9999


def test_value_loss_falls_on_the_same_responses():
  definitions, options, step, reference = compiled()
  scored = testing.score_samples(*definitions.layout.place(rollout()))
  state = testing.make_ppo_state(definitions, options)
  losses = []
  for _ in range(8):
    state, metrics = step(state, scored, reference)
    losses.append(float(metrics['value/loss']))
  assert losses[-1] < 0.8 * losses[0], losses


def test_reward_rises():
  """Fifteen steps towards tokens below 32."""
  iterate, state = make_iterate(below_32, missing_eos=False, minibatches=2, rate=1e-2)
  state = state.replace(kl_coefficient=0 * state.kl_coefficient)
  scores = []
  for n in range(15):
    state, metrics = iterate(state, rollout(n)[0])
    # Responses that were cut score as they are, too.
    np.testing.assert_allclose(metrics['reward/mean'], metrics['reward/score'], rtol=1e-5)
    scores.append(float(metrics['reward/score']))
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.9, scores


def test_what_is_not_finite_is_never_taken_for_a_good_state():
  definitions, options, step, reference = compiled(**STEERED)
  prompts, samples, scores = rollout()

  def everything(state):
    return jax.device_get((state.params, state.value_params, state.opt_state, state.kl_coefficient))

  state = testing.make_ppo_state(definitions, options)
  before = everything(state)
  ended = samples.replace(ended=np.ones(N, bool))
  bad = (prompts, ended, np.where(np.arange(N) == 3, np.inf, scores))
  scored = testing.score_samples(*definitions.layout.place(bad))
  state, metrics = step(state, scored, reference)
  assert not np.isfinite(metrics['loss']) and int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, before, everything(state))


def test_a_step_with_one_skipped_minibatch_still_counts_as_a_step():
  """The second minibatch is not finite: this state must not be saved as that of the step before."""
  definitions, options, step, reference = compiled(minibatches=2, rate=1e16)
  scored = testing.score_samples(*definitions.layout.place(rollout()))
  state, metrics = step(testing.make_ppo_state(definitions, options), scored, reference)
  assert not np.isfinite(metrics['loss']) and int(state.step) == 1


# Rewards that are functions.


@pytest.fixture
def words(monkeypatch):
  """A reward function that counts the words of a response and adds the bonus of its prompt."""

  def count(prompts, responses, records):
    return [
      len(text.split()) + records[i].meta['bonus'] + len(prompts[i])
      for i, text in enumerate(responses)
    ]

  module = types.ModuleType('own_reward')
  module.words = count
  monkeypatch.setitem(sys.modules, 'own_reward', module)
  return 'own_reward:words'


def test_reward_that_is_a_function(words, tokenizer):
  """Three records with two responses each, read from tokens, in the order of Prompts.index."""
  hi = [{'role': 'user', 'content': 'Hi'}]
  rows = [records.Prompt(str(i), '', '', hi, {'bonus': 10.0 * i}) for i in range(3)]
  texts = ['one', 'one two', 'three words here', '', 'a b c d', 'x'] + [''] * 10
  tokens = np.zeros((16, 12), np.int32)
  mask = np.zeros((16, 12), bool)
  for row, text in enumerate(texts):
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    tokens[row, : len(ids)] = ids
    mask[row, : len(ids)] = True
  layout = testing.make_layout('data 8')
  index = np.array([2, 0, 1] + [-1] * 5, np.int32)  # the rest pads the batch
  prompts = Prompts(np.zeros((8, 2), np.int32), np.ones((8, 2), bool), index)
  samples = Samples(tokens, mask, np.zeros((16, 12), np.float32), np.ones(16, bool))
  context = types.SimpleNamespace(tokenizer=tokenizer, layout=layout, section={}, config=None)
  options = ppo.Options(reward_functions=RewardFunctionOptions(workers=0))
  score = scores_lib.open_score(context, ModelStore(context), words, options)
  values, failed = score(*layout.place((prompts, samples)), rows)
  np.testing.assert_array_equal(values[:6], [22, 23, 4, 1, 15, 12])
  assert failed == 0


def test_critic_on_the_policys_trunk_and_a_function_as_reward(words, context, monkeypatch):
  """value='' on eight devices, as a whole stage: two steps and an evaluation."""
  made = context(
    'ppo',
    f'ppo.reward={words}',
    'ppo.reward_functions.workers=0',
    'ppo.num_samples=2',
    'ppo.minibatches=1',
    'model.kv_heads=2',
    layout=testing.make_layout('data 2, fsdp 2, tensor 2'),
  )

  def half(prompts, responses, records):
    return [0.5] * len(responses)

  monkeypatch.setattr(sys.modules['own_reward'], 'words', half)
  stage = ppo.build(made, made.read_options(ppo.STAGE))
  state = stage.init()
  assert set(state.value_params) == {'score'}
  assert not np.any(state.value_params['score']['kernel'])
  for _ in range(2):
    state, metrics = stage.step(state, next(stage.batches))
  assert int(state.step) == 2 and np.any(state.value_params['score']['kernel'])
  assert metrics['reward/score'] == 0.5 and metrics['reward/failed'] == 0
  values, shown = stage.evaluate(state)
  assert values['reward/score'] == 0.5 and len(shown) == 4 and shown[0]['score'] == 0.5


def test_demonstrations_are_mixed_in_as_sft_reads_them(words, context):
  how = (
    f'ppo.reward={words}',
    'ppo.reward_functions.workers=0',
    'ppo.pretraining_coefficient=0.5',
    'ppo.pretraining_kind=demonstration',
    'ppo.pretraining_max_length=64',
  )
  made = context('ppo', *how)
  _, texts = next(ppo.build(made, made.read_options(ppo.STAGE)).batches)
  own = context('sft', 'sft.max_length=64', 'sft.data.count=0')
  jax.tree.map(
    np.testing.assert_array_equal, texts, next(sft.build(own, own.read_options(sft.STAGE)).batches)
  )
  assert 0 < texts.loss_mask.sum() < 0.8 * (texts.segment_ids > 0).sum()


def test_texts_of_an_unknown_kind_are_refused():
  with pytest.raises(UserError, match='pretraining_kind: expected document or demonstration'):
    ppo.check_options(make_options(pretraining_kind='ranking'), 'config.ppo')
