"""What hosts does in one process; runs of several are in tests/test_launch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts
from rlhf_jax.runtime.mesh import make_layout


def test_global_arrays_come_to_the_host():
  rows = np.arange(16).reshape(8, 2)
  on_host = hosts.to_host({'rows': make_layout().place(rows), 'scalar': jnp.float32(2)})
  assert type(on_host['rows']) is np.ndarray
  np.testing.assert_array_equal(on_host['rows'], rows)
  assert on_host['scalar'] == 2


def test_a_single_process_is_the_first_and_waits_for_nobody():
  assert hosts.is_first_process()
  hosts.barrier('here')
  assert hosts.gather_from_processes(3).tolist() == [3]
  assert hosts.gather_from_processes(True).dtype == np.int32


class Exited(Exception):
  pass


@pytest.fixture
def several(monkeypatch):
  """Makes it look as if there were two processes, and records the exit code."""

  def leave(code):
    raise Exited(code)

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(hosts.os, '_exit', leave)


def test_the_death_of_a_peer_ends_this_process(several, capsys):
  lost = ValueError('Gloo all-reduce failed: Connection closed by peer')
  for raised in (lost, UserError('saving failed')):
    if raised is not lost:
      raised.__cause__ = lost
    with pytest.raises(Exited) as left, hosts.exit_with_peers():
      raise raised
    assert left.value.args == (hosts.LOST,)
    assert 'another process of this run ended' in capsys.readouterr().err


def test_other_errors_pass(several, monkeypatch):
  for raised in (ValueError('shapes differ'), UserError('gloo'), KeyError('gloo')):
    with pytest.raises(type(raised)), hosts.exit_with_peers():
      raise raised
  monkeypatch.setattr(jax, 'process_count', lambda: 1)
  with pytest.raises(ValueError), hosts.exit_with_peers():
    raise ValueError('connection reset')
