import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import optimizers
from rlhf_jax.runtime.mesh import make_layout
from rlhf_jax.runtime.optimizers import OptimizerOptions


@pytest.mark.parametrize(
  'schedule, want',
  [
    ('constant', [0.0, 0.5, 1.0, 1.0, 1.0]),
    ('linear', [0.0, 0.5, 1.0, 0.55, 0.1]),
    ('cosine', [0.0, 0.5, 1.0, 0.55, 0.1]),
  ],
)
def test_schedules(schedule, want):
  options = OptimizerOptions(learning_rate=1.0, schedule=schedule, warmup_steps=4)
  rate = optimizers.make_schedule(options, 14)
  np.testing.assert_allclose([rate(n) for n in (0, 2, 4, 9, 14)], want, atol=1e-6)


def test_a_schedule_without_warm_up_begins_at_the_peak():
  rate = optimizers.make_schedule(OptimizerOptions(learning_rate=1.0), 10)
  np.testing.assert_allclose([rate(0), rate(10)], [1.0, 0.1], atol=1e-6)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'eps': 0.0}, 'optimizer.eps: expected a number above 0, got 0.0'),
    ({'b2': 1.0}, 'b2: expected a number from 0 and below 1, got 1.0'),
    ({'b1': -0.1}, 'b1: expected .*, got -0.1'),
    ({'learning_rate': float('inf')}, 'learning_rate: expected .*, got inf'),
    ({'moment_dtype': 'int8'}, "moment_dtype: expected float32 or bfloat16, got 'int8'"),
    ({'schedule': 'step'}, "schedule: expected one of constant, linear, cosine, got 'step'"),
  ],
)
def test_settings_whose_updates_may_not_be_finite_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    optimizers.make_optimizer(OptimizerOptions(**changes), 5)


def test_moments_are_sharded_as_their_parameters_are():
  layout = make_layout()
  optimizer = optimizers.make_optimizer(OptimizerOptions(), 5)
  shapes = {'w': jax.ShapeDtypeStruct((8, 2), 'float32')}
  by_rows = layout.sharding(('batch',))
  shardings = optimizers.optimizer_shardings(optimizer, shapes, {'w': by_rows}, layout.sharding())
  leaves = jax.tree.leaves(shardings)
  assert leaves.count(by_rows) == 2  # both moments
  assert {*leaves} == {by_rows, layout.sharding()}


def test_norms_and_biases_do_not_decay():
  options = OptimizerOptions(learning_rate=0.1, weight_decay=0.5, schedule='constant')
  optimizer = optimizers.make_optimizer(options, 5)
  params = {
    'w': np.ones(2, np.float32),
    'block': {'attention_norm': np.ones(2, np.float32)},
    'score': {'bias': np.ones(2, np.float32)},
  }
  nothing = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(nothing, optimizer.init(params), params)
  moved = jax.tree.map(lambda update: bool(np.any(np.asarray(update))), updates)
  assert moved == {'w': True, 'block': {'attention_norm': False}, 'score': {'bias': False}}


MATRICES = {'query': (3, 8, 2, 3), 'output': (3, 2, 3, 8), 'down': (3, 12, 8), 'query_bias': (3, 6)}


def make_muon_update(gradients):
  options = OptimizerOptions(name='muon', learning_rate=0.1, schedule='constant', clip_norm=0.0)
  optimizer = optimizers.make_optimizer(options, 5)
  params = jax.tree.map(np.ones_like, gradients)
  return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize('name, rows', [('query', 8), ('output', 6), ('down', 12)])
def test_muon_makes_all_singular_values_of_a_matrix_nearly_equal(name, rows):
  gradient = np.random.default_rng(0).normal(size=MATRICES[name]).astype(np.float32)
  update = np.asarray(make_muon_update({'layers': {name: gradient}})['layers'][name])
  for one_gradient, one_update in zip(gradient, update, strict=True):  # of a layer
    matrix = one_update.reshape(rows, -1)
    # A step of 0.1, and entries whose root mean square is 0.2 of it.
    values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * max(matrix.shape) ** 0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vt = np.linalg.svd(one_gradient.reshape(rows, -1), full_matrices=False)
    nearest = -u @ vt  # the orthogonal matrix nearest to the step against the gradient
    assert np.sum(nearest * matrix) > 0.95 * np.linalg.norm(nearest) * np.linalg.norm(matrix)


def test_muon_leaves_what_is_no_matrix_of_a_layer_to_adam():
  rng = np.random.default_rng(1)
  gradients = {
    'embedding': rng.normal(size=(5, 8)).astype(np.float32),
    'layers': {'query_bias': rng.normal(size=(3, 6)).astype(np.float32)},
  }
  updates = make_muon_update(gradients)
  # Adam's first update is the rate against the gradient's sign.
  want = jax.tree.map(lambda gradient: -0.1 * np.sign(gradient), gradients)
  jax.tree.map(lambda found, one: np.testing.assert_allclose(found, one, rtol=1e-4), updates, want)


def test_moments_of_muon_are_sharded_as_their_parameters_are():
  layout = make_layout()
  optimizer = optimizers.make_optimizer(OptimizerOptions(name='muon'), 5)
  by_rows, by_columns = layout.sharding(('batch',)), layout.sharding((None, 'batch'))
  shapes = {
    'embedding': jax.ShapeDtypeStruct((8, 8), 'float32'),
    'layers': {'down': jax.ShapeDtypeStruct((2, 8, 8), 'float32')},
  }
  wanted = {'embedding': by_rows, 'layers': {'down': by_columns}}
  leaves = jax.tree.leaves(
    optimizers.optimizer_shardings(optimizer, shapes, wanted, layout.sharding())
  )
  assert leaves.count(by_rows) == 2  # AdamW has two moments
  assert leaves.count(by_columns) == 1  # Muon has one
