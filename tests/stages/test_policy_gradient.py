import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import policy_gradient
from rlhf_jax.types import Prompts, Samples

G, K, P, R, EOS = 8, 4, 6, 7, 1  # groups, answers in each, tokens of a prompt and of an answer
N = G * K
METHODS = {
    'rloo': dict(advantage='leave_one_out', loss='reinforce', reduce='sequence_sum'),
    'reinforce': dict(advantage='batch_baseline', loss='reinforce', reduce='sequence_sum'),
    'reinforce++': dict(advantage='batch_baseline', whiten_advantages=True, kl_place='tokens'),
    'grpo': dict(advantage='standardised', reduce='sequence_mean', kl_place='loss'),
    'dr_grpo': dict(advantage='above_mean', reduce='constant'),
    'dapo': dict(advantage='standardised', clip_high=0.28, overlong_buffer=3, kl_coefficient=0.0),
    'gspo': dict(advantage='standardised', loss='gspo', reduce='sequence_mean', clip_low=3e-4, clip_high=4e-4),
    'cispo': dict(advantage='standardised', loss='cispo')}


def settings(rate=3e-3, **changes):
  section = ml_collections.ConfigDict({**policy_gradient.DEFAULTS, 'batch_size': G, 'num_samples': K, **changes})
  section.optimizer.update(learning_rate=rate, schedule='constant', eps=1e-5)  # not all noise
  section.sampling.update(max_new_tokens=R, temperature=0.7)
  policy_gradient.check(section, 'config.rl')
  return section


@functools.cache
def build(tiny, mesh, **changes):
  on, section = tiny.layout(mesh), settings(**changes)
  model, optimizer = tiny.model(on), steps.make_optimizer(section.optimizer, 100)
  def init():
    state = steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
    older = jax.tree.map(jnp.copy, state.params) if section.sampler_every > 1 else {}
    return policy_gradient.SamplerState(**vars(state), sampler_trained=older)
  generate = sampler.build_sampler(model, section.sampling, (EOS,), 0, K)
  return on, section, init, generate, policy_gradient.build_update(model, model, optimizer, on, section)


def rollout(seed=0):
  """Prompts, answers of 1 to R tokens, some cut before their end, and scores: host arrays."""
  rng = np.random.default_rng(seed)
  length, answer = rng.integers(1, P + 1, G), rng.integers(1, R + 1, N)
  asked, mask = np.arange(P) >= P - length[:, None], np.arange(R) < answer[:, None]
  prompts = Prompts(np.where(asked, rng.integers(2, 64, (G, P)), 0).astype(np.int32), asked, np.arange(G, dtype=np.int32))
  samples = Samples(np.where(mask, rng.integers(2, 64, (N, R)), 0).astype(np.int32), mask,
                    np.where(mask, -4.0, 0.0).astype(np.float32), rng.random(N) < 0.7)
  return prompts, samples, rng.normal(size=N).astype(np.float32)


def update(tiny, data, mesh='one device', **changes):
  on, _, init, _, run = build(tiny, mesh, **changes)
  prompts, samples, scores = on.place(data)
  state, metrics = run(init(), tiny.params(tiny.model(on), on, 5), sampler.join_sequences(prompts, samples), samples, scores)
  return jax.device_get((state.params, metrics))


@pytest.mark.parametrize('method', METHODS)
def test_micro_batches_and_meshes_change_nothing(tiny, method):
  first = update(tiny, rollout(), **METHODS[method])
  tiny.close(update(tiny, rollout(), microbatches=4, **METHODS[method]), first, 'micro-batches')
  assert first[1]['policy/first_ratio'] == pytest.approx(1, abs=1e-5)
  if method in ('grpo', 'rloo'):
    tiny.close(update(tiny, rollout(), 'data 2, fsdp 2, tensor 2', **METHODS[method]), first, 'mesh')


def test_order_of_groups_and_of_answers_and_a_constant_reward_change_nothing(tiny):
  prompts, samples, scores = rollout()
  first = update(tiny, (prompts, samples, scores), missing_eos=False)
  groups, within = np.random.default_rng(1).permutation(G), np.random.default_rng(2).permutation(K)
  rows = (groups[:, None] * K + within).ravel()
  moved = jax.tree.map(lambda x: x[groups], prompts), jax.tree.map(lambda x: x[rows], samples), scores[rows] + 8
  params, metrics = update(tiny, moved, missing_eos=False)
  tiny.close(params, first[0], 'order and constant', 3e-5)
  np.testing.assert_allclose(metrics['reward/score'], first[1]['reward/score'] + 8, rtol=1e-5)


