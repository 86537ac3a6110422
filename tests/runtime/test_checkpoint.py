"""Saved states come back bit for bit, on any mesh; damage is found, said, and survived."""

import asyncio
import logging
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
from orbax.checkpoint._src import asyncio_utils
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import checkpoint
from rlhf_jax.types import TrainState


def _mesh(devices):
  return jax.make_mesh(
    (devices,), ('fsdp',), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
  )


def _state(devices=8, rows=1024, dtype=jnp.float32, key=None, bias='bias'):
  mesh = _mesh(devices)

  def place(x):
    spec = {0: PartitionSpec(), 2: PartitionSpec('fsdp')}.get(x.ndim, PartitionSpec(None))
    return jax.device_put(x, NamedSharding(mesh, spec))

  params = {
    'layer': {'kernel': jax.random.normal(jax.random.key(7), (rows, 16), dtype)},
    bias: jnp.arange(16, dtype=jnp.bfloat16),
  }
  opt_state = jax.tree.map(
    lambda x: x + jax.random.normal(jax.random.key(1), x.shape).astype(x.dtype),
    optax.adam(1e-3).init(params),
  )
  state = TrainState(jnp.int32(3), params, opt_state, jax.random.key(5) if key is None else key)
  return jax.tree.map(place, state)


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _bytes(tree):
  leaves = []
  for x in jax.tree.leaves(tree):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    leaves.append(np.asarray(x).tobytes())
  return leaves


def _saved(directory, *steps):
  """Checkpoints with one state for each step; the states differ."""
  saver = checkpoint.Checkpoints(directory, keep=3)
  for step in steps:
    state = _state()
    saver.save(step, state.replace(step=state.step + step), {'index': step}, {'seed': 1})
  saver.wait()
  return saver


def _biggest(directory):
  files = (
    path
    for path in Path(directory).rglob('*')
    if path.is_file() and path.name != 'commit_success.txt'
  )
  return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize('devices', [8, 4, 1])
@pytest.mark.parametrize('key', [jax.random.key(9), jax.random.PRNGKey(9)], ids=['typed', 'raw'])
def test_restores_bit_for_bit_onto_any_mesh(tmp_path, devices, key):
  state = _state(key=key)
  with_signs = state.replace(
    trained={**state.params, 'odd': jnp.array([np.nan, -0.0, 1e-40, np.inf])}
  )
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(3, with_signs, {'index': 12, 'epochs': (1, 2)}, {'config': 'abc'})
  target = _state(devices, key=key)
  odd = jax.device_put(jnp.zeros(4), NamedSharding(_mesh(devices), PartitionSpec()))
  target = target.replace(trained={**target.params, 'odd': odd})
  saver.wait()
  restored, data, meta = saver.restore(_abstract(target))
  assert _bytes(restored) == _bytes(with_signs)
  assert restored.params['layer']['kernel'].sharding == target.params['layer']['kernel'].sharding
  assert (data, meta) == ({'index': 12, 'epochs': [1, 2]}, {'config': 'abc'})
  assert jax.tree.structure(restored) == jax.tree.structure(target)
  saver.close()
  params = checkpoint.restore_params(tmp_path, _abstract(target.params))
  assert _bytes(params) == _bytes(with_signs.params)


def test_saves_what_was_there_when_the_buffers_are_donated_at_once(tmp_path):
  state = _state(rows=1 << 16)
  expected = _bytes(state)
  saver = checkpoint.Checkpoints(tmp_path)
  saver.save(1, state, {}, {})
  spoil = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s.replace(key=None)), donate_argnums=0)
  target = _abstract(state)
  jax.block_until_ready(spoil(state))
  saver.wait()
  assert _bytes(saver.restore(target)[0]) == expected
  saver.close()


def test_keeps_the_newest(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path, keep=2)
  assert saver.latest_step() is None and saver.restore(_abstract(_state())) is None
  for step in (1, 2, 5):
    saver.save(step, _state(), {}, {})
  saver.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '5']


def _invert(path):
  raw = bytearray(path.read_bytes())
  middle = len(raw) // 2
  raw[middle : middle + 64] = bytes(255 - byte for byte in raw[middle : middle + 64])
  path.write_bytes(raw)


def _truncate(path):
  os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize('damage', [_invert, _truncate, Path.unlink])
@pytest.mark.parametrize('item', ['params', 'rest', 'meta', 'data'])
def test_damage_is_named_and_the_step_before_taken(tmp_path, caplog, capfd, damage, item):
  saver = _saved(tmp_path, 10, 20)
  damage(_biggest(tmp_path / '20' / item))
  with caplog.at_level(logging.WARNING):
    state, data, _ = saver.restore(_abstract(_state()))
  assert int(state.step) == 13 and data == {'index': 10}
  [record] = caplog.records
  message = record.getMessage()
  assert message.startswith(f'{tmp_path}/20: damaged checkpoint (')
  assert message.endswith('; falling back to step 10')
  assert '\n' not in message
  if item == 'params':
    assert 'layer.kernel' in message
  # the run can write step 20 again, and what was damaged is kept aside
  saver.save(20, _state(), {'index': 21}, {})
  saver.close()
  assert checkpoint.Checkpoints(tmp_path).restore(_abstract(_state()))[1] == {'index': 21}
  assert (tmp_path / 'damaged-20').is_dir()
  assert 'Traceback' not in capfd.readouterr().err


