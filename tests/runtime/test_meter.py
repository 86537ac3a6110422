import time

import pytest

from rlhf_jax.runtime import meter as meters
from rlhf_jax.runtime.meter import Meter


@pytest.fixture
def slow_machine(monkeypatch):
  """A machine of 1000 FLOP/s."""
  monkeypatch.setattr(meters, 'product_speed', lambda dtype: 1000.0)


def by_length(tokens):
  """FLOPs for each token of a text of so many."""
  return 2 + tokens


def test_a_step_of_one_phase(slow_machine):
  meter = Meter(places=100, texts=10, flops={'update': by_length}, dtype='float32')
  assert meter.measure_step(80, 2.0) == {
    'padding_share': pytest.approx(0.2),
    'time/mfu_update': pytest.approx(10 * 80 / 2 / 1000),
  }
  shared = meter.measure_step(80, 2.0, shared=0.25)  # the update computes 60 of the 80 tokens
  assert shared['time/mfu_update'] == pytest.approx(10 * 60 / 2 / 1000)


def test_a_step_of_several_phases(slow_machine):
  meter = Meter(100, 50, {'rollout': float, 'update': by_length}, 'float32')
  respond = meter.clock.timed('rollout', time.sleep)
  respond(0.02)
  respond(0.03)  # as `resampling` does
  metrics = meter.measure_step(100, 1.0)
  assert metrics['padding_share'] == 0
  assert 0.05 <= metrics['time/rollout'] < 0.5
  assert metrics['time/rollout_share'] == metrics['time/rollout']
  assert metrics['time/update'] == pytest.approx(1 - metrics['time/rollout'])
  assert metrics['time/mfu_rollout'] == pytest.approx(0.2 / metrics['time/rollout'])
  # The next step begins anew.
  assert 'time/rollout' not in meter.measure_step(100, 1.0)


def test_the_speed_of_a_product_is_measured_once():
  speed = meters.product_speed('float32')
  assert 1e8 < speed < 1e16 and meters.product_speed('float32') == speed
