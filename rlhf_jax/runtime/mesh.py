"""The device mesh, and the one table that says which axis of an array lies on which axis of the mesh.

Models name the axes of their parameters and activations in their own terms (vocab, embed, heads, …); only the table
below knows mesh axes. A mesh of one device is the same code.
"""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from rlhf_jax.errors import UserError

DEFAULTS = dict(
    data=-1,  # devices along each mesh axis; one may be -1: what is left. data: rows
    fsdp=1,  # rows, and parameters
    expert=1,  # rows, and the experts of a mixture
    context=1,  # the places of a row: for long ones
    tensor=1,  # heads, the MLP's width, the vocabulary
)

RULES = {
    # activations
    'batch': ('data', 'fsdp', 'expert'),
    'length': 'context',
    'keys': None,  # the places that queries look at: gathered from all of `context`
    'hidden': None,
    # parameters
    'layers': None,
    'embed': 'fsdp',
    'experts': 'expert',
    # both
    'vocab': 'tensor',
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'head_dim': None,
    'mlp': 'tensor',
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the rules that lay arrays on it."""
  mesh: Mesh
  rules: dict = dataclasses.field(default_factory=lambda: dict(RULES))

  def spec(self, names) -> PartitionSpec:
    """The partition of an array whose axes bear these names (None: not named, not sharded)."""
    axes = [self.rules[name] if name else None for name in names]
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
      raise UserError(f'mesh rules: an array with axes {names} would use mesh axis {sorted(twice)} twice')
    return PartitionSpec(*axes)

  def sharding(self, names=()) -> NamedSharding:
    """The same as a sharding; without names: a whole copy on every device."""
    return NamedSharding(self.mesh, self.spec(names))

  def constrain(self, x, names):
    """Inside a jitted function: lays an activation as its names say; a length that does not divide over the axis context,
    such as the one place of a decoding step, is not cut."""
    cut = [None if name == 'length' and size % self.mesh.shape['context'] else name for size, name in zip(x.shape, names)]
    return jax.lax.with_sharding_constraint(x, self.sharding(cut))

  def shards(self, function, inputs, output):
    """Inside a jitted function: `function` on each device's own part of arrays whose axes bear these names."""
    return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(map(self.spec, inputs)),
                         out_specs=self.spec(output), check_vma=False)

  def shardings(self, axes, shapes):
    """The shardings of a tree of parameters.

    Args:
      axes: a tree of tuples of axis names.
      shapes: the same tree of arrays or shapes.

    Raises:
      UserError: a dimension does not divide over its mesh axes.
    """
    def one(path, shape, names):
      for size, name, entry in zip(shape.shape, names, self.spec(names)):
        entry = (entry,) if isinstance(entry, str) else entry or ()
        ways = int(np.prod([self.mesh.shape[axis] for axis in entry]))
        if size % ways:
          raise UserError(f'mesh: {jax.tree_util.keystr(path, simple=True, separator=".")} has {name} = {size}, which '
                          f'does not divide over {ways} devices ({", ".join(entry)}); choose another mesh')
      return self.sharding(names)
    return jax.tree_util.tree_map_with_path(one, shapes, axes)

  @property
  def batch_ways(self) -> int:
    """In how many parts a batch is cut."""
    return int(np.prod([self.mesh.shape[axis] for axis in self.rules['batch']]))

  def place(self, batch):
    """Host arrays [B, …], the same on every process → global arrays [B, …], sharded along their first axis; each device
    is given its rows only. What lies on the whole mesh already stays where it is."""
    sharding = self.sharding(('batch',))

    def one(x):
      if isinstance(x, jax.Array) and len(x.sharding.device_set) == self.mesh.size:
        return x
      return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)
    return jax.tree.map(one, batch)

  def rows(self, count: int) -> np.ndarray:
    """Which of the `count` rows of a placed array lie on this process's devices, [n] int, ascending."""
    parts = self.sharding(('batch',)).addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([np.arange(count)[part] for part in parts]))

  def describe(self, axes, shapes) -> str:
    """A line for each parameter: name, shape, partition, share of a device."""
    lines = []
    def one(path, shape, sharding):
      share = int(np.prod(sharding.shard_shape(shape.shape))) * 4 / 2**20
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      lines.append(f'{name:30} {str(shape.shape):24} {str(sharding.spec):44} {share:10.3f} MiB')
    jax.tree_util.tree_map_with_path(one, shapes, self.shardings(axes, shapes))
    return '\n'.join(lines)


def make(config, devices=None) -> Layout:
  """The layout of a mesh config (see DEFAULTS) over all devices, or those given.

  Raises:
    UserError: the axes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {name: int(config[name]) for name in DEFAULTS}
  text = ' × '.join(f'{name} {size}' for name, size in sizes.items() if name == 'data' or size != 1)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'config.mesh: {text}: sizes must be positive, one of them may be -1')
  if free:
    sizes[free[0]] = len(devices) // fixed
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(f'config.mesh: {text} does not fit {len(devices)} device(s)')
  mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
  return Layout(mesh)
