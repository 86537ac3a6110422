import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.runtime import mesh
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import MeshOptions
from rlhf_jax.runtime.optimizers import make_optimizer, OptimizerOptions


def loss(params, batch, key):
  del key
  errors = (batch['x'] @ params['w'] + params['bias'] - batch['y']) ** 2 * batch['mask']
  return steps.Loss(
    total=jnp.sum(errors),
    weight=jnp.sum(batch['mask']),
    means={'error': jnp.sum(errors)},
    counts={'tokens': jnp.sum(batch['mask'])},
  )


def data(seed=0, n=16):
  rng = np.random.default_rng(seed)
  mask = (rng.random(n) < 0.6).astype(np.float32)  # parts of unequal weight
  x = rng.normal(size=(n, 4)).astype(np.float32)
  return {'x': x, 'y': x @ np.array([2.0, 0.0, 3.0, 1.0], np.float32), 'mask': mask}


def initial_params():
  return {'w': jnp.ones(4), 'bias': jnp.zeros(())}


def create_state(layout, optimizer, frozen=None):
  shardings = {'w': layout.sharding(('embed',)), 'bias': layout.sharding()}
  params = jax.device_put(initial_params(), shardings)
  return steps.create_train_state(params, optimizer, jax.random.key(0), layout, frozen)


def step_of(optimizer, microbatches=1):
  return functools.partial(steps.gradient_step, loss, optimizer, microbatches=microbatches)


@functools.cache
def default_step():
  """The step that most tests share, so that it is compiled once."""
  layout = mesh.make_layout()
  optimizer = make_optimizer(OptimizerOptions(), 5)
  return layout, optimizer, steps.compile_step(step_of(optimizer), layout)


def train(axes, microbatches, devices=None, count=5, **changes):
  layout = mesh.make_layout(MeshOptions(**axes), devices)
  optimizer = make_optimizer(OptimizerOptions(learning_rate=0.1, **changes), count)
  state = create_state(layout, optimizer)
  step = steps.compile_step(step_of(optimizer, microbatches), layout)
  history = []
  for n in range(count):
    state, metrics = step(state, data(n))
    history.append(jax.device_get(metrics))
  return state, history


@functools.cache
def train_plainly():
  return train({}, 1)


def test_same_numbers_for_every_mesh_and_number_of_parts():
  want, history = train({}, 1, jax.devices()[:1])
  assert history[-1]['loss'] < history[0]['loss']
  runs = {'data 8': train_plainly()}
  for axes, parts in [
    ({}, 2),
    ({'fsdp': 4}, 1),
    ({'fsdp': 2, 'tensor': 2}, 4),
    ({'data': 1, 'tensor': 8}, 2),
  ]:
    runs[f'{axes} {parts}'] = train(axes, parts)
  for run, (state, other) in runs.items():
    for a, b in zip(history, other):
      for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=f'{run} {name}')
    np.testing.assert_allclose(state.params['w'], want.params['w'], rtol=1e-5)
    assert int(state.step) == 5


def test_the_first_moment_can_be_bfloat16():
  _, expected = train_plainly()
  state, history = train({}, 1, moment_dtype='bfloat16')
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, 'mu'))}
  assert dtypes == {'bfloat16'}
  assert optax.tree.get(state.opt_state, 'nu')['w'].dtype == jnp.float32
  np.testing.assert_allclose(history[-1]['loss'], expected[-1]['loss'], rtol=0.02)


def test_first_step_is_optax():
  state, history = train({}, 2, count=1, clip_norm=0.5, weight_decay=0.1, schedule='constant')
  batch = data(0)
  start = initial_params()

  def mean(params):
    value = loss(params, batch, None)
    return value.total / value.weight

  grads = jax.grad(mean)(start)
  norm = optax.tree.norm(grads)
  np.testing.assert_allclose(history[0]['norm/gradient'], norm, rtol=1e-5)
  clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
  adam = optax.adam(0.1)
  updates, _ = adam.update(clipped, adam.init(start))
  decayed = start['w'] + updates['w'] - 0.1 * 0.1 * start['w']
  np.testing.assert_allclose(state.params['w'], decayed, rtol=1e-5)
  np.testing.assert_allclose(state.params['bias'], updates['bias'], rtol=1e-5)  # no decay


