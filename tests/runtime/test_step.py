import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import mesh
from rlhf_jax.runtime import step as steps


def config(**changes):
  return ml_collections.ConfigDict({**steps.OPTIMIZER, **changes})


def loss(params, batch, key):
  del key
  error = (batch['x'] @ params['w'] + params['bias'] - batch['y']) ** 2 * batch['mask']
  return steps.Loss(jnp.sum(error), jnp.sum(batch['mask']), {'error': jnp.sum(error)}, {'tokens': jnp.sum(batch['mask'])})


def data(seed=0, n=16):
  rng = np.random.default_rng(seed)
  mask = (rng.random(n) < 0.6).astype(np.float32)  # parts of unequal weight
  x = rng.normal(size=(n, 4)).astype(np.float32)
  return {'x': x, 'y': x @ np.array([2.0, 0.0, 3.0, 1.0], np.float32), 'mask': mask}


def state_of(layout, optimizer):
  params = jax.device_put({'w': jnp.ones(4), 'bias': jnp.zeros(())}, {
      'w': layout.sharding(('embed',)), 'bias': layout.sharding()})
  return steps.create_train_state(params, optimizer, jax.random.key(0), layout)


def train(axes, microbatches, devices=None, count=5, **changes):
  layout = mesh.make_layout({**mesh.DEFAULTS, **axes}, devices)
  optimizer = steps.make_optimizer(config(learning_rate=0.1, **changes), count)
  state, step = state_of(layout, optimizer), steps.build(loss, optimizer, layout, microbatches)
  history = []
  for n in range(count):
    state, metrics = step(state, data(n))
    history.append(jax.device_get(metrics))
  return state, history


def test_same_numbers_for_every_mesh_and_number_of_parts():
  want, history = train({}, 1, jax.devices()[:1])
  assert history[-1]['loss'] < history[0]['loss']
  for axes, parts in [({}, 1), ({}, 2), (dict(fsdp=4), 1), (dict(fsdp=2, tensor=2), 4), (dict(data=1, tensor=8), 2)]:
    got, other = train(axes, parts)
    for a, b in zip(history, other):
      for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=f'{axes} {parts} {name}')
    np.testing.assert_allclose(got.params['w'], want.params['w'], rtol=1e-5)
    assert int(got.step) == 5


def test_the_first_moment_can_be_bfloat16():
  want, (state, history) = train({}, 1), train({}, 1, moment_dtype='bfloat16')
  kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, 'mu'))}
  assert kinds == {'bfloat16'} and optax.tree.get(state.opt_state, 'nu')['w'].dtype == jnp.float32
  np.testing.assert_allclose(history[-1]['loss'], want[1][-1]['loss'], rtol=0.02)
  with pytest.raises(UserError, match="moment_dtype: expected float32 or bfloat16, got 'int8'"):
    train({}, 1, moment_dtype='int8')


def test_first_step_is_optax():
  state, history = train({}, 2, count=1, clip_norm=0.5, weight_decay=0.1, schedule='constant')
  batch, start = data(0), {'w': jnp.ones(4), 'bias': jnp.zeros(())}
  mean = lambda params: (lambda v: v.total / v.weight)(loss(params, batch, None))
  grads = jax.grad(mean)(start)
  norm = optax.tree.norm(grads)
  np.testing.assert_allclose(history[0]['norm/gradient'], norm, rtol=1e-5)
  clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
  adam = optax.adam(0.1)
  updates, _ = adam.update(clipped, adam.init(start))
  np.testing.assert_allclose(state.params['w'], start['w'] + updates['w'] - 0.1 * 0.1 * start['w'], rtol=1e-5)
  np.testing.assert_allclose(state.params['bias'], updates['bias'], rtol=1e-5)  # biases do not decay


def test_a_loss_that_is_not_finite_changes_nothing():
  layout = mesh.make_layout(mesh.DEFAULTS)
  optimizer = steps.make_optimizer(config(), 5)
  state, step = state_of(layout, optimizer), steps.build(loss, optimizer, layout)
  before = jax.device_get((state.params, state.opt_state))
  batch = data()
  batch['y'][3], batch['mask'][3] = np.nan, 1.0
  state, metrics = step(state, batch)
  assert np.isnan(metrics['loss']) and int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))


@pytest.mark.parametrize('size, made', [(1e17, 1), (1e19, 0)])  # the gradient's norm, too, is below and above 3e38
def test_every_update_that_is_made_is_finite(size, made):
  layout = mesh.make_layout(mesh.DEFAULTS)
  optimizer = steps.make_optimizer(config(clip_norm=0.0), 5)
  state, step = state_of(layout, optimizer), steps.build(loss, optimizer, layout)
  batch = data()
  batch['y'] = np.float32(size) * (1 + np.abs(batch['y']))
  state, metrics = step(state, batch)
  assert int(state.step) == made == int(np.isfinite(metrics['loss'] + metrics['norm/gradient']))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get((state.params, state.opt_state))))


@pytest.mark.parametrize('change', [dict(eps=0.0), dict(b2=1.0), dict(b1=-0.1), dict(learning_rate=float('inf'))])
def test_an_optimizer_whose_updates_may_not_be_finite(change):
  with pytest.raises(UserError, match='expected a finite learning_rate, eps above 0, b1 and b2 from 0 and below 1; got'):
    steps.make_optimizer(config(**change), 5)


def test_a_batch_in_which_nothing_counts_changes_nothing_but_the_step():
  layout = mesh.make_layout(mesh.DEFAULTS)
  optimizer = steps.make_optimizer(config(), 5)
  state, step = state_of(layout, optimizer), steps.build(loss, optimizer, layout)
  state, metrics = step(state, {**data(), 'mask': np.zeros(16, np.float32)})
  assert metrics['loss'] == 0 and int(state.step) == 1
  np.testing.assert_array_equal(state.params['w'], np.ones(4))


def test_nothing_compiles_twice():
  layout = mesh.make_layout(mesh.DEFAULTS)
  optimizer = steps.make_optimizer(config(), 5)
  state, step = state_of(layout, optimizer), steps.build(loss, optimizer, layout)
  state, _ = step(state, data(0))
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, *_, **__: compiled.append(name) if name.endswith('backend_compile_duration') else None)
  step(state, data(1))
  assert not compiled


@pytest.mark.parametrize('schedule,want', [
    ('constant', [0.0, 0.5, 1.0, 1.0, 1.0]), ('linear', [0.0, 0.5, 1.0, 0.55, 0.1]), ('cosine', [0.0, 0.5, 1.0, 0.55, 0.1])])
def test_schedules(schedule, want):
  rate = steps.make_schedule(config(learning_rate=1.0, schedule=schedule, warmup_steps=4), 14)
  np.testing.assert_allclose([rate(n) for n in (0, 2, 4, 9, 14)], want, atol=1e-6)
