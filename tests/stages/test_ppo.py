import functools
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax.data import records
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import ppo
from rlhf_jax.stages.shared import rollout as rollout_lib
from rlhf_jax.types import Prompts, Samples, Sequences

N, P, R, EOS = 32, 6, 7, 1


def settings(rate=3e-3, **changes):
  """A section that shows every term: KL, whitening, two epochs; one minibatch unless said otherwise."""
  section = ml_collections.ConfigDict({**ppo.DEFAULTS, 'minibatches': 1, **changes})
  section.optimizer.update(learning_rate=rate, schedule='constant', eps=1e-5)  # not all noise
  section.sampling.update(max_new_tokens=R, temperature=0.7)
  return section


@functools.cache
def build(tiny, mesh, **changes):
  """(layout, init, generate, update): reference seed 5, policy 0, value model 2."""
  on, section = tiny.layout(mesh), settings(**changes)
  model, optimizer = tiny.model(on), steps.make_optimizer(section.optimizer, 100)
  def init():
    both = {'policy': tiny.params(model, on), 'value': tiny.params(model, on, 2)}
    state = steps.create_train_state(both, optimizer, jax.random.key(1), on)
    return ppo.PPOState(step=state.step, trained=state.params['policy'], opt_state=state.opt_state, key=state.key,
                        value_trained=state.params['value'],
                        kl_coefficient=jax.device_put(jnp.float32(section.kl_coefficient), on.sharding()))
  generate = sampler.build_sampler(model, section.sampling, (EOS,), 0)
  update = ppo.build_update(model, model, model, optimizer, on, section)
  reference = tiny.params(model, on, 5)
  return on, init, generate, lambda state, *rest, reference=reference: update(state, reference, *rest)


def rollout(seed=0):
  """Prompts, answers of 1 to R tokens, some cut before their end, and scores: host arrays."""
  rng = np.random.default_rng(seed)
  length, answer = rng.integers(1, P + 1, N), rng.integers(1, R + 1, N)
  asked, mask = np.arange(P) >= P - length[:, None], np.arange(R) < answer[:, None]
  prompts = Prompts(np.where(asked, rng.integers(2, 64, (N, P)), 0).astype(np.int32), asked,
                    np.arange(N, dtype=np.int32))
  samples = Samples(np.where(mask, rng.integers(2, 64, (N, R)), 0).astype(np.int32), mask,
                    np.where(mask, -4.0, 0.0).astype(np.float32), rng.random(N) < 0.7)
  return prompts, samples, rng.normal(size=N).astype(np.float32)


def documents(seed=0):
  rng = np.random.default_rng(seed)
  inside = np.arange(9) < rng.integers(3, 10, (N, 1))
  return Sequences(np.where(inside, rng.integers(2, 64, (N, 9)), 0).astype(np.int32),
                   np.where(inside, np.arange(9), 0).astype(np.int32), inside.astype(np.int32),
                   (inside & (np.arange(9) > 0)).astype(np.float32))


def update(tiny, data, mesh='one device', pretraining=None, coefficient=0.05, **changes):
  """(everything that is trained, metrics) after one update from given answers."""
  on, init, _, run = build(tiny, mesh, **changes)
  prompts, samples, scores, pretraining = on.place((*data, pretraining))
  state = init()
  state = state.replace(kl_coefficient=state.kl_coefficient * coefficient / 0.05)
  state, metrics = run(state, sampler.join_sequences(prompts, samples), samples, scores, pretraining)
  return jax.device_get(((state.params, state.value_params, state.kl_coefficient), metrics))


@pytest.fixture(scope='module')
def first(tiny):
  return update(tiny, rollout())


