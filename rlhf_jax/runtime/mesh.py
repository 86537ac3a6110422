"""The device mesh, and the table that says along which mesh axis each array axis is sharded.

Models name the axes of their parameters and activations in their own terms (vocab,
embed, heads, …); only RULES below knows mesh axes. A mesh of one device is the same
code.
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

  # A row of PRESETS, or auto: by the size of the models. A size that is set to another
  # value than the default below wins over the preset.
  preset: str = ''
  # Devices, of fsdp × tensor, over which decoding cuts heads, MLP and vocabulary; along
  # the others it copies the parameters. 0 = as training shards them.
  rollout_tensor: int = 0
  data: int = -1  # rows; the axis that may cross slices
  fsdp: int = 1  # rows, and parameters
  expert: int = 1  # rows, and the experts of a mixture
  context: int = 1  # positions of a row: for long sequences
  tensor: int = 1  # heads, the MLP's width, the vocabulary


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
  # rows of the output of an embedding that is cut along `embed`, which takes fsdp
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


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that jit takes it static
class Layout:
  """A mesh and the rules by which arrays are sharded on it.

  Attributes:
    mesh: the devices.
    rules: axis of an array → axes of the mesh.
    rollout_tensor: see MeshOptions.
    why: the reasons the preset `auto` gives for its choice.
    abstract: the devices are not here, only known by their topology (a plan's);
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
  def batch_shards(self) -> int:
    """The number of parts into which the rows of a batch are sharded."""
    return _ways(self.mesh, self.rules['batch'])

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
    """Returns `function` as it runs on each device's own shards, for use in a jitted function.

    Args:
      function: takes as many arrays as there are `inputs`.
      inputs: the axis names of each input.
      output: the axis names of the output.

    Returns:
      The mapped function; None where the positions of a row are sharded, as such a
      function expects whole rows.
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
    """Computes function(matrix, *rows), see the module's `with_gathered_matrix`."""
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
    """Computes function(*arguments), whose result is created sharded, never as a whole copy.

    Args:
      function: returns a tree of arrays.
      shardings: a tree of shardings for the result, or one for all leaves.
      *arguments: passed to the function.

    Returns:
      The result; abstract arrays where the layout is abstract.
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
      batch: a tree of host arrays [B, …], the same on every process. Each device is
        given its own rows only. Arrays that are on the whole mesh already stay as
        they are.

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
) -> Layout:
  """Returns the layout of a mesh; by default all devices are on the axis `data`.

  Args:
    options: the sizes of the mesh; None for the defaults.
    devices: the devices to use; None for all.
    need: what the run needs, which the preset `auto` asks for.
    capacity: bytes of a device's memory, where the device cannot be asked.

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
  sizes = _axis_sizes(options, len(devices))
  _check_rollout_tensor(options.rollout_tensor, sizes)
  mesh = _make_mesh(arrange_devices(devices, sizes), tuple(sizes))
  return Layout(mesh, rollout_tensor=options.rollout_tensor, why=why)


def arrange_devices(
  devices: Sequence[jax.Device],
  sizes: dict[str, int],
) -> np.ndarray:
  """Arranges devices in an array so that neighbours in it are close to each other.

  The last axes lie within a slice of a TPU or a host's fast network; `data` (or
  `fsdp`, where data does not divide) goes across slices.

  Args:
    devices: the devices of all processes.
    sizes: the size of each axis, outermost first.

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
      f'config.mesh: data {sizes["data"]} or fsdp {sizes["fsdp"]} must be a multiple of the '
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

  Each device computes its own rows with the whole matrix, which is cut along its
  first axis. The matrix is gathered once; its gradient is summed over a device's
  rows first, and then scattered once. XLA by itself would do both for every chunk
  of the sequence.

  Args:
    layout: the layout of training.
    function: (matrix [D, V], *rows) → a tree of arrays [n, B, T].
    matrix: [D, V], with the axes ('embed', 'vocab'). It and its gradient are sent
      in the dtype of the first rows.
    *rows: arrays [n, B, T, …]; B is sharded as a batch is, T as a length is, where
      it divides.
  """
  dtype = rows[0].dtype
  embed = layout.rules['embed']
  context = layout.rules['length']
  vocab = layout.rules['vocab']
  manual = tuple(
    axis for axis in layout.mesh.axis_names if axis != vocab
  )  # XLA cuts the vocabulary
  divides = rows[0].shape[2] % layout.mesh.shape[context] == 0
  row_spec = layout.spec((None, 'batch', 'length' if divides else None))

  def gather_copy(part: jax.Array) -> jax.Array:
    # A copy for each device, [1, D, V] of [devices, D, V], so that each has its own
    # gradient.
    unreplicated = tuple(axis for axis in manual if axis not in embed)
    varying = jax.lax.pcast(part, unreplicated, to='varying')
    return _gather_rows(varying, embed, dtype)[None]

  def compute(copy: jax.Array, *rows: jax.Array) -> Any:
    result = function(copy[0], *rows)
    if divides:
      return result
    return jax.lax.pmean(result, context)  # all devices along `context` computed the same

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
    axis_names=frozenset(manual),  # along the vocabulary XLA goes on sharding
  )(copies, *rows)


