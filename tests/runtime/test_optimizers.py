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
