import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.stages import policy_gradient, ppo
from rlhf_jax.stages.shared import off_policy, training
from rlhf_jax.stages.shared.rollout import RolloutParts

G, K, P, R = 8, 4, 6, 7  # groups, responses in each, tokens of a prompt and of a response
N = G * K
SAMPLING = SamplingOptions(max_new_tokens=R, temperature=0.7)
METHODS = {
  'rloo': dict(advantage='leave_one_out', loss='reinforce', reduce='sequence_sum'),
  'reinforce': dict(advantage='batch_baseline', loss='reinforce', reduce='sequence_sum'),
  'reinforce++': dict(advantage='batch_baseline', whiten_advantages=True, kl_place='tokens'),
  'grpo': dict(advantage='standardised', reduce='sequence_mean', kl_place='loss'),
  'dr_grpo': dict(advantage='above_mean', reduce='constant'),
  'dapo': dict(advantage='standardised', clip_high=0.28, overlong_buffer=3, kl_coefficient=0.0),
  'gspo': dict(
    advantage='standardised',
    loss='gspo',
    reduce='sequence_mean',
    clip_low=3e-4,
    clip_high=4e-4,
  ),
  'cispo': dict(advantage='standardised', loss='cispo'),
}


def some(*names):
  """All methods, of which the others than these are slow tests."""
  slow = pytest.mark.slow
  return [name if name in names else pytest.param(name, marks=slow) for name in METHODS]


def make_options(**changes):
  values = {'batch_size': G, 'num_samples': K, 'sampling': SAMPLING, **changes}
  options = policy_gradient.Options(**values)
  policy_gradient.check_options(options, 'config.rl')
  return options


@functools.cache
def compiled(mesh='one device', rate=3e-3, **changes):
  definitions = testing.make_rollout_definitions(testing.make_layout(mesh), rate)
  options = make_options(**changes)
  step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  return definitions, options, step


@functools.cache
def compiled_sampler():
  return sampler.build_sampler(testing.make_model(), SAMPLING, (testing.EOS_ID,), testing.PAD_ID, K)


def make_state(definitions, options):
  state = testing.make_state(definitions)
  older = {}
  if options.sampler_every > 1:
    older = jax.tree.map(jnp.copy, state.trained)
  return off_policy.SamplerState(**vars(state), sampler_trained=older)


def rollout(seed=0):
  """Prompts, responses of 1 to R tokens, some cut before their end, and scores."""
  scores = np.random.default_rng(seed).normal(size=N).astype(np.float32)
  return testing.make_prompts(G, P, seed), testing.make_samples(N, R, seed + 1), scores


def update(data, mesh='one device', **changes):
  definitions, options, step = compiled(mesh, **changes)
  reference = testing.make_params(definitions.model, definitions.layout, seed=5)
  scored = testing.score_samples(*definitions.layout.place(data))
  state, metrics = step(make_state(definitions, options), scored, reference)
  return jax.device_get((state.params, metrics))


def make_iterate(score, generate=None, **changes):
  """iterate(state, host prompts) with a reward, and the first state."""
  definitions, options, step = compiled(**changes)
  parts = RolloutParts(definitions, None, generate or compiled_sampler(), step, None, None)
  reference = testing.make_params(definitions.model, definitions.layout)

  def iterate(state, prompts):
    return policy_gradient.iterate(
      state, prompts, parts, score, reference, definitions.layout, options
    )

  return iterate, make_state(definitions, options)


@jax.jit
def below_32(prompts, samples):
  """The share of tokens below 32, half of what a random policy says."""
  good = jnp.sum(samples.mask & (samples.tokens < 32), 1)
  return good / jnp.sum(samples.mask, 1), {}


@pytest.mark.parametrize('method', some('grpo', 'gspo'))
def test_micro_batches_and_meshes_change_nothing(method):
  first = update(rollout(), **METHODS[method])
  cut = update(rollout(), microbatches=4, **METHODS[method])
  testing.assert_trees_close(cut, first, 'micro-batches')
  assert first[1]['policy/first_ratio'] == pytest.approx(1, abs=1e-5)
  if method == 'grpo':
    meshed = update(rollout(), 'data 2, fsdp 2, tensor 2', **METHODS[method])
    testing.assert_trees_close(meshed, first, 'mesh')


def test_without_kl_no_reference_is_kept(context):
  """The update is that of a reference whose KL has the weight 0."""
  dapo = METHODS['dapo']
  with_reference, metrics = update(rollout(), **dapo)
  definitions, options, _ = compiled(**dapo)
  assert 'kl' in metrics
  alone = dataclasses.replace(definitions, reference_model=None)
  step = training.compile_train_step(policy_gradient.train_step, alone, options)
  scored = testing.score_samples(*definitions.layout.place(rollout()))
  state, metrics = step(make_state(definitions, options), scored, None)
  testing.assert_trees_close(state.params, with_reference, tolerance=1e-6)
  assert 'kl' not in metrics

  made = context('grpo', 'grpo.kl_coefficient=0.0', 'grpo.kl_place=reward', experiment='grpo')
  parts = policy_gradient.define(made, made.read_options(policy_gradient.STAGE))
  assert parts.definitions.reference_model is None and parts.read_reference() is None
  made = context('ppo', 'ppo.kl_coefficient=0.0', 'ppo.reference=sft')
  parts = ppo.define(made, made.read_options(ppo.STAGE))
  assert parts.definitions.reference_model is None and parts.read_reference() is None