def decoding_layout(layout: Layout) -> Layout:
  """Returns the layout in which responses are decoded.

  Rows are sharded over `context` too, as a decoding step has a single position, and
  parameters as `rollout_tensor` says: `fsdp` is split into fsdp × wide, and heads,
  MLP and vocabulary are cut over tensor × wide. The devices and their order are
  those of training, so that both layouts may meet in one compiled program.
  """
  rules = {**layout.rules, 'batch': (*layout.rules['batch'], 'context'), 'length': None}
  if not layout.rollout_tensor:
    return Layout(layout.mesh, rules)
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
  return Layout(_make_mesh(devices, tuple(sizes)), rules)


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
  # XLA does each of these three steps without a whole copy of the parameters, but
  # not all at once.
  steps: tuple[dict[str, Any], ...] = (
    {**_tensor_axes(), 'embed': ('fsdp', 'wide', 'context')},  # as training shards them
    {'embed': ('fsdp', 'context')},  # heads cut further
    {},  # gathered along the other axes
  )
  for changes in steps:
    step = dataclasses.replace(decoding, rules={**decoding.rules, **changes})
    shardings = step.shardings(axes, params)
    params = jax.tree.map(jax.lax.with_sharding_constraint, params, shardings)
  return params


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_rows(part: jax.Array, axes: Any, dtype: Any) -> jax.Array:
  """Gathers a matrix that is cut along its first axis, sent in `dtype`; in a shard_map."""
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
  # Without the barrier XLA sums whole gradients over micro-batches, and scatters
  # afterwards.
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
      raise UserError('config.mesh.preset: auto needs to know the models; name the axes here')
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


def _axis_sizes(options: MeshOptions, devices: int) -> dict[str, int]:
  """Returns the size of each axis, the free one computed; they multiply to `devices`."""
  sizes = {name: getattr(options, name) for name in AXES}
  shown = {name: size for name, size in sizes.items() if name == 'data' or size != 1}
  text = ' × '.join(f'{name} {size}' for name, size in shown.items())
  free = [name for name, size in sizes.items() if size == -1]
  fixed = [size for size in sizes.values() if size != -1]
  if len(free) > 1 or any(size < 1 for size in fixed):
    raise UserError(f'config.mesh: {text}: sizes must be positive, one of them may be -1')
  if free:
    sizes[free[0]] = devices // math.prod(fixed)  # a remainder is refused below
  if math.prod(sizes.values()) != devices:
    raise UserError(f'config.mesh: {text} does not fit {devices} device(s)')
  return sizes


def _check_rollout_tensor(
  rollout_tensor: int,
  sizes: dict[str, int],
) -> None:
  """Raises UserError where decoding cannot cut parameters over so many devices."""
  if not rollout_tensor:
    return
  tensor = sizes['tensor']
  model_devices = sizes['fsdp'] * tensor
  if rollout_tensor < 0 or rollout_tensor % tensor or model_devices % rollout_tensor:
    raise UserError(
      f'config.mesh.rollout_tensor: expected 0 or a multiple of tensor ({tensor}) that divides '
      f'fsdp × tensor ({model_devices}), got {rollout_tensor}'
    )


def _make_mesh(devices: np.ndarray, names: tuple[str, ...]) -> Mesh:
  """Returns a mesh on which XLA decides what is not constrained (axis type Auto)."""
  return Mesh(devices, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def _tensor_axes() -> dict[str, str]:
  """Returns the rules of the array axes that `tensor` cuts: heads, MLP and vocabulary."""
  return {name: axis for name, axis in RULES.items() if axis == 'tensor'}


def _check_divides(
  layout: Layout,
  parameter: str,
  shape: Sequence[int],
  names: Names,
) -> None:
  """Raises UserError where a dimension does not divide over its mesh axes."""
  for size, name, entry in zip(shape, names, layout.spec(names)):
    ways = _ways(layout.mesh, entry)
    if size % ways:
      raise UserError(
        f'mesh: {parameter} has {name} = {size}, which does not divide over {ways} devices '
        f'({", ".join(_as_tuple(entry))}); choose another mesh'
      )


def _place_rows(x: Any, sharding: NamedSharding) -> jax.Array:
  """Puts one host array [B, …] on the mesh; one that is there already stays as it is."""
  if isinstance(x, jax.Array) and len(x.sharding.device_set) == sharding.mesh.size:
    return x
  return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)


def _abstract_array(
  shape: jax.ShapeDtypeStruct,
  sharding: NamedSharding,
) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _ways(mesh: Mesh, entry: str | Sequence[str] | None) -> int:
  """Returns into how many parts an entry of a partition cuts an axis."""
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