@pytest.mark.parametrize('method', METHODS)
def test_reward_rises(tiny, method):
  """Twelve steps towards tokens below 32, half of what a random policy says."""
  on, section, init, generate, run = build(
      tiny, 'one device', rate=1e-2, missing_eos=False, **{**METHODS[method], 'kl_coefficient': 0.0})
  score = jax.jit(lambda _, samples: (
      jnp.sum(samples.mask & (samples.tokens < 32), 1) / jnp.sum(samples.mask, 1), {}))
  step, reference = policy_gradient.build_step(generate, score, run, on, section), tiny.params(tiny.model(on), on)
  state, scores = init(), []
  for n in range(12):
    state, metrics = step(state, rollout(n)[0], reference)
    scores.append(float(metrics['reward/score']))
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.85, scores


def test_prompts_that_teach_nothing_are_replaced(tiny):
  """Of 24 prompts those with an odd index score the same whatever is said."""
  on, section, init, generate, run = build(tiny, 'one device', resampling=2, missing_eos=False)
  asked = jax.tree.map(lambda *x: np.concatenate(x), *(rollout(n)[0] for n in range(3)))
  asked = asked.replace(index=np.arange(3 * G, dtype=np.int32))
  def score(prompts, samples):
    odd = jnp.repeat(prompts.index % 2, K)
    return jnp.where(odd == 1, 0.5, jnp.arange(odd.shape[0], dtype=jnp.float32)), {'reward/failed': 0.0}
  reference = tiny.params(tiny.model(on), on)
  _, metrics = policy_gradient.build_step(generate, score, run, on, section)(init(), asked, reference)
  assert metrics['response/extra'] == G * K and metrics['reward/equal_groups'] == 0
  never = lambda prompts, samples: (jnp.zeros(N), {})
  _, metrics = policy_gradient.build_step(generate, never, run, on, section)(init(), asked, reference)
  assert metrics['response/extra'] == 2 * G * K and metrics['reward/equal_groups'] == 1


def test_answers_that_all_lack_an_end_token_are_equal_whatever_the_reward_says(tiny):
  on, section, init, _, run = build(tiny, 'one device', resampling=1)
  asked, samples, scores = rollout()
  twice = jax.tree.map(lambda x: np.concatenate([x, x]), asked)
  given = []
  def generate(params, prompts, key):
    given.append(samples.replace(ended=np.full(N, bool(given))))  # the first N answers have no end, the others do
    return on.place(given[-1])
  step = policy_gradient.build_step(generate, lambda prompts, samples: (on.place(scores), {}), run, on, section)
  _, metrics = step(init(), twice, tiny.params(tiny.model(on), on))
  assert len(given) == 2 and metrics['response/extra'] == N and metrics['reward/equal_groups'] == 0
  assert metrics['response/eos_rate'] == 1


def test_an_older_sampler_is_renewed_and_weighed(tiny):
  on, section, init, generate, run = build(tiny, 'one device', sampler_every=2, weight_limit=2.0, rate=1e-2)
  score = jax.jit(lambda _, samples: (jnp.sum(samples.mask, 1).astype(jnp.float32), {}))
  step, reference = policy_gradient.build_step(generate, score, run, on, section), tiny.params(tiny.model(on), on)
  same = lambda state: all(np.array_equal(*pair) for pair in zip(
      jax.tree.leaves(jax.device_get(state.params)), jax.tree.leaves(jax.device_get(state.sampler_params))))
  state, first = step(init(), rollout(0)[0], reference)
  assert not same(state) and first['weight/mean'] == pytest.approx(1, abs=1e-4)
  state, second = step(state, rollout(1)[0], reference)
  assert same(state) and second['policy/sampler_gap'] > 1e-3 and abs(second['weight/mean'] - 1) > 1e-4


@pytest.mark.parametrize('changes,message', [
    (dict(advantage='grpo'), "config.rl.advantage: expected one of leave_one_out, .*, got 'grpo'"),
    (dict(overlong_buffer=8), 'config.rl.overlong_buffer: expected at most sampling.max_new_tokens = 7, got 8'),
    (dict(sampler_every=0), 'sampler_every from 1'), (dict(num_samples=1), 'config.rl.num_samples: expected 2 or more'),
    (dict(num_samples=1, advantage='batch_baseline', resampling=1), 'without resampling one will do')])
def test_wrong_settings(changes, message):
  with pytest.raises(UserError, match=message):
    settings(**changes)
