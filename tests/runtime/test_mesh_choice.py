import jax
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runtime.mesh_choice import choose_mesh, device_memory, MeshNeed


def billions(count, rows=64, heads=8):
  """PPO with four models of so many parameters."""
  return MeshNeed(
    parameters=int(count * 1e9),
    state=int(count * 40e9),
    decoded=int(count * 4e9),
    rows=rows,
    width=4096,
    heads=heads,
  )


@pytest.mark.parametrize(
  'need, devices, local, memory, sizes',  # data, fsdp, tensor, rollout_tensor
  [
    (billions(0.1), 8, 8, 80e9, (8, 1, 1, 0)),  # 4 GB
    (billions(1, rows=256), 256, 4, 16e9, (32, 8, 1, 1)),  # 5 GB each, decoding 4
    (billions(8, rows=256), 64, 4, 95e9, (8, 8, 1, 2)),  # 40 GB each, decoding 16
    (billions(1, rows=4), 8, 8, 80e9, (4, 1, 2, 0)),
    (billions(70, rows=256), 128, 4, 95e9, (2, 64, 1, 8)),  # 44 GB, decoding 35
    (billions(70, rows=256), 256, 4, 16e9, (1, 256, 1, 0)),  # 280 GB do not fit in 8
  ],
)
def test_auto_takes_the_fewest_parts_that_fit(need, devices, local, memory, sizes):
  chosen, _ = choose_mesh(need, devices, local, memory)
  assert chosen == dict(zip(('data', 'fsdp', 'tensor', 'rollout_tensor'), sizes))


def test_auto_says_why():
  _, why = choose_mesh(billions(8, rows=8), 8, 8, 80 * 2**30)
  assert why == (
    'mesh: data 1 × fsdp 8 × tensor 1, rollout_tensor 2: 8,000,000,000 parameters with all '
    'models and optimizers take 298 GiB, 37.3 GiB on each device of 80 GiB; decoding needs 14.9 '
    'GiB of parameters on each'
  )
  _, why = choose_mesh(billions(1e-4), 8, 8, 80 * 2**30)
  assert '100,000 parameters with all models and optimizers take 3.81 MiB' in why
  assert 'expect it to run out of memory' in choose_mesh(billions(70), 8, 8, 80e9)[1]
  message = '3 rows and 2 heads do not divide over 8 devices; change batch_size'
  with pytest.raises(UserError, match=message):
    choose_mesh(billions(1, rows=3, heads=2), 8, 8, 80e9)


def test_a_cpu_device_has_its_share_of_the_machine():
  memory = device_memory(jax.devices()[0])
  assert 2**20 < memory * jax.local_device_count() < 2**50