@pytest.mark.parametrize('mesh', ['fsdp 8', 'data 4, tensor 2', 'data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(tiny, mesh):
  want = update(tiny, rollout(), pretraining=documents(), pretraining_coefficient=0.5, minibatches=2)
  got = update(tiny, rollout(), mesh, pretraining=documents(), pretraining_coefficient=0.5, minibatches=2)
  tiny.close(got, want, mesh)


def test_microbatches_padding_and_order_change_nothing(tiny, first):
  prompts, samples, scores = data = rollout()
  tiny.close(update(tiny, data, microbatches=4), first, 'micro-batches')
  order = np.random.default_rng(1).permutation(N)
  tiny.close(update(tiny, jax.tree.map(lambda x: x[order], data)), first, 'order')
  wide = lambda x, *side: x if x.ndim == 1 else np.pad(x, ((0, 0), side))
  padded = jax.tree.map(lambda x: wide(x, 3, 0), prompts), jax.tree.map(lambda x: wide(x, 0, 2), samples), scores
  tiny.close(update(tiny, padded), first, 'more padding')


def test_first_step_from_the_reference(tiny):
  """Policy = reference: KL 0, ratio 1, and the sampler's logprobs are the training forward's."""
  on, init, generate, run = build(tiny, 'one device')
  prompts, _, _ = rollout()
  state = init()
  reference = jax.tree.map(jnp.copy, state.params)
  score = lambda prompts, samples: (jnp.sum(samples.mask, axis=1).astype(jnp.float32), {})
  step = ppo.build_step(generate, score, lambda state, reference, *rest: run(state, *rest, reference=reference), on)
  state, metrics = step(state, (prompts, None), reference)
  assert abs(metrics['kl']) < 1e-5 and abs(metrics['policy/first_ratio'] - 1) < 1e-5
  assert metrics['policy/sampler_gap'] < 1e-5
  assert metrics['response/length'] == metrics['reward/score'] > 1 and int(state.step) == 1


def test_a_score_arrives_as_it_is(tiny):
  prompts, samples, _ = rollout()
  data = prompts, samples.replace(ended=np.ones(N, bool)), np.full(N, 0.75, np.float32)
  _, metrics = update(tiny, data, coefficient=0.0)
  np.testing.assert_allclose([metrics['reward/mean'], metrics['reward/score']], 0.75, rtol=1e-6)
  assert metrics['kl'] != 0


def test_the_value_after_the_end_token_is_learned_where_the_score_stands_there(tiny):
  prompts, samples, _ = rollout()
  data = prompts, samples.replace(ended=np.ones(N, bool)), np.full(N, 0.75, np.float32)
  (_, at_end, _), _ = update(tiny, data, coefficient=0.0)
  (_, after_end, _), metrics = update(tiny, data, coefficient=0.0, score_place='after_eos')
  np.testing.assert_allclose(metrics['reward/mean'], 0.75, rtol=1e-6)
  on = tiny.layout()
  sequences = sampler.join_sequences(*on.place((prompts, samples)))
  model, short = tiny.model(on), np.flatnonzero(samples.mask.sum(1) < R)
  def value_after_the_end(params):
    hidden, _ = model.apply(params, sequences.tokens, sequences.positions, sequences.segment_ids)
    last = P + samples.mask[short].sum(1) - 1
    return np.asarray(heads.scalar_scores(params, hidden))[short, last]
  before = value_after_the_end(jax.device_get(tiny.params(model, on, 2)))
  nearer = lambda params: np.mean((value_after_the_end(params) - 0.75) ** 2) - np.mean((before - 0.75) ** 2)
  assert nearer(after_end) < min(0.0, nearer(at_end))


def test_an_answer_without_an_end_scores_what_config_says(tiny):
  prompts, samples, scores = rollout()
  _, metrics = update(tiny, (prompts, samples, scores), coefficient=0.0)
  np.testing.assert_allclose(metrics['reward/mean'], np.where(samples.ended, scores, -1.0).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics['reward/score'], scores.mean(), rtol=1e-5)


def test_pretraining_term_is_its_own_mean(tiny):
  on = tiny.layout()
  model, text = tiny.model(on), documents()
  params = tiny.params(model, on)
  hidden, _ = model.apply(params, text.tokens, text.positions, text.segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], text.tokens[:, 1:])
  nll = -np.average(logprobs, weights=text.loss_mask[:, 1:])
  _, metrics = update(tiny, rollout(), pretraining=text, pretraining_coefficient=0.5, epochs=1, microbatches=4)
  np.testing.assert_allclose(metrics['pretraining/loss'], nll, rtol=1e-5)
  rest = metrics['policy/loss'] + 0.1 * metrics['value/loss']
  np.testing.assert_allclose(metrics['loss'], rest + 0.5 * nll, rtol=1e-5)


STEERED = dict(kl_target=0.1, kl_horizon=640.0)  # nats; a fifth of 32 / 640 is 1% a step


def test_coefficient_is_steered_to_the_target(tiny, first):
  assert first[1]['kl'] > 0.12
  np.testing.assert_allclose(first[0][2], 0.05, rtol=1e-6)
  (*_, coefficient), metrics = update(tiny, rollout(), **STEERED)
  np.testing.assert_allclose(coefficient, 0.05 * 1.01, rtol=1e-5)
  np.testing.assert_allclose(metrics['kl_coefficient'], 0.05, rtol=1e-6)


def test_value_loss_falls_on_the_same_answers(tiny):
  on, init, _, run = build(tiny, 'one device')
  prompts, samples, scores = on.place(rollout())
  state, losses = init(), []
  for _ in range(8):
    state, metrics = run(state, sampler.join_sequences(prompts, samples), samples, scores, None)
    losses.append(float(metrics['value/loss']))
  assert losses[-1] < 0.8 * losses[0], losses


def test_reward_rises(tiny):
  """Fifteen steps towards tokens below 32, half of what a random policy says."""
  on, init, generate, run = build(tiny, 'one device', missing_eos=False, minibatches=2, rate=1e-2)
  score = jax.jit(lambda _, samples: (
      jnp.sum(samples.mask & (samples.tokens < 32), 1) / jnp.sum(samples.mask, 1), {}))
  step = ppo.build_step(generate, score, lambda state, reference, *rest: run(state, *rest), on)
  state, scores = init(), []
  state = state.replace(kl_coefficient=0 * state.kl_coefficient)
  for n in range(15):
    state, metrics = step(state, (rollout(n)[0], None), None)
    np.testing.assert_allclose(metrics['reward/mean'], metrics['reward/score'], rtol=1e-5)  # cut answers too
    scores.append(float(metrics['reward/score']))
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.9, scores


def test_what_is_not_finite_is_never_taken_for_a_good_state(tiny):
  on, init, _, run = build(tiny, 'one device', **STEERED)
  prompts, samples, scores = rollout()
  state = init()
  before = jax.device_get((state.params, state.value_params, state.opt_state, state.kl_coefficient))
  bad = on.place((prompts, samples.replace(ended=np.ones(N, bool)), np.where(np.arange(N) == 3, np.inf, scores)))
  state, metrics = run(state, sampler.join_sequences(*bad[:2]), bad[1], bad[2], None)
  assert not np.isfinite(metrics['loss']) and int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, before,
               jax.device_get((state.params, state.value_params, state.opt_state, state.kl_coefficient)))


