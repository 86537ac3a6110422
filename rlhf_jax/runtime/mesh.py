"""The device mesh, and the table that says along which mesh axis each array axis is sharded.

Models name the axes of their parameters and activations in their own terms
(vocab, embed, heads, …); only RULES below maps them to mesh axes. A single device
is a mesh too, and runs the same code.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.options import AxisSize, Natural
from rlhf_jax.runtime.mesh_choice import choose_mesh, device_memory, MeshNeed
from rlhf_jax.types import Params

Names = Sequence[str | None]  # the axis names of one array; None: an axis that is not sharded
Axes = Any  # a tree of Names, as a model gives them for its parameters

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')  # of the mesh, outermost first


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  """How devices are arranged: the number of devices along each axis.

  One axis may be -1 and takes the devices that are left. All axes together must use
  all devices.
  """

  # A row of PRESETS, or auto: chosen from the sizes of the models. A size below
  # that differs from its default overrides the preset.
  preset: str = ''
  # The number of devices, of fsdp × tensor, over which decoding shards heads, MLP and
  # vocabulary; parameters are replicated over the others. 0 = sharded as in training.
  rollout_tensor: Natural = 0
  data: AxisSize = -1  # shards rows; the axis that may span slices
  fsdp: AxisSize = 1  # shards rows, and parameters
  expert: AxisSize = 1  # shards rows, and the experts of a mixture
  context: AxisSize = 1  # shards the positions of a row, for long sequences
  tensor: AxisSize = 1  # shards heads, the MLP's width and the vocabulary


# PPO with four models, Adam and float32 parameters takes 40 bytes for each
# parameter of one model.
PRESETS: dict[str, dict[str, int]] = {
  'small': {},  # every device has a whole copy of the parameters
  '1b': {'fsdp': 8, 'rollout_tensor': 1},
  '8b': {'fsdp': 16, 'rollout_tensor': 4},
  '70b': {'fsdp': 64, 'rollout_tensor': 8},
}

# Axis of an array → axes of the mesh.
RULES: dict[str, Any] = {
  # activations
  'batch': ('data', 'fsdp', 'expert'),
  'length': 'context',
  'keys': None,  # the positions that queries attend to: gathered from all of `context`
  'hidden': None,
  # rows of embedded tokens, before `embed` is gathered, which is sharded over fsdp
  'rows': ('data', 'expert'),
  # parameters
  'layers': None,  # scanned over
  'embed': ('fsdp', 'context'),
  'experts': 'expert',
  # both
  'vocab': 'tensor',  # of embedding and unembedding, and of logits
  'heads': 'tensor',
  'kv_heads': 'tensor',  # fewer than heads: they limit the size of `tensor`
  'head_dim': None,
  'mlp': 'tensor',
}


# Compared by identity, so that it can be a static argument of jit.
@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """A mesh and the rules by which arrays are sharded on it.

  Attributes:
    mesh: the devices.
    rules: axis of an array → axes of the mesh.
    rollout_tensor: see MeshOptions.
    why: the reasons the preset `auto` gives for its choice.
    abstract: whether the devices are only described by a topology, as those of a plan;
      arrays are then abstract.
  """

  mesh: Mesh
  rules: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(RULES))
  rollout_tensor: int = 0
  why: str = ''
  abstract: bool = False

  @property
  def platform(self) -> str:
    """The platform of the devices: 'cpu', 'gpu' or 'tpu'."""
    return self.mesh.devices.flat[0].platform

  @property
  def is_one_device(self) -> bool:
    """Whether there is one device only, which exists and runs programs."""
    return self.mesh.size == 1 and not self.abstract

  @property
  def shards_rows_only(self) -> bool:
    """Whether devices share nothing of a row: no tokens, heads, widths or vocabulary."""
    shared = ('length', *_tensor_axes())
    return all(_count_shards(self.mesh, self.rules[name]) == 1 for name in shared)

  @property
  def batch_shards(self) -> int:
    """The number of parts into which the rows of a batch are sharded."""
    return _count_shards(self.mesh, self.rules['batch'])

  @property
  def decoding(self) -> 'Layout':
    """The layout in which responses are decoded, see `decoding_layout`."""
    return decoding_layout(self)

  def spec(self, names: Names) -> PartitionSpec:
    """Returns the partition of an array whose axes have these names.

    Raises:
      UserError: two axes of the array would be sharded along one axis of the mesh.
    """
    entries = [self.rules[name] if name else None for name in names]
    used = [axis for entry in entries for axis in _as_tuple(entry)]
    twice = {axis for axis in used if used.count(axis) > 1}
    if twice:
      raise UserError(
        f'mesh rules: an array with axes {names} would use mesh axis {sorted(twice)} twice'
      )
    return PartitionSpec(*entries)

  def sharding(self, names: Names = ()) -> NamedSharding:
    """Returns the sharding of an array with these axes; without names it is replicated."""
    return NamedSharding(self.mesh, self.spec(names))

  def shardings(self, axes: Axes, shapes: Any) -> Any:
    """Returns the shardings of a tree of parameters.

    Args:
      axes: a tree of tuples of axis names.
      shapes: the same tree of arrays or abstract arrays.

    Raises:
      UserError: a dimension does not divide over its mesh axes.
    """

    def checked_sharding(
      path: Any,
      shape: Any,
      names: Names,
    ) -> NamedSharding:
      _check_divides(self, _dotted(path), shape.shape, names)
      return self.sharding(names)

    return jax.tree_util.tree_map_with_path(checked_sharding, shapes, axes)

  def constrain(self, x: jax.Array, names: Names) -> jax.Array:
    """Shards an activation as its axis names say; inside a jitted function.

    A length that does not divide over the axis `context`, such as the single
    position of a decoding step, is not sharded.
    """
    context = self.mesh.shape['context']
    divisible: list[str | None] = []
    for size, name in zip(x.shape, names):
      uneven = name == 'length' and size % context
      divisible.append(None if uneven else name)
    return jax.lax.with_sharding_constraint(x, self.sharding(divisible))

  def shard_map(
    self,
    function: Callable[..., Any],
    inputs: Sequence[Names],
    output: Names,
  ) -> Callable[..., Any] | None:
    """Maps a function over the devices, each with its own shards; inside a jitted function.

    Args:
      function: takes as many arrays as there are `inputs`.
      inputs: the axis names of each input.
      output: the axis names of the output.

    Returns:
      The mapped function; None if the positions of a row are sharded, as the function
      expects whole rows.
    """
    if self.mesh.shape['context'] > 1 and self.rules['length']:
      return None
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=tuple(self.spec(names) for names in inputs),
      out_specs=self.spec(output),
      check_vma=False,  # kernels do not say along which mesh axes their outputs vary
    )

  def with_gathered_matrix(
    self,
    function: Callable[..., Any],
    matrix: jax.Array,
    *rows: jax.Array,
  ) -> Any:
    """Computes function(matrix, *rows) with a sharded matrix, see `with_gathered_matrix`."""
    return with_gathered_matrix(self, function, matrix, *rows)

  def reshard_for_decoding(self, params: Params, axes: Axes) -> Params:
    """Returns parameters sharded as decoding needs them, see `reshard_for_decoding`."""
    return reshard_for_decoding(self, params, axes)

  def create(
    self,
    function: Callable[..., Any],
    shardings: Any,
    *arguments: Any,
  ) -> Any:
    """Computes function(*arguments); the result is created sharded, never whole on a device.

    Args:
      function: returns a tree of arrays.
      shardings: a tree of shardings for the result, or one for all leaves.
      *arguments: passed to the function.

    Returns:
      The result; abstract arrays if the layout is abstract.
    """
    if not self.abstract:
      return jax.jit(function, out_shardings=shardings)(*arguments)
    shapes = jax.eval_shape(function, *arguments)
    if isinstance(shardings, NamedSharding):
      same = shardings
      shardings = jax.tree.map(lambda _: same, shapes)
    return jax.tree.map(_abstract_array, shapes, shardings)

  def place(self, batch: Any) -> Any:
    """Puts a batch on the mesh, sharded along its rows.

    Args:
      batch: a tree of host arrays [B, …], the same on every process. Each device gets
        its own rows only. Arrays that are already on the mesh stay as they are.

    Returns:
      The tree of global arrays [B, …].
    """
    sharding = self.sharding(('batch',))
    return jax.tree.map(lambda x: _place_rows(x, sharding), batch)

  def describe_parameters(self, axes: Axes, shapes: Any) -> str:
    """Returns a line for each parameter: name, shape, partition, MiB on one device.

    Args:
      axes: a tree of tuples of axis names.
      shapes: the same tree of float32 arrays or abstract arrays.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    shardings = jax.tree.leaves(self.shardings(axes, shapes))
    lines = []
    for (path, leaf), sharding in zip(leaves, shardings, strict=True):
      mib = math.prod(sharding.shard_shape(leaf.shape)) * 4 / 2**20
      shape = str(leaf.shape)
      partition = str(sharding.spec)
      lines.append(f'{_dotted(path):30} {shape:24} {partition:44} {mib:10.3f} MiB')
    return '\n'.join(lines)


