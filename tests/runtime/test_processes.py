"""What several processes do together, in two real ones; whole runs are in tests/test_launch.py."""

from pathlib import Path
import shutil
import socket
import subprocess
import sys

import pytest

from rlhf_jax.errors import UserError

if __name__ != '__main__':

  @pytest.mark.slow
  def test_two_processes(tmp_path):
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, port, str(tmp_path)]
    started = [subprocess.Popen([*command, str(number)]) for number in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]


def square(x):
  if x == 2500:
    raise UserError(f'{x} is too large')
  return x * x


def check_spread(hosts):
  """Every item is computed once, and an error of one process comes to all."""
  assert [*hosts.spread(square, range(2100))] == [x * x for x in range(2100)]
  seen = []
  with pytest.raises(UserError, match='2500 is too large'):
    seen.extend(hosts.spread(square, range(3000)))


def check_checkpoints(hosts, folder, number):
  """Each process writes its parts of the arrays; all parts together are the checkpoint."""
  import jax
  from jax.sharding import NamedSharding, PartitionSpec
  import numpy as np

  from rlhf_jax.runtime import checkpoint, mesh
  from rlhf_jax.types import TrainState

  layout = mesh.make_layout(mesh.MeshOptions(data=2, fsdp=2))

  def put(x, *axes):
    sharding = NamedSharding(layout.mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(x.shape, sharding, lambda place: x[place])

  rng = np.random.default_rng(0)
  params = {
    'sharded': put(rng.normal(size=(8, 6)).astype(np.float32), 'fsdp'),
    'whole': put(rng.normal(size=7).astype(np.float32)),
  }
  key = jax.jit(lambda: jax.random.key(3), out_shardings=put(np.int32(0)).sharding)()
  state = TrainState(put(np.int32(3)), params, {'mean': params['sharded']}, key)
  folders = [folder / 'of 0', folder / 'of 1']
  saver = checkpoint.Checkpoints(folders[number], keep=1, own_directories=True)
  for step in (1, 2):
    saver.save(step, state, {'index': step}, {'seed': 1})
  saver.close()
  hosts.barrier('saved')
  if number == 0:
    parts = [{p.relative_to(own) for p in own.rglob('*') if p.is_file()} for own in folders]
    only = [{str(path) for path in parts[n] - parts[1 - n]} for n in range(2)]
    assert any('params/sharded' in path for path in only[0])
    assert any('params/sharded' in path for path in only[1])
    for path in parts[1] - parts[0]:
      shutil.copy(folders[1] / path, folders[0] / path)
    shutil.rmtree(folders[1])
    shutil.copytree(folders[0], folders[1])
  hosts.barrier('brought together')

  def abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  saver = checkpoint.Checkpoints(folders[number], keep=1, own_directories=True)
  restored, data, meta = saver.restore(jax.tree.map(abstract, state))
  assert (data, meta) == ({'index': 2}, {'seed': 1})
  for got, want in ((restored.trained, params), (restored.opt_state, state.opt_state)):
    assert checkpoint.fingerprint(got) == checkpoint.fingerprint(want)
  saver.close()


if __name__ == '__main__':
  from rlhf_jax.runtime import hosts

  address, place, own = f'127.0.0.1:{sys.argv[1]}', Path(sys.argv[2]), int(sys.argv[3])
  import jax

  jax.config.update('jax_num_cpu_devices', 2)
  hosts.initialize(address, '2', str(own))
  check_spread(hosts)
  check_checkpoints(hosts, place, own)