def test_half_a_step_is_never_taken_for_none(tiny):
  """The second minibatch is not finite: the loop must not save this state as that of the step before."""
  on, init, _, run = build(tiny, 'one device', minibatches=2, rate=1e16)
  prompts, samples, scores = on.place(rollout())
  state, metrics = run(init(), sampler.join_sequences(prompts, samples), samples, scores, None)
  assert not np.isfinite(metrics['loss']) and int(state.step) == 1


# Rewards that are programs.


@pytest.fixture
def words(monkeypatch):
  """A program that counts the words of an answer and adds the bonus of its prompt."""
  module = types.ModuleType('own_reward')
  module.words = lambda prompts, responses, records: [
      len(said.split()) + records[i].meta['bonus'] + len(prompts[i]) for i, said in enumerate(responses)]
  monkeypatch.setitem(sys.modules, 'own_reward', module)
  return 'own_reward:words'


def test_reward_that_is_a_program(words, tokenizer, tiny):
  """Three records with two answers each, read from tokens, in the order of Prompts.index; the rest is padding."""
  hi = [{'role': 'user', 'content': 'Hi'}]
  rows = [records.Prompt(str(i), '', '', hi, {'bonus': 10.0 * i}) for i in range(3)]
  answers = ['one', 'one two', 'three words here', '', 'a b c d', 'x'] + [''] * 10
  tokens, mask = np.zeros((16, 12), np.int32), np.zeros((16, 12), bool)
  for row, answer in enumerate(answers):
    ids = [*tokenizer.encode(answer), tokenizer.eos_id]
    tokens[row, :len(ids)], mask[row, :len(ids)] = ids, True
  on = tiny.layout('data 8')
  prompts = Prompts(np.zeros((8, 2), np.int32), np.ones((8, 2), bool), np.array([2, 0, 1] + [-1] * 5, np.int32))
  batch = on.place((prompts, Samples(tokens, mask, np.zeros((16, 12), np.float32), np.ones(16, bool))))
  context = types.SimpleNamespace(tokenizer=tokenizer, layout=on)
  values, failed = rollout_lib.open_score(context, words, programs=dict(workers=0))(*batch, rows)
  np.testing.assert_array_equal(values[:6], [22, 23, 4, 1, 15, 12])
  assert failed == 0


def test_critic_on_the_policys_trunk_and_a_program_as_reward(words, context, tiny):
  """value='' on eight devices, as a whole stage: two steps and an evaluation."""
  on = tiny.layout('data 2, fsdp 2, tensor 2')
  made = context('ppo', f'ppo.reward={words}', 'ppo.reward_functions.workers=0', 'ppo.num_samples=2', 'ppo.minibatches=1',
                 'model.kv_heads=2', on=on)
  import own_reward
  own_reward.words = lambda prompts, responses, records: [0.5] * len(responses)
  stage = ppo.build(made)
  state = stage.init()
  assert set(state.value_params) == {'score'} and not np.any(state.value_params['score']['kernel'])
  for n in range(2):
    state, metrics = stage.step(state, next(stage.batches))
  assert int(state.step) == 2 and np.any(state.value_params['score']['kernel'])
  assert metrics['reward/score'] == 0.5 and metrics['reward/failed'] == 0
  values, shown = stage.evaluate(state)
  assert values['reward/score'] == 0.5 and len(shown) == 4 and shown[0]['score'] == 0.5
