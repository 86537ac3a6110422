"""Checks that devices which hold copies of the same values agree.

A program treats copies as equal, whatever is in them: if one device or process
once computes something else, it goes on with it unnoticed, and the checkpoint
holds whichever copy is written.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from rlhf_jax.errors import UserError

_ODD = 0x9E3779B1  # the factor of a place in the sum


def check_replicas(arrays: Mapping[str, jax.Array], where: str) -> None:
  """Compares the copies of every array on all devices of its mesh.

  All processes must call it. It reads each array once on the devices and sends
  four bytes for each array and device.

  Args:
    arrays: global arrays by name, on one mesh or on one device.
    where: what an error message begins with.

  Raises:
    UserError: two copies differ; names the array, the devices and their processes. It is raised
      in all processes.
  """
  copied = {name: leaf for name, leaf in arrays.items() if _has_copies(leaf)}
  if not copied:
    return
  mesh = next(iter(copied.values())).sharding.mesh  # type: ignore[attr-defined]
  specs = tuple(leaf.sharding.spec for leaf in copied.values())  # type: ignore[attr-defined]
  values = [_plain(leaf) for leaf in copied.values()]
  sums = np.asarray(_sum_on_each_device(mesh, specs, values))  # [arrays, devices]
  places = {device: number for number, device in enumerate(mesh.devices.flat)}
  for (name, leaf), row in zip(copied.items(), sums, strict=True):
    first: dict[Any, tuple[Any, Any]] = {}  # piece → (the device that has it, its sum)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
      piece = tuple((cut.start, cut.stop) for cut in index or ())
      other, expected = first.setdefault(piece, (device, row[places[device]]))
      if row[places[device]] != expected:
        raise UserError(
          f'{where}: {name} differs between {_name(other)} and {_name(device)}, which should hold '
          'copies of it; nothing was saved: repeat the command to go on from the last checkpoint, '
          'and look at these devices if it happens again'
        )


def _has_copies(leaf: jax.Array) -> bool:
  """Tells whether several devices hold the same piece of an array."""
  sharding = leaf.sharding
  if not isinstance(sharding, NamedSharding):
    return False
  pieces = {str(index) for index in sharding.devices_indices_map(leaf.shape).values()}
  return len(pieces) < len(sharding.device_set)


def _plain(leaf: jax.Array) -> jax.Array:
  """Returns an array of numbers; random keys as the numbers that they are."""
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(leaf)
  return leaf


def _name(device: Any) -> str:
  return f'device {device.id} of process {device.process_index}'


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sum_on_each_device(
  mesh: jax.sharding.Mesh,
  specs: tuple[PartitionSpec, ...],
  values: list[jax.Array],
) -> jax.Array:
  """Computes a sum over the bits of the piece that each device holds: [arrays, devices] uint32."""

  def local(*pieces: jax.Array) -> jax.Array:
    return jnp.stack([_sum_bits(piece) for piece in pieces])[:, None]

  everywhere = PartitionSpec(None, mesh.axis_names)
  sums = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
  return jax.lax.with_sharding_constraint(sums(*values), NamedSharding(mesh, PartitionSpec()))


def _sum_bits(piece: jax.Array) -> jax.Array:
  """Returns a sum of the bits of a piece, each weighted by an odd number of its place, uint32."""
  if piece.dtype == jnp.bool_:
    bits = piece.astype(jnp.uint32)
  else:
    words = {1: jnp.uint8, 2: jnp.uint16}.get(piece.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(piece, words).astype(jnp.uint32)
  bits = bits.reshape(-1)
  weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2) + jnp.uint32(_ODD)
  return jnp.sum(bits * weights, dtype=jnp.uint32)
