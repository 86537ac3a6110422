"""The device mesh, and the one table that says which axis of an array lies on which axis of the mesh.

Models name the axes of their parameters and activations in their own terms (vocab, embed, heads, …); only the table
below knows mesh axes. A mesh of one device is the same code.
"""

import dataclasses
import functools
import os

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from rlhf_jax.errors import UserError

AXES = dict(  # devices along each axis of the mesh; one may be -1: what is left
    data=-1,  # rows; the axis that may cross slices
    fsdp=1,  # rows, and parameters
    expert=1,  # rows, and the experts of a mixture
    context=1,  # the places of a row: for long ones
    tensor=1,  # heads, the MLP's width, the vocabulary
)

DEFAULTS = dict(
    preset='',  # a row of mesh.PRESETS, or auto: by the size of the models; axes said otherwise than here stay
    rollout_tensor=0,  # devices, of fsdp × tensor, over which decoding cuts heads, MLP and vocabulary, while it copies
    # the parameters along the rest; 0 = decoding leaves them as training lays them
    **AXES,
)

PRESETS = {  # PPO with four models, Adam and float32 parameters takes 40 bytes for each parameter of one
    'small': dict(),  # whole on each device
    '1b': dict(fsdp=8, rollout_tensor=1),
    '8b': dict(fsdp=16, rollout_tensor=4),
    '70b': dict(fsdp=64, rollout_tensor=8),
}