def test_a_step_is_the_same_without_jit():
  _, optimizer, step = default_step()
  one = mesh.make_layout(devices=jax.devices()[:1])
  plain, metrics = steps.gradient_step(loss, optimizer, create_state(one, optimizer), data())
  compiled, expected = step(create_state(default_step()[0], optimizer), data())
  for name in expected:
    np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(plain.params['w'], compiled.params['w'], rtol=1e-5)


def test_a_loss_that_is_not_finite_changes_nothing():
  layout, optimizer, step = default_step()
  state = create_state(layout, optimizer)
  before = jax.device_get((state.params, state.opt_state))
  batch = data()
  batch['y'][3] = np.nan
  batch['mask'][3] = 1.0
  state, metrics = step(state, batch)
  assert np.isnan(metrics['loss']) and int(state.step) == 0
  after = jax.device_get((state.params, state.opt_state))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@functools.cache
def unclipped_step():
  layout = mesh.make_layout()
  optimizer = make_optimizer(OptimizerOptions(clip_norm=0.0), 5)
  return layout, optimizer, steps.compile_step(step_of(optimizer), layout)


# The gradient's norm, too, is below and above 3e38.
@pytest.mark.parametrize('size, made', [(1e17, 1), (1e19, 0)])
def test_every_update_that_is_made_is_finite(size, made):
  layout, optimizer, step = unclipped_step()
  batch = data()
  batch['y'] = np.float32(size) * (1 + np.abs(batch['y']))
  state, metrics = step(create_state(layout, optimizer), batch)
  assert int(state.step) == made
  assert int(np.isfinite(metrics['loss'] + metrics['norm/gradient'])) == made
  leaves = jax.tree.leaves(jax.device_get((state.params, state.opt_state)))
  assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_a_batch_in_which_nothing_counts_changes_nothing_but_the_step():
  layout, optimizer, step = default_step()
  batch = {**data(), 'mask': np.zeros(16, np.float32)}
  state, metrics = step(create_state(layout, optimizer), batch)
  assert metrics['loss'] == 0 and int(state.step) == 1
  np.testing.assert_array_equal(state.params['w'], np.ones(4))


def test_nothing_compiles_twice():
  layout, optimizer, step = default_step()
  state, _ = step(create_state(layout, optimizer), data(0))
  compiled = []

  def note(name, *_, **__):
    if name.endswith('backend_compile_duration'):
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(note)
  step(state, data(1))
  assert not compiled


def tagged_step(state, batch, offset):
  """A step that shows where its arguments came from."""
  total = jnp.sum(batch) + offset + state.frozen['params']['scale']
  trained = jax.tree.map(lambda x: x + total, state.trained)
  return state.replace(step=state.step + 1, trained=trained), {'total': total}


@pytest.mark.parametrize('donate', [True, False])
def test_the_state_is_donated_but_for_what_is_frozen(donate):
  layout = mesh.make_layout(MeshOptions(fsdp=4))
  optimizer = make_optimizer(OptimizerOptions(), 5)
  frozen = {'scale': jax.device_put(jnp.float32(2.0), layout.sharding())}
  state = create_state(layout, optimizer, frozen)
  offset = jax.device_put(jnp.float32(5.0), layout.sharding())
  step = steps.compile_step(tagged_step, layout, donate=donate)
  new_state, metrics = step(state, np.ones((8, 2), np.float32), offset)
  assert metrics['total'] == 16 + 5 + 2
  assert metrics['total'].sharding.is_fully_replicated
  np.testing.assert_array_equal(new_state.trained['w'], np.full(4, 24.0))
  assert state.trained['w'].is_deleted() == donate
  assert not frozen['scale'].is_deleted() and not offset.is_deleted()
  assert new_state.frozen['params']['scale'] is frozen['scale']
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(new_state)):
    assert old.sharding == new.sharding


def test_a_step_is_lowered_for_abstract_arrays():
  layout, optimizer, step = default_step()

  def abstract(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  state = jax.tree.map(lambda x: abstract(x, x.sharding), create_state(layout, optimizer))
  rows = layout.sharding(('batch',))
  batch = jax.tree.map(lambda x: abstract(x, rows), data())
  assert 'stablehlo' in step.lower(state, batch).as_text()


def test_a_map_in_parts_keeps_the_order_of_rows():
  rows = jnp.arange(12.0).reshape(6, 2)
  whole = steps.map_in_parts(lambda x: x * 2, rows, 1)
  np.testing.assert_array_equal(steps.map_in_parts(lambda x: x * 2, rows, 3), whole)
