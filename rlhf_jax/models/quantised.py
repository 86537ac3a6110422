"""Storage formats of frozen parameters: float32, bfloat16, or 8 or 4 bits with qwix.

Each layer dequantises its matrices when it computes. `int8` has a scale for each
output; `int4` and `nf4` (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section
3) have one for each block of at most 64 inputs of an output. Only the matrices of
the layers are quantised; embeddings are then stored in bfloat16, and vectors in
float32.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.model_config import TARGETS
from rlhf_jax.types import MATRIX_AXES, Params

# Storage format → bytes of one entry of a matrix.
BYTES = {
  'float32': 4,
  'bfloat16': 2,
  'int8': 1,
  'int4': 0.5,
  'nf4': 0.5,
}
KINDS = tuple(BYTES)
QUANTISED_KINDS = KINDS[2:]  # the formats that qwix quantises to
BLOCK = 64  # inputs that share a scale in int4 and nf4

# (function, shardings, leaf) → function(leaf), created with these shardings
Create = Callable[[Callable[..., Any], Any, Any], Any]


def create_on_devices(function: Callable[..., Any], shardings: Any, leaf: Any) -> Any:
  """Computes function(leaf) in a compiled call, whose result is created sharded.

  Args:
    function: leaf → a tree of arrays.
    shardings: the shardings of the result.
    leaf: an array.
  """
  return jax.jit(function, out_shardings=shardings)(leaf)


def convert(params: Params, kind: str, create: Create = create_on_devices) -> Params:
  """Converts a tree of parameters to a storage format, one leaf after the other.

  Args:
    params: float32 parameters; every leaf keeps its sharding.
    kind: one of KINDS.
    create: (function, shardings, leaf) → function(leaf). `Layout.create` of
      runtime/mesh.py also works for devices that are only described by a topology.

  Returns:
    The converted tree; quantised leaves are qwix's QArray.

  Raises:
    UserError: there is no such format, or qwix is not installed.
  """
  if kind not in KINDS:
    raise UserError(f'lora.base: expected one of {", ".join(KINDS)}, got {kind!r}')
  if kind == 'float32':
    return params
  converted = {
    path: _convert_leaf(path, leaf, kind, create)
    for path, leaf in traverse_util.flatten_dict(params).items()
  }
  return traverse_util.unflatten_dict(converted)


def restore(leaf: Any, dtype: Any) -> jax.Array:
  """Converts a stored leaf back to a plain array.

  Args:
    leaf: an array, or qwix's QArray.
    dtype: the dtype of the result.

  Returns:
    An array of the leaf's shape.
  """
  if is_quantised(leaf):
    leaf = _import_qwix().dequantize(leaf)
  return leaf.astype(dtype)


def restore_all(weights: dict[str, Any], dtype: Any) -> dict[str, jax.Array]:
  """Dequantises the quantised leaves of one layer; the others stay as they are.

  Args:
    weights: the leaves by name.
    dtype: the dtype of those that are dequantised.
  """
  return {
    name: restore(leaf, dtype) if is_quantised(leaf) else leaf for name, leaf in weights.items()
  }


def is_quantised(leaf: Any) -> bool:
  """Tells whether a leaf is qwix's QArray, without importing qwix."""
  return hasattr(leaf, 'qvalue')


def _convert_leaf(path: tuple[str, ...], leaf: Any, kind: str, create: Create) -> Any:
  """Converts one leaf according to its path and the storage format."""
  is_matrix = path[0] == 'layers' and path[-1] in TARGETS
  is_embedding = path[0] in ('embedding', 'unembedding', 'positions')
  if is_matrix and kind in QUANTISED_KINDS:
    return _quantise(leaf, kind, path[-1], create)
  if is_matrix or is_embedding:
    return create(_to_bfloat16, leaf.sharding, leaf)
  return leaf


def _to_bfloat16(leaf: jax.Array) -> jax.Array:
  """Casts an array to bfloat16."""
  return leaf.astype(jnp.bfloat16)


def _quantise(leaf: jax.Array, kind: str, name: str, create: Create) -> Any:
  """Quantises [L, (E,) inputs…, outputs…] to a QArray, sharded as the leaf is."""
  quantise = functools.partial(
    _import_qwix().quantize,
    **_quantisation_arguments(leaf.shape, kind, name),
  )
  sharding = leaf.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    parts = jax.eval_shape(quantise, leaf)  # quantised values and scales
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    sharding = jax.tree.map(
      functools.partial(_fit_sharding, sharding.mesh, spec),
      parts,
    )
  return create(quantise, sharding, leaf)


def _quantisation_arguments(
  shape: tuple[int, ...],
  kind: str,
  name: str,
) -> dict[str, Any]:
  """Returns the arguments of qwix.quantize for a matrix of this name and shape."""
  # Before the axes of inputs and outputs may stand those of layers and experts.
  count, outputs = MATRIX_AXES[name]
  first = len(shape) - count - outputs
  inputs = range(first, first + count)
  others = [axis for axis in range(len(shape)) if axis not in inputs]
  if kind == 'int8':
    return {'qtype': jnp.int8, 'channelwise_axes': others}
  return {
    'qtype': jnp.int4 if kind == 'int4' else 'nf4',
    'channelwise_axes': [*others, *inputs[:-1]],
    'tiled_axes': {inputs[-1]: math.gcd(shape[inputs[-1]], BLOCK)},
  }


def _fit_sharding(
  mesh: Any,
  spec: tuple[Any, ...],
  part: jax.ShapeDtypeStruct,
) -> jax.sharding.NamedSharding:
  """Returns a leaf's sharding for its values or scales; axes that do not divide stay whole."""
  entries = [
    entry if entry and size % _devices_along(mesh, entry) == 0 else None
    for size, entry in zip(part.shape, spec)
  ]
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*entries))


def _devices_along(mesh: Any, entry: str | tuple[str, ...]) -> int:
  """Returns the number of devices along one mesh axis or several."""
  axes = (entry,) if isinstance(entry, str) else entry
  return math.prod(mesh.shape[axis] for axis in axes)


def _import_qwix() -> Any:
  """Imports qwix, which is optional.

  Raises:
    UserError: it is not installed.
  """
  try:
    import qwix
  except ImportError:
    raise UserError(
      "lora.base: int8, int4 and nf4 need qwix, run: pip install 'rlhf_jax[qwix]'"
    ) from None
  return qwix
