"""What a compiled program says, beside what it was written to do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.planning import hlo
from rlhf_jax.runtime import step as steps

DATA = Path(__file__).parent / 'data'
P = jax.sharding.PartitionSpec


def test_products_and_collectives_of_loops_count_as_often_as_they_run():
  """Five layers, each cut over eight devices along its inputs, and a loop that may end early.

  Five gathers, or one sum each, of the layers, and a gather before the loop.
  """
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('x',))

  def sharding(*names):
    return jax.NamedSharding(mesh, P(*names))

  def run_layer(x, w):
    w = jax.lax.with_sharding_constraint(w, sharding(None, None))
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), sharding('x', None)), None

  def run(x, layers):
    def more(state):
      return (state[0] < 7) & (state[1].sum() > 0)

    def step(state):
      return state[0] + 1, jnp.tanh(state[1] @ layers[0])

    x, _ = jax.lax.scan(run_layer, x, layers)
    return jax.lax.while_loop(more, step, (0, x))[1]

  shapes = (
    jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=sharding('x', None)),
    jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=sharding(None, 'x', None)),
  )
  text = jax.jit(run).lower(*shapes).compile().as_text()
  program = hlo.read_program(text, [0, 0, 0, 0, 1, 1, 1, 1])
  assert program.flops == (5 + 7) * 2 * 2 * 64 * 64  # two rows on a device
  gathers = [one for one in program.collectives if one.kind == 'all-gather']
  assert {one.group for one in gathers} == {8}
  assert all(one.across for one in program.collectives)
  assert sum(one.sent for one in gathers) == pytest.approx((5 + 1) * 64 * 64 * 4 * 7 / 8)
  assert sum(one.times for one in gathers) == 6


def test_how_a_tpu_writes_it():
  """What the text in data/tpu.hlo has.

  Heads and batches as windows, loops without a count, in steps of two, one gather in two fusions,
  a reduce-scatter as a fusion, a send between slices.
  """
  program = hlo.read_program((DATA / 'tpu.hlo').read_text(), [0, 0, 0, 0, 1, 1, 1, 1])
  heads = 2 * 4 * 8 * 32 * 64
  windows = program.flops / 6 - heads
  assert windows == 2 * (2 * 8 * 4) * 16 * 16 * 64  # each head with its own key only
  collectives = sorted(
    (one.kind, one.group, one.across, one.times, one.sent) for one in program.collectives
  )
  assert collectives == [
    ('all-gather', 4, True, 6, 6 * 16 * 64 * 2 * 3 / 4),
    ('reduce-scatter', 4, False, 1, 64 * 32 * 2 * 3 / 4),
    ('send', 2, True, 1, 4 * 64 * 2),
  ]


@pytest.mark.parametrize(
  'text, groups',
  [
    ('replica_groups={{0,2},{1,3}}, x', [[0, 2], [1, 3]]),
    ('replica_groups=[2,2]<=[4], x', [[0, 1], [2, 3]]),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x', [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
    ('source_target_pairs={{0,1},{1,0},{2,2}}, x', [[0, 1], [1, 0]]),
    ('replica_groups={}, x', [[0, 1, 2, 3]]),
  ],
)
def test_groups(text, groups):
  assert sorted(map(sorted, hlo._parse_groups(text, 4))) == sorted(map(sorted, groups))


def test_cublas_products():
  program = hlo.read_program((DATA / 'cublas.hlo').read_text())
  assert program.flops == 2 * 3 * 8 * 16 * 4


def test_a_loop_of_as_many_parts_as_there_are_counts_its_limit():
  def multiply(x, count):
    def add(number, y):
      return y @ x + number

    return steps.repeat(add, x, count, 7)

  program = jax.jit(multiply).lower(jnp.ones((16, 16)), jnp.int32(3)).compile()
  assert hlo.read_program(program.as_text()).flops == 7 * 2 * 16**3
  assert jnp.array_equal(multiply(jnp.eye(4), jnp.int32(3)), jnp.eye(4) + 3)