def make_layout(
  options: MeshOptions | None = None,
  devices: Sequence[jax.Device] | None = None,
  need: MeshNeed | None = None,
  capacity: float | None = None,
  where: str = 'config.mesh',
) -> Layout:
  """Returns the layout of a mesh; by default all devices are on the axis `data`.

  Args:
    options: the sizes of the mesh; None for the defaults.
    devices: the devices to use; None for all.
    need: what the run needs; required by the preset `auto`.
    capacity: bytes of a device's memory, for devices that cannot report it.
    where: the options were given, for error messages.

  Raises:
    UserError: the axes do not multiply to the number of devices, or do not fit the
      slices or rollout_tensor.
  """
  if options is None:
    options = MeshOptions()
  if devices is None:
    devices = jax.devices()
  devices = list(devices)

  options, why = _apply_preset(options, devices, need, capacity)
  sizes = _axis_sizes(options, len(devices), where)
  _check_rollout_tensor(options.rollout_tensor, sizes, where)
  mesh = _make_mesh(arrange_devices(devices, sizes, where), tuple(sizes))
  return Layout(mesh, rollout_tensor=options.rollout_tensor, why=why)


def arrange_devices(
  devices: Sequence[jax.Device],
  sizes: dict[str, int],
  where: str = 'config.mesh',
) -> np.ndarray:
  """Arranges devices in an array so that neighbours in it are close to each other.

  The last axes stay within a TPU slice or a host's fast network; `data` spans the
  slices, or `fsdp` if `data` is not a multiple of their number.

  Args:
    devices: the devices of all processes.
    sizes: the size of each axis, outermost first.
    where: the sizes were given, for error messages.

  Returns:
    An array of devices with a dimension for each axis.

  Raises:
    UserError: neither axis divides over the slices.
  """
  shape = list(sizes.values())
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  crossing = [name for name in ('data', 'fsdp') if sizes[name] % slices == 0]
  if not crossing:
    raise UserError(
      f'{where}: data {sizes["data"]} or fsdp {sizes["fsdp"]} must be a multiple of the '
      f'{slices} slices'
    )
  # Sizes across slices, and sizes within one; they multiply to the shape.
  outer = [slices if name == crossing[0] else 1 for name in sizes]
  inner = [size // parts for size, parts in zip(shape, outer)]
  return mesh_utils.create_hybrid_device_mesh(
    inner,
    outer,
    devices,
    allow_split_physical_axes=True,
  )


def with_gathered_matrix(
  layout: Layout,
  function: Callable[..., Any],
  matrix: jax.Array,
  *rows: jax.Array,
) -> Any:
  """Computes function(matrix, *rows) with a sharded matrix; inside a jitted function.

  Each device computes its own rows with the whole matrix, which is sharded along
  its first axis. The matrix is gathered once; its gradient is summed over a
  device's rows first, and then scattered once. XLA by itself would do both for
  every chunk of the sequence.

  Args:
    layout: the layout of training.
    function: (matrix [D, V], *rows) → a tree of arrays [n, B, T].
    matrix: [D, V], with the axes ('embed', 'vocab'). It and its gradient are
      communicated in the dtype of rows[0].
    *rows: arrays [n, B, T, …]; B is sharded as the axis 'batch', and T as 'length' if
      it divides.
  """
  dtype = rows[0].dtype
  embed = layout.rules['embed']
  context = layout.rules['length']
  vocab = layout.rules['vocab']
  # All mesh axes but that of the vocabulary, which XLA shards.
  manual = tuple(axis for axis in layout.mesh.axis_names if axis != vocab)
  divides = rows[0].shape[2] % layout.mesh.shape[context] == 0
  row_spec = layout.spec((None, 'batch', 'length' if divides else None))

  def gather_copy(part: jax.Array) -> jax.Array:
    # A copy for each device, [1, D, V] of [devices, D, V], so that each has its own
    # gradient.
    unreplicated = tuple(axis for axis in manual if axis not in embed)
    varying = jax.lax.pcast(part, unreplicated, to='varying')
    return _gather_rows(varying, embed, dtype)[None]

  def compute(copy: jax.Array, *rows: jax.Array) -> Any:
    if divides:
      return function(copy[0], *rows)
    # All devices along `context` compute the same rows, each with its own copy.
    own_rows = [jax.lax.pcast(x, context, to='varying') for x in rows]
    return jax.lax.pmean(function(copy[0], *own_rows), context)

  copies = jax.shard_map(
    gather_copy,
    mesh=layout.mesh,
    in_specs=layout.spec(('embed', 'vocab')),
    out_specs=PartitionSpec(manual, None, vocab),
  )(matrix)
  return jax.shard_map(
    compute,
    mesh=layout.mesh,
    in_specs=(PartitionSpec(manual), *(row_spec for _ in rows)),
    out_specs=row_spec,
    axis_names=frozenset(manual),
  )(copies, *rows)


def decoding_layout(layout: Layout) -> Layout:
  """Returns the layout in which responses are decoded.

  Rows are sharded over `context` too, as a decoding step has a single position.
  Parameters are sharded as `rollout_tensor` says: the mesh axis `fsdp` is split
  into `fsdp` and `wide`, and heads, MLP and vocabulary are sharded over `tensor`
  and `wide`. The devices and their order are those of training, so that one
  compiled program may use both layouts.
  """
  rules = {**layout.rules, 'batch': (*layout.rules['batch'], 'context'), 'length': None}
  if not layout.rollout_tensor:
    return Layout(layout.mesh, rules, abstract=layout.abstract)
  wide = layout.rollout_tensor // layout.mesh.shape['tensor']
  sizes: dict[str, int] = {}
  for name, size in layout.mesh.shape.items():
    if name == 'fsdp':
      sizes['fsdp'] = size // wide
      sizes['wide'] = wide
    else:
      sizes[name] = size
  rules['embed'] = None  # replicated along what is left of `fsdp`
  for name in _tensor_axes():
    rules[name] = ('tensor', 'wide')
  devices = layout.mesh.devices.reshape(tuple(sizes.values()))
  return Layout(_make_mesh(devices, tuple(sizes)), rules, abstract=layout.abstract)


def reshard_for_decoding(
  layout: Layout,
  params: Params,
  axes: Axes,
) -> Params:
  """Returns parameters sharded as decoding needs them; inside a jitted function.

  Args:
    layout: the layout of training.
    params: a tree of arrays.
    axes: the same tree of tuples of axis names.
  """
  if not layout.rollout_tensor:
    return params
  decoding = decoding_layout(layout)
  # XLA does each of these three steps without a complete copy of the parameters,
  # but would make one if they were a single step.
  steps: tuple[dict[str, Any], ...] = (
    {**_tensor_axes(), 'embed': ('fsdp', 'wide', 'context')},  # as training shards them
    {'embed': ('fsdp', 'context')},  # heads, MLP and vocabulary sharded over `wide` too
    {},  # gathered along the other axes
  )
  for changes in steps:
    step = dataclasses.replace(decoding, rules={**decoding.rules, **changes})
    shardings = step.shardings(axes, params)
    params = jax.tree.map(jax.lax.with_sharding_constraint, params, shardings)
  return params


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_rows(part: jax.Array, axes: Any, dtype: Any) -> jax.Array:
  """Gathers, in `dtype`, a matrix that is sharded along its first axis; in a shard_map."""
  gathered = jax.lax.all_gather(part.astype(dtype), axes, axis=0, tiled=True)
  return gathered.astype(part.dtype)


def _gather_rows_forward(part, axes, dtype):
  return _gather_rows(part, axes, dtype), None


def _gather_rows_backward(axes, dtype, _, gradient):
  parts = jax.lax.psum_scatter(
    gradient.astype(dtype),
    axes,
    scatter_dimension=0,
    tiled=True,
  )
  # Without the barrier XLA would sum unsharded gradients over micro-batches, and
  # scatter only the sum.
  return (jax.lax.optimization_barrier(parts).astype(gradient.dtype),)


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def _apply_preset(
  options: MeshOptions,
  devices: Sequence[jax.Device],
  need: MeshNeed | None,
  capacity: float | None,
) -> tuple[MeshOptions, str]:
  """Returns the options with the sizes of their preset, and why `auto` chose them."""
  if not options.preset:
    return options, ''
  why = ''
  if options.preset == 'auto':
    if need is None:
      raise UserError(
        'config.mesh.preset: auto needs to know the models, expected the sizes of the axes here'
      )
    here = devices[0].process_index
    # All processes have the same number of devices.
    local = sum(device.process_index == here for device in devices)
    memory = capacity or device_memory(devices[0])
    sizes, why = choose_mesh(need, len(devices), local, memory)
  elif options.preset in PRESETS:
    sizes = PRESETS[options.preset]
  else:
    raise UserError(
      f'config.mesh.preset: expected auto or one of {", ".join(PRESETS)}, got {options.preset!r}'
    )
  unset = {
    name: size
    for name, size in sizes.items()
    if getattr(options, name) == getattr(MeshOptions, name)  # the default
  }
  return dataclasses.replace(options, **unset), why  # type: ignore[arg-type]


def _axis_sizes(options: MeshOptions, devices: int, where: str) -> dict[str, int]:
  """Returns the size of each axis, with -1 replaced; the sizes multiply to `devices`."""
  sizes = {name: getattr(options, name) for name in AXES}
  shown = {name: size for name, size in sizes.items() if name == 'data' or size != 1}
  text = ' × '.join(f'{name} {size}' for name, size in shown.items())
  free = [name for name, size in sizes.items() if size == -1]
  fixed = [size for size in sizes.values() if size != -1]
  if len(free) > 1 or any(size < 1 for size in fixed):
    raise UserError(f'{where}: {text}: expected positive sizes, of which one may be -1')
  if free:
    sizes[free[0]] = devices // math.prod(fixed)  # a remainder is refused below
  if math.prod(sizes.values()) != devices:
    raise UserError(f'{where}: {text} does not fit {devices} device(s)')
  return sizes


def _check_rollout_tensor(
  rollout_tensor: int,
  sizes: dict[str, int],
  where: str,
) -> None:
  """Raises UserError if decoding cannot shard parameters over so many devices."""
  if not rollout_tensor:
    return
  tensor = sizes['tensor']
  model_devices = sizes['fsdp'] * tensor
  if rollout_tensor < 0 or rollout_tensor % tensor or model_devices % rollout_tensor:
    raise UserError(
      f'{where}.rollout_tensor: expected 0 or a multiple of tensor ({tensor}) that divides '
      f'fsdp × tensor ({model_devices}), got {rollout_tensor}'
    )


def _make_mesh(devices: np.ndarray, names: tuple[str, ...]) -> Mesh:
  """Returns a mesh whose axes have the type Auto: XLA shards what is not constrained."""
  return Mesh(devices, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def _tensor_axes() -> dict[str, str]:
  """Returns the rules of the array axes that `tensor` shards: heads, MLP and vocabulary."""
  return {name: axis for name, axis in RULES.items() if axis == 'tensor'}


def _check_divides(
  layout: Layout,
  parameter: str,
  shape: Sequence[int],
  names: Names,
) -> None:
  """Raises UserError if a dimension does not divide over its mesh axes."""
  for size, name, entry in zip(shape, names, layout.spec(names)):
    shards = _count_shards(layout.mesh, entry)
    if size % shards:
      raise UserError(
        f'mesh: {parameter} has {name} = {size}, which does not divide over {shards} devices '
        f'({", ".join(_as_tuple(entry))}); choose another mesh'
      )


def _place_rows(x: Any, sharding: NamedSharding) -> jax.Array:
  """Puts a host array [B, …] on the mesh; an array that is on it already stays as it is."""
  if isinstance(x, jax.Array) and len(x.sharding.device_set) == sharding.mesh.size:
    return x
  return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)


def _abstract_array(
  shape: jax.ShapeDtypeStruct,
  sharding: NamedSharding,
) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _count_shards(mesh: Mesh, entry: str | Sequence[str] | None) -> int:
  """Returns into how many shards an entry of a partition splits an axis."""
  return math.prod(mesh.shape[axis] for axis in _as_tuple(entry))


def _as_tuple(entry: str | Sequence[str] | None) -> tuple[str, ...]:
  """Returns the mesh axes of an entry of a partition."""
  if entry is None:
    return ()
  if isinstance(entry, str):
    return (entry,)
  return tuple(entry)


def _dotted(path: Any) -> str:
  """Returns the name of a leaf, such as layers.query."""
  return jax.tree_util.keystr(path, simple=True, separator='.')