def test_every_flipped_byte_of_the_parameters_is_found(tmp_path):
  _saved(tmp_path, 10, 20).close()
  good = checkpoint.restore_params(tmp_path, _abstract(_state().params))
  file = _biggest(tmp_path / '20' / 'params')
  raw = file.read_bytes()
  for at in range(0, len(raw), len(raw) // 12):
    file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert _bytes(checkpoint.restore_params(tmp_path, _abstract(_state().params))) == _bytes(good)


def test_fingerprints():
  """Independent reference in numpy; equal for any sharding, different for any swap or flip."""
  values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
  bits = values.view(np.uint32).ravel().astype(object)
  first = sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32

  def prints(x, devices=1):
    array = jax.device_put(x, NamedSharding(_mesh(devices), PartitionSpec('fsdp')))
    return checkpoint._describe_arrays({'x': array})['x']['fingerprint']

  assert prints(values)[0] == first
  assert prints(values) == prints(values, 8)
  swapped = values.copy()
  swapped[[2, 5]] = swapped[[5, 2]]
  signs = values.copy()
  signs[0, 0], signs[1, 0] = -signs[0, 0], -signs[1, 0]
  for other in (swapped, signs, values.T.copy().reshape(8, 6)):
    assert prints(values) != prints(other)
    assert prints(values)[1] != prints(other)[1]
  assert prints(np.zeros((8, 2))) != prints(-np.zeros((8, 2)))


def test_no_good_checkpoint_left(tmp_path):
  saver = _saved(tmp_path, 10)
  _invert(_biggest(tmp_path / '10' / 'params'))
  with pytest.raises(
    UserError, match=r'/10: damaged checkpoint \(.*layer.kernel.*no good one is left'
  ):
    saver.restore(_abstract(_state()))
  with pytest.raises(UserError, match='no good one is left'):
    checkpoint.restore_params(tmp_path, _abstract(_state().params))
  saver.close()
  assert (tmp_path / '10').is_dir()


@pytest.mark.parametrize(
  'other, message',
  [
    (dict(rows=512), r'layer.kernel expected float32\[512,16\], found float32\[1024,16\]'),
    (
      dict(dtype=jnp.bfloat16),
      r'layer.kernel expected bfloat16\[1024,16\], found float32\[1024,16\]',
    ),
    (
      dict(bias='offset'),
      r'bias expected nothing, found bfloat16\[16\]; offset expected bfloat16\[16\], found nothing',
    ),
  ],
)
def test_another_model_is_an_error_and_no_damage(tmp_path, caplog, other, message):
  saver = _saved(tmp_path, 10, 20)
  with pytest.raises(UserError, match=r'/20: params of another shape: ' + message):
    saver.restore(_abstract(_state(**other)))
  with pytest.raises(UserError, match=message):
    checkpoint.restore_params(tmp_path, _abstract(_state(**other).params))
  saver.close()
  assert not caplog.records


def test_another_optimizer_is_an_error(tmp_path):
  saver = _saved(tmp_path, 10)
  state = _state()
  message = r'/10: rest of another shape: opt_state.0.count expected nothing, found int32\[\]'
  with pytest.raises(UserError, match=message):
    saver.restore(_abstract(state.replace(opt_state=optax.sgd(1.0).init(state.params))))
  saver.close()


def test_missing_checkpoints_are_one_line_errors(tmp_path):
  with pytest.raises(UserError, match='no such directory'):
    checkpoint.restore_params(tmp_path / 'none', {})
  with pytest.raises(UserError, match='holds no finished checkpoint'):
    checkpoint.restore_params(tmp_path, _abstract(_state().params))
  with pytest.raises(UserError, match='keep: expected at least 1'):
    checkpoint.Checkpoints(tmp_path, keep=0)


def test_host_array_in_the_state_is_refused(tmp_path):
  saver = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(TypeError, match='step: expected a global jax.Array, got int'):
    saver.save(1, _state().replace(step=1), {}, {})
  saver.close()


_FULL = """
import resource, sys
sys.path.insert(0, 'tests/runtime')
import test_checkpoint as t
saver = t.checkpoint.Checkpoints(sys.argv[1])
state = t._state()
saver.save(1, state, {}, {})
saver.wait()
many = {str(number): state.trained['layer']['kernel'] for number in range(60)}
state = state.replace(trained=many)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
for call in (lambda: (saver.save(2, state, {}, {}), saver.wait()), saver.latest_step):
  try:
    print(call())
  except t.UserError as error:
    print(error)
"""


def test_a_write_that_fails_is_said_and_the_step_before_stays(tmp_path):
  root = Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', _FULL, str(tmp_path)],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'PYTHONPATH': str(root)},
  )
  first, second = done.stdout.splitlines()
  assert (
    first.startswith(f'{tmp_path}: saving the checkpoint of step 2 failed: ')
    and 'File too large' in first
  )
  assert second == '1', done.stderr
  assert 'Traceback' not in done.stderr  # of threads that were writing other arrays
  assert checkpoint.Checkpoints(tmp_path).latest_step() == 1


def test_what_fails_waits_for_what_it_has_begun():
  ended = []

  async def write():
    await asyncio.sleep(0.05)
    ended.append(True)

  async def write_in_parts():
    await asyncio.sleep(0.01)
    asyncio.ensure_future(write())
    raise OSError('full too')

  async def fail():
    asyncio.ensure_future(write())
    asyncio.ensure_future(write_in_parts())
    raise OSError('full')

  with pytest.raises(OSError, match='full$'):
    asyncio_utils.run_sync(fail())  # as orbax calls it
  assert ended == [True, True]