def test_order_of_groups_and_of_responses_and_a_constant_reward_change_nothing():
  prompts, samples, scores = rollout()
  first = update((prompts, samples, scores), missing_eos=False)
  groups = np.random.default_rng(1).permutation(G)
  within = np.random.default_rng(2).permutation(K)
  rows = (groups[:, None] * K + within).ravel()
  moved = (
    jax.tree.map(lambda x: x[groups], prompts),
    jax.tree.map(lambda x: x[rows], samples),
    scores[rows] + 8,
  )
  params, metrics = update(moved, missing_eos=False)
  testing.assert_trees_close(params, first[0], 'order and constant', 3e-5)
  want = first[1]['reward/score'] + 8
  np.testing.assert_allclose(metrics['reward/score'], want, rtol=1e-5)


@pytest.mark.parametrize('method', some('grpo'))
def test_reward_rises(method):
  """Twelve steps towards tokens below 32."""
  changes = {**METHODS[method], 'kl_coefficient': 0.0}
  iterate, state = make_iterate(below_32, rate=1e-2, missing_eos=False, **changes)
  scores = []
  for n in range(12):
    state, metrics = iterate(state, rollout(n)[0])
    scores.append(float(metrics['reward/score']))
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.85, scores


def test_prompts_that_teach_nothing_are_replaced():
  """Of 24 prompts those with an odd index score the same whatever is said."""

  def uneven(prompts, samples):
    odd = jnp.repeat(prompts.index % 2, K)
    different = jnp.arange(odd.shape[0], dtype=jnp.float32)
    return jnp.where(odd == 1, 0.5, different), {'reward/failed': 0.0}

  def never(prompts, samples):
    return jnp.zeros(N), {}

  asked = jax.tree.map(lambda *x: np.concatenate(x), *(rollout(n)[0] for n in range(3)))
  asked = asked.replace(index=np.arange(3 * G, dtype=np.int32))
  changes = {'resampling': 2, 'missing_eos': False}
  iterate, state = make_iterate(uneven, **changes)
  _, metrics = iterate(state, asked)
  assert metrics['response/extra'] == G * K and metrics['reward/equal_groups'] == 0
  iterate, state = make_iterate(never, **changes)
  _, metrics = iterate(state, asked)
  assert metrics['response/extra'] == 2 * G * K and metrics['reward/equal_groups'] == 1


def test_responses_that_all_lack_an_end_token_are_equal_whatever_the_reward_says():
  layout = testing.make_layout()
  asked, samples, scores = rollout()
  twice = jax.tree.map(lambda x: np.concatenate([x, x]), asked)
  calls = []

  def generate(params, prompts, key):
    # The first N responses have no end, the others do.
    calls.append(samples.replace(ended=np.full(N, bool(calls))))
    return layout.place(calls[-1])

  def score(prompts, samples):
    return layout.place(scores), {}

  iterate, state = make_iterate(score, generate, resampling=1)
  _, metrics = iterate(state, twice)
  assert len(calls) == 2 and metrics['response/extra'] == N
  assert metrics['reward/equal_groups'] == 0 and metrics['response/eos_rate'] == 1


def test_an_older_sampler_is_renewed_and_weighed():
  def count(prompts, samples):
    return jnp.sum(samples.mask, 1).astype(jnp.float32), {}

  def is_current(state):
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.sampler_params))
    return all(np.array_equal(a, b) for a, b in leaves)

  iterate, state = make_iterate(count, sampler_every=2, weight_limit=2.0, rate=1e-2)
  state, first = iterate(state, rollout(0)[0])
  assert not is_current(state) and first['weight/mean'] == pytest.approx(1, abs=1e-4)
  state, second = iterate(state, rollout(1)[0])
  assert is_current(state)
  assert second['policy/sampler_gap'] > 1e-3 and abs(second['weight/mean'] - 1) > 1e-4


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      dict(advantage='grpo'),
      "config.rl.advantage: expected one of leave_one_out, .*, got 'grpo'",
    ),
    (
      dict(overlong_buffer=8),
      'config.rl.overlong_buffer: expected at most sampling.max_new_tokens = 7, got 8',
    ),
    (dict(weight_rule='clip'), "weight_rule: expected one of truncate, mask, got 'clip'"),
    (dict(weight_rule='mask', weight_limit=1.0), 'weight_limit: expected a number above 1'),
    (dict(num_samples=1), 'config.rl.num_samples: expected 2 or more'),
    (
      dict(num_samples=1, advantage='batch_baseline', resampling=1),
      'without resampling one will do',
    ),
  ],
)
def test_wrong_options(changes, message):
  with pytest.raises(UserError, match=message):
    make_options(**changes)