RULES = {
    # activations
    'batch': ('data', 'fsdp', 'expert'),
    'length': 'context',
    'keys': None,  # the places that queries look at: gathered from all of `context`
    'hidden': None,
    'rows': ('data', 'expert'),  # of what an embedding cut along `embed` gives: fsdp is needed there
    # parameters
    'layers': None,
    'embed': ('fsdp', 'context'),
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
  """A mesh and the rules that lay arrays on it.

  Attributes:
    rollout_tensor: see DEFAULTS.
    why: what `auto` says of its choice.
    abstract: the devices are not here, only known by their topology (a plan's); arrays are then shapes.
  """
  mesh: Mesh
  rules: dict = dataclasses.field(default_factory=lambda: dict(RULES))
  rollout_tensor: int = 0
  why: str = ''
  abstract: bool = False

  @property
  def platform(self) -> str:
    """'cpu', 'gpu' or 'tpu'."""
    return self.mesh.devices.flat[0].platform

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
    odd = lambda size, name: name == 'length' and size % self.mesh.shape['context']
    cut = [None if odd(size, name) else name for size, name in zip(x.shape, names)]
    return jax.lax.with_sharding_constraint(x, self.sharding(cut))

  def shard_map(self, function, inputs, output):
    """Inside a jitted function: `function` on each device's own part of arrays whose axes bear these names;
    None where places of a row are cut over devices: a part of them is not what such a function expects."""
    if self.mesh.shape['context'] > 1 and self.rules['length']:
      return None
    return jax.shard_map(function, mesh=self.mesh, in_specs=tuple(map(self.spec, inputs)),
                         out_specs=self.spec(output), check_vma=False)

  def with_gathered_matrix(self, function, matrix, *rows):
    """Inside a jitted function: function(matrix, *rows), each device with its own rows and all of a matrix that is cut
    along its first axis. It is gathered once and its gradient, summed over a device's rows first, scattered once.

    Args:
      function: (matrix [D, V], rows) → a tree of arrays [n, B, T].
      matrix: [D, V], named ('embed', 'vocab'); it and its gradient are sent in the dtype of the first rows.
      rows: arrays [n, B, T, …]; B is cut as a batch is, T as a length, where it divides.
    """
    sent, embed, context, vocab = rows[0].dtype, *(self.rules[name] for name in ('embed', 'length', 'vocab'))
    apart = tuple(axis for axis in self.mesh.axis_names if axis != vocab)  # XLA cuts the vocabulary
    even = rows[0].shape[2] % self.mesh.shape[context] == 0
    spec = self.spec((None, 'batch', 'length' if even else None))

    @jax.custom_vjp
    def gather(part):
      return jax.lax.all_gather(part.astype(sent), embed, axis=0, tiled=True).astype(part.dtype)

    def scatter(_, slope):
      parts = jax.lax.psum_scatter(slope.astype(sent), embed, scatter_dimension=0, tiled=True)
      return (jax.lax.optimization_barrier(parts).astype(slope.dtype),)  # or XLA sums whole ones over micro-batches

    gather.defvjp(lambda part: (gather(part), None), scatter)

    def copy(part):  # one on each device, so that each has a gradient of its own
      return gather(jax.lax.pcast(part, tuple(axis for axis in apart if axis not in embed), to='varying'))[None]

    def local(copy, *rows):
      found = function(copy[0], *rows)
      return found if even else jax.lax.pmean(found, context)  # the same on all of them

    copies = jax.shard_map(copy, mesh=self.mesh, in_specs=self.spec(('embed', 'vocab')),
                           out_specs=PartitionSpec(apart, None, vocab))(matrix)
    return jax.shard_map(local, mesh=self.mesh, in_specs=(PartitionSpec(apart), *(spec for _ in rows)), out_specs=spec,
                         axis_names=frozenset(apart))(copies, *rows)

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

  def create(self, function, shardings, *arguments):
    """function(*arguments), compiled, its result laid as `shardings` (a tree, or one for all leaves) say from the first
    moment; on devices that are only described the shapes of it."""
    if not self.abstract:
      return jax.jit(function, out_shardings=shardings)(*arguments)
    shapes = jax.eval_shape(function, *arguments)
    if isinstance(shardings, NamedSharding):
      shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda one, sharding: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), shapes,
                        shardings)

  @functools.cached_property
  def decoding(self) -> 'Layout':
    """How decoding lays arrays: rows are cut over `context` too, as a step has one place only, and parameters as
    `rollout_tensor` says. The devices are the same, so that both layouts may meet in one compiled program."""
    rules = {**self.rules, 'batch': (*self.rules['batch'], 'context'), 'length': None}
    if not self.rollout_tensor:
      return Layout(self.mesh, rules)
    sizes = dict(self.mesh.shape)
    wide = self.rollout_tensor // sizes['tensor']
    shape = [part for name, size in sizes.items() for part in ((size // wide, wide) if name == 'fsdp' else (size,))]
    names = [part for name in sizes for part in (('fsdp', 'wide') if name == 'fsdp' else (name,))]
    rules |= {'embed': None} | {name: ('tensor', 'wide') for name, axis in RULES.items() if axis == 'tensor'}
    return Layout(Mesh(self.mesh.devices.reshape(shape), names, axis_types=_auto(names)), rules)

  def reshard_for_decoding(self, params, axes):
    """Inside a jitted function: a tree of parameters as decoding wants it.

    Args:
      axes: a tree of tuples of axis names.
    """
    if not self.rollout_tensor:
      return params
    heads = {name: axis for name, axis in RULES.items() if axis == 'tensor'}
    # as training has them; heads cut further; gathered along the rest: XLA does each without a whole copy, not all at once
    for rules in (heads | {'embed': ('fsdp', 'wide', 'context')}, {'embed': ('fsdp', 'context')}, {}):
      step = dataclasses.replace(self.decoding, rules=self.decoding.rules | rules)
      params = jax.tree.map(jax.lax.with_sharding_constraint, params, step.shardings(axes, params))
    return params

  @property
  def batch_shards(self) -> int:
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

  def describe(self, axes, shapes) -> str:
    """A line for each parameter: name, shape, partition, share of a device."""
    lines = []
    def one(path, shape, sharding):
      share = int(np.prod(sharding.shard_shape(shape.shape))) * 4 / 2**20
      name = jax.tree_util.keystr(path, simple=True, separator='.')
      lines.append(f'{name:30} {str(shape.shape):24} {str(sharding.spec):44} {share:10.3f} MiB')
    jax.tree_util.tree_map_with_path(one, shapes, self.shardings(axes, shapes))
    return '\n'.join(lines)


def make_layout(config, devices=None, need=None, capacity: float | None = None) -> Layout:
  """The layout of a mesh config (see DEFAULTS) over all devices, or those given.

  Args:
    need: a MeshNeed, which the preset auto asks for.
    capacity: bytes of a device, where it cannot be asked.

  Raises:
    UserError: the axes do not multiply to the number of devices, or do not fit slices or rollout_tensor.
  """
  devices = list(jax.devices() if devices is None else devices)
  why, preset = '', config.get('preset', '')
  if preset == 'auto':
    if need is None:
      raise UserError('config.mesh.preset: auto needs to know the models; name the axes here')
    known, why = choose_mesh(need, len(devices), sum(one.process_index == devices[0].process_index for one in devices),
                        capacity or device_memory(devices[0]))
  elif preset and preset not in PRESETS:
    raise UserError(f'config.mesh.preset: expected auto or one of {", ".join(PRESETS)}, got {preset!r}')
  else:
    known = PRESETS.get(preset, {})
  said = {name: int(config.get(name, default)) for name, default in DEFAULTS.items() if name != 'preset'}
  said |= {name: value for name, value in known.items() if said[name] == DEFAULTS[name]}
  wide = said.pop('rollout_tensor')
  sizes = {name: said[name] for name in AXES}
  text = ' × '.join(f'{name} {size}' for name, size in sizes.items() if name == 'data' or size != 1)
  free = [name for name, size in sizes.items() if size == -1]
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise UserError(f'config.mesh: {text}: sizes must be positive, one of them may be -1')
  if free:
    sizes[free[0]] = len(devices) // fixed
  if int(np.prod(list(sizes.values()))) != len(devices):
    raise UserError(f'config.mesh: {text} does not fit {len(devices)} device(s)')
  if wide and (wide < 0 or wide % sizes['tensor'] or sizes['fsdp'] * sizes['tensor'] % wide):
    raise UserError(f'config.mesh.rollout_tensor: expected 0 or a multiple of tensor ({sizes["tensor"]}) that divides '
                    f'fsdp × tensor ({sizes["fsdp"] * sizes["tensor"]}), got {wide}')
  mesh = Mesh(arrange_devices(devices, sizes), tuple(sizes), axis_types=_auto(sizes))
  return Layout(mesh, rollout_tensor=wide, why=why)


def arrange_devices(devices, sizes: dict) -> np.ndarray:
  """Devices as an array of these axes, neighbours close to each other: the last axes within a slice of a TPU or a host's
  fast network, `data` (or `fsdp`, where data does not divide) across slices.

  Raises:
    UserError: neither divides over the slices.
  """
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  shape = list(sizes.values())
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  across = next((name for name in ('data', 'fsdp') if sizes[name] % slices == 0), None)
  if across is None:
    raise UserError(f'config.mesh: data {sizes["data"]} or fsdp {sizes["fsdp"]} must be a multiple of the {slices} '
                    'slices')
  outer = [slices if name == across else 1 for name in sizes]
  inner = [size // part for size, part in zip(shape, outer)]
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


@dataclasses.dataclass(frozen=True)
class MeshNeed:
  """What a run asks of a mesh.

  Attributes:
    parameters: of the largest model.
    state: bytes of all models of the heaviest stage, with gradients and optimizer.
    decoded: bytes of the largest model in what it computes in; 0 = decoding cannot lay it otherwise.
    rows: a number that the rows which are computed at once are a multiple of, in every stage.
    width: what `fsdp` must divide.
    heads: what `tensor` must divide.
  """
  parameters: int
  state: int
  decoded: int
  rows: int
  width: int
  heads: int


def choose_mesh(need: MeshNeed, devices: int, local: int, memory: float) -> tuple[dict, str]:
  """Sizes of a mesh by what the models need, and why: the fewest parts in which the state fits half of a device's memory
  (the other half is for activations, caches and decoding), the rest to `data`; `tensor`, within a process, only where
  there are more devices than rows; decoding over as few devices as hold its parameters in a quarter, or as many as can.

  Args:
    devices: of all processes.
    local: of one process.
    memory: bytes of one device.

  Raises:
    UserError: there are fewer rows than devices, and heads cannot be cut either.
  """
  parts = lambda n: [k for k in range(1, n + 1) if n % k == 0]
  tensor = next((k for k in parts(local) if need.heads % k == 0 and devices % k == 0
                 and need.rows % (devices // k) == 0), None)
  if tensor is None:
    raise UserError(f'config.mesh.preset: auto finds no mesh: {need.rows} rows and {need.heads} heads do not divide '
                    f'over {devices} devices; change batch_size, minibatches or microbatches')
  fitting = [k for k in parts(devices // tensor) if need.width % k == 0]
  fsdp = next((k for k in fitting if need.state / (k * tensor) <= memory / 2), fitting[-1])
  gib, share = 2 ** 30, need.state / (fsdp * tensor)
  can = [k for k in parts(fsdp * tensor) if k % tensor == 0 and need.heads % k == 0
         and need.decoded / k + share <= 0.9 * memory] if fsdp > 1 and need.decoded else []
  wide = next((k for k in can if need.decoded / k <= memory / 4), max(can, default=0))
  sizes = dict(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor, rollout_tensor=wide)
  why = [f'{need.parameters / 1e9:.3g} billion parameters with all models and optimizers take {need.state / gib:.3g} '
         f'GiB, {share / gib:.3g} on each device of {memory / gib:.3g}']
  if share > memory / 2:
    why.append('which leaves less than half: expect it to run out of memory')
  if tensor > 1:
    why.append(f'{need.rows} rows at once are fewer than {devices} devices, so heads are cut too')
  if wide:
    why.append(f'decoding holds {need.decoded / wide / gib:.3g} GiB of parameters on each')
  named = ' × '.join(f'{name} {size}' for name, size in sizes.items() if name != 'rollout_tensor')
  return sizes, f'mesh: {named}{f", rollout_tensor {wide}" if wide else ""}: {"; ".join(why)}'


def device_memory(device) -> float:
  """Bytes of a device; on a CPU its share of the machine's."""
  limit = (device.memory_stats() or {}).get('bytes_limit') if device.platform != 'cpu' else None
  return limit or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / jax.local_device_count()


def _auto(names):
  return (jax.sharding.AxisType.Auto,) * len(names)
