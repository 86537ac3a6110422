"""Chooses a mesh from the sizes of the models, for the mesh preset `auto`.

The state is sharded into the fewest parts of which each fits in half of a
device's memory; the other half is for activations, caches and decoding. The
devices that this leaves go to the axis `data`.
"""

import dataclasses
import os

import jax

from rlhf_jax.errors import UserError

MIB = 2**20
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MeshNeed:
  """What the models and batches of a run require of a mesh.

  Attributes:
    parameters: the number of parameters of the largest model.
    state: bytes of all models of the largest stage, with gradients and optimizer.
    decoded: bytes of the largest model in the dtype it computes in; 0 = decoding must
      shard it as training does.
    rows: the greatest common divisor of the numbers of rows that the stages
      compute at once.
    width: that of the models' widths; the size of the axis `fsdp` must divide it.
    heads: that of the models' heads and other sizes that the axis `tensor`
      shards; the size of `tensor` must divide it.
  """

  parameters: int
  state: int
  decoded: int
  rows: int
  width: int
  heads: int


def choose_mesh(
  need: MeshNeed,
  devices: int,
  local: int,
  memory: float,
) -> tuple[dict[str, int], str]:
  """Chooses the axis sizes of a mesh from what a run needs.

  `tensor` is above 1 only if the rows do not divide over the devices, and does
  not span processes. Decoding shards parameters over the fewest devices of which
  each needs at most a quarter of its memory for them; if there are too few, over
  as many as possible.

  Args:
    need: what the run needs.
    devices: the number of devices of all processes.
    local: the number of devices of one process.
    memory: bytes of one device.

  Returns:
    The sizes {data, fsdp, tensor, rollout_tensor}, and one line that gives the
    reasons.

  Raises:
    UserError: the rows do not divide over the devices, not even if heads are sharded.
  """
  # In this order, as each size depends on those before it.
  tensor = _choose_tensor(need, devices, local)
  fsdp = _choose_fsdp(need, devices // tensor, tensor, memory)
  rollout_tensor = _choose_rollout_tensor(need, fsdp, tensor, memory)
  sizes = {
    'data': devices // (fsdp * tensor),
    'fsdp': fsdp,
    'tensor': tensor,
    'rollout_tensor': rollout_tensor,
  }
  return sizes, _explain(need, sizes, devices, memory)


def device_memory(device: jax.Device) -> float:
  """Returns the bytes of a device's memory; for a CPU device its share of the machine's."""
  limit = None
  if device.platform != 'cpu':
    limit = (device.memory_stats() or {}).get('bytes_limit')
  if limit:
    return limit
  machine = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return machine / jax.local_device_count()


def _choose_tensor(need: MeshNeed, devices: int, local: int) -> int:
  """Returns the smallest size of `tensor` with which rows divide over the other devices."""
  for tensor in _divisors(local):  # within a process, where the network is fast
    if need.heads % tensor or devices % tensor:
      continue
    if need.rows % (devices // tensor) == 0:
      return tensor
  raise UserError(
    f'config.mesh.preset: auto finds no mesh: {need.rows} rows and {need.heads} heads do not '
    f'divide over {devices} devices; change batch_size, minibatches or microbatches'
  )


def _choose_fsdp(
  need: MeshNeed,
  devices: int,
  tensor: int,
  memory: float,
) -> int:
  """Returns the smallest size of `fsdp` with which the state fits, or the largest there is."""
  candidates = [size for size in _divisors(devices) if need.width % size == 0]
  for fsdp in candidates:
    if need.state / (fsdp * tensor) <= memory / 2:
      return fsdp
  return candidates[-1]  # it may not fit, of which the explanation warns


def _choose_rollout_tensor(
  need: MeshNeed,
  fsdp: int,
  tensor: int,
  memory: float,
) -> int:
  """Returns over how many devices decoding shards parameters; 0 = as training does."""
  if fsdp == 1 or not need.decoded:
    return 0
  state_share = need.state / (fsdp * tensor)
  candidates = []
  for ways in _divisors(fsdp * tensor):
    divides = ways % tensor == 0 and need.heads % ways == 0
    # The state keeps its memory while responses are decoded.
    if divides and need.decoded / ways + state_share <= 0.9 * memory:
      candidates.append(ways)
  for ways in candidates:
    if need.decoded / ways <= memory / 4:
      return ways
  return max(candidates, default=0)


def _explain(
  need: MeshNeed,
  sizes: dict[str, int],
  devices: int,
  memory: float,
) -> str:
  """Returns one line: the mesh and why it was chosen."""
  share = need.state / (sizes['fsdp'] * sizes['tensor'])
  reasons = [
    f'{need.parameters:,} parameters with all models and optimizers take '
    f'{_size(need.state)}, {_size(share)} on each device of {_size(memory)}'
  ]
  if share > memory / 2:
    reasons.append('this leaves less than half of it free: expect it to run out of memory')
  if sizes['tensor'] > 1:
    reasons.append(
      f'{need.rows} rows at once do not divide over {devices} devices, so heads are sharded too'
    )
  mesh = ' × '.join(f'{name} {sizes[name]}' for name in ('data', 'fsdp', 'tensor'))
  ways = sizes['rollout_tensor']
  if ways:
    mesh += f', rollout_tensor {ways}'
    reasons.append(f'decoding needs {_size(need.decoded / ways)} of parameters on each')
  return f'mesh: {mesh}: {"; ".join(reasons)}'


def _size(count: float) -> str:
  """Formats a number of bytes."""
  if count < 0.1 * GIB:
    return f'{count / MIB:.3g} MiB'
  return f'{count / GIB:.3g} GiB'


def _divisors(number: int) -> list[int]:
  """Returns the divisors of a number in ascending order."""
  return [size for size in range(1, number + 1) if number % size == 0]
