"""How frozen parameters are kept: as they are, in bfloat16, or in 8 or 4 bits (qwix).

Each layer restores its quantised matrices when it computes. `int8` has a scale for each
output; `int4` and `nf4` (QLoRA: Dettmers et al. 2023, arXiv:2305.14314, section 3) for
each block of at most 64 inputs of an output. Only the matrices of the layers are
quantised; the embedding is then bfloat16, vectors stay float32.
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
from rlhf_jax.types import Params

# Bytes of a parameter of a matrix, by how it is kept.
BYTES = {
  'float32': 4,
  'bfloat16': 2,
  'int8': 1,
  'int4': 0.5,
  'nf4': 0.5,
}
KINDS = tuple(BYTES)
SMALL = KINDS[2:]  # those that are quantised, by qwix
BLOCK = 64  # inputs that share a scale in int4 and nf4

# (function, shardings, leaf) → function(leaf), laid out so
Create = Callable[[Callable[..., Any], Any, Any], Any]


def create_on_devices(function: Callable[..., Any], shardings: Any, leaf: Any) -> Any:
  """Computes function(leaf), compiled, its result laid out from the first moment."""
  return jax.jit(function, out_shardings=shardings)(leaf)


def keep(params: Params, kind: str, create: Create = create_on_devices) -> Params:
  """Converts a tree of parameters leaf by leaf, each where it lies.

  Args:
    params: float32.
    kind: one of KINDS.
    create: (function, shardings, leaf) → its result; runtime/mesh.py: Layout.create,
      which also knows devices that are not here.

  Returns:
    The same tree; quantised leaves are qwix's QArray.

  Raises:
    UserError: there is no such kind, or qwix is not installed.
  """
  if kind not in KINDS:
    raise UserError(f'lora.base: expected one of {", ".join(KINDS)}, got {kind!r}')
  if kind == 'float32':
    return params
  kept = {
    path: _keep_leaf(path, leaf, kind, create)
    for path, leaf in traverse_util.flatten_dict(params).items()
  }
  return traverse_util.unflatten_dict(kept)


def restore(leaf: Any, dtype: Any) -> jax.Array:
  """Restores a kept leaf.

  Args:
    leaf: an array or a quantised one.
    dtype: of the result.

  Returns:
    An array of the leaf's shape.
  """
  if is_quantised(leaf):
    leaf = _import_qwix().dequantize(leaf)
  return leaf.astype(dtype)


def restore_all(weights: dict[str, Any], dtype: Any) -> dict[str, jax.Array]:
  """Restores the leaves of one layer that are quantised; the others stay as they are.

  Args:
    weights: by name.
    dtype: of those that are restored.
  """
  return {
    name: restore(leaf, dtype) if is_quantised(leaf) else leaf for name, leaf in weights.items()
  }


def is_quantised(leaf: Any) -> bool:
  """Tells whether a leaf is qwix's QArray, without importing qwix."""
  return hasattr(leaf, 'qvalue')


def _keep_leaf(path: tuple[str, ...], leaf: Any, kind: str, create: Create) -> Any:
  """Converts one leaf as its place in the tree and the kind say."""
  is_matrix = path[0] == 'layers' and path[-1] in TARGETS
  is_embedding = path[0] in ('embedding', 'unembedding', 'positions')
  if is_matrix and kind in SMALL:
    return _quantise(leaf, kind, path[-1], create)
  if is_matrix or is_embedding:
    return create(_to_bfloat16, leaf.sharding, leaf)
  return leaf


def _to_bfloat16(leaf: jax.Array) -> jax.Array:
  """Casts an array."""
  return leaf.astype(jnp.bfloat16)


def _quantise(leaf: jax.Array, kind: str, name: str, create: Create) -> Any:
  """Quantises [L, (E,) inputs…, outputs…] to a QArray, laid out as the leaf is."""
  quantise = functools.partial(
    _import_qwix().quantize,
    **_quantisation(leaf.shape, kind, name),
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


def _quantisation(shape: tuple[int, ...], kind: str, name: str) -> dict[str, Any]:
  """Returns the arguments of qwix for a matrix of this name and shape."""
  # the MLP's matrices have one axis of inputs, the last but one (experts stand before);
  # attention's `output` has two, heads and head_dim
  first = len(shape) - 2 if name in ('gate', 'up', 'down') else 1
  last = first + 1 if name == 'output' else first
  inputs = range(first, last + 1)
  others = [axis for axis in range(len(shape)) if axis not in inputs]
  if kind == 'int8':
    return {'qtype': jnp.int8, 'channelwise_axes': others}
  return {
    'qtype': jnp.int4 if kind == 'int4' else 'nf4',
    'channelwise_axes': [*others, *inputs[:-1]],
    'tiled_axes': {last: math.gcd(shape[last], BLOCK)},
  }


def _fit_sharding(
  mesh: Any,
  spec: tuple[Any, ...],
  part: jax.ShapeDtypeStruct,
) -> jax.sharding.NamedSharding:
  """Returns a leaf's sharding for a part of it; axes that do not divide stay whole."""
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
      "a base of int8, int4 or nf4 needs qwix: pip install 'rlhf_jax[qwix]'"
    ) from None
  return qwix
