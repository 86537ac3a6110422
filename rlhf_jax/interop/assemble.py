"""Sharded parameters from a file of any kind: checked against the family's table, read in pieces.

A device's piece of a leaf is read, placed on the device and released before the next one is read.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.interop import families
from rlhf_jax.interop.tensors import Fetch, Slices, Tensor
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import Params

Shapes = Mapping[str, tuple[int, ...]]

OUTPUT_MATRIX = 'lm_head.weight'
SCORE = 'score.weight'
UNPREFIXED = (OUTPUT_MATRIX, SCORE)  # never under the family's prefix
NAMED_IN_ERRORS = 3  # wrong tensors that an error lists before it counts the rest
COMPARED_ROWS = 4096  # rows of a second output matrix that are compared at once


def assemble_parameters(
  config: ModelConfig,
  shapes: Shapes,
  fetch: Fetch,
  shardings: Any,
  where: str,
  bias: float = 0.0,
) -> Params:
  """Reads the parameters of a model.

  Args:
    config: the shape; with `head` and no score in the file, `score` is left out.
    shapes: the file's shapes by Hugging Face name.
    fetch: reads a part of a tensor by Hugging Face name.
    shardings: a tree like the parameters, possibly with more leaves; None: whole arrays on the
      first device.
    where: what errors call the file.
    bias: of the scalar head.

  Returns:
    The parameters, float32.

  Raises:
    UserError: tensors are missing, unknown or misshapen, or an output matrix differs from the
      embedding although config.json ties them; names the first few and what was expected.
  """
  file_names = _names_with_prefix(config, shapes)
  shapes = {name: shapes[file_name] for name, file_name in file_names.items()}
  fetch = functools.partial(_fetch_renamed, fetch, file_names)
  table = [
    tensor
    for tensor in families.list_tensors(config)
    if tensor.path != 'score.kernel' or SCORE in shapes  # a language model has no score yet
  ]
  _check_tensors(config, table, shapes, fetch, where)
  params: dict[str, Any] = {}
  for tensor in table:
    leaf = _read_leaf(config, tensor, fetch, _find_leaf(shardings, tensor.keys))
    _set_leaf(params, tensor.keys, leaf)
  if 'score' in params:
    sharding = _find_leaf(shardings, ['score', 'bias'])
    params['score']['bias'] = _place_scalar(bias, sharding)
  return params


def _names_with_prefix(config: ModelConfig, shapes: Shapes) -> dict[str, str]:
  """Maps the table's names to the file's, which lack the family's prefix in some files."""
  prefix = families.FAMILIES[config.family].prefix
  if any(name.startswith(prefix) for name in shapes):
    return {name: name for name in shapes}
  return {name if name in UNPREFIXED else prefix + name: name for name in shapes}


def _fetch_renamed(
  fetch: Fetch,
  file_names: Mapping[str, str],
  name: str,
  slices: Slices,
) -> np.ndarray:
  """Fetches a part of a tensor by the table's name."""
  return fetch(file_names[name], slices)


def _check_tensors(
  config: ModelConfig,
  table: list[Tensor],
  shapes: Shapes,
  fetch: Fetch,
  where: str,
) -> None:
  """Refuses a file whose tensors are not those of the table."""
  expected = {name: tensor.file_shape(config) for tensor in table for name in tensor.names(config)}
  # Some files hold a tied matrix twice.
  has_copy = config.tied and not config.head and OUTPUT_MATRIX in shapes
  problems = [_missing(config, name) for name in expected if name not in shapes]
  for name in shapes:
    is_copy = has_copy and name == OUTPUT_MATRIX
    if name not in expected and not is_copy and not families.may_ignore(config, name):
      problems.append(f'unknown {name}')
  for name, shape in expected.items():
    if name in shapes and shapes[name] != shape:
      problems.append(f'{name} is {list(shapes[name])}, expected {list(shape)}')
  if has_copy and not problems:
    embedding = table[0].names(config)[0]
    if not _is_copy(config, embedding, shapes, fetch):
      problems.append(
        f'{OUTPUT_MATRIX} is not {embedding}, expected so because config.json ties the two '
        '(tie_word_embeddings: set it to false)'
      )
  if problems:
    first = '; '.join(problems[:NAMED_IN_ERRORS])
    rest = len(problems) - NAMED_IN_ERRORS
    more = f'; and {rest} more' if rest > 0 else ''
    raise UserError(f'{where}: tensors do not fit the config: {first}{more}')


def _missing(config: ModelConfig, name: str) -> str:
  """Says that a tensor is missing, and why it is expected where a reader would wonder."""
  if name == OUTPUT_MATRIX and not config.tied:
    return f'missing {name} (config.json says that it is not tied to the embedding)'
  return f'missing {name}'


def _is_copy(config: ModelConfig, embedding: str, shapes: Shapes, fetch: Fetch) -> bool:
  """Tells whether the output matrix is the embedding again, some rows after the other."""
  if shapes[OUTPUT_MATRIX] != shapes[embedding]:
    return False
  rows = config.vocab_size
  for start in range(0, rows, COMPARED_ROWS):
    part = (slice(start, min(start + COMPARED_ROWS, rows)), slice(None))
    if not np.array_equal(fetch(embedding, part), fetch(OUTPUT_MATRIX, part)):
      return False
  return True


def _read_leaf(
  config: ModelConfig,
  tensor: Tensor,
  fetch: Fetch,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """Reads one leaf onto its devices; devices with the same piece share one reading of it."""
  if sharding is None:
    return jnp.asarray(tensor.read(config, fetch))
  shape = tensor.shape(config)
  arrays: list[jax.Array] = []
  for index, devices in _devices_by_piece(sharding, shape):
    piece = tensor.read(config, fetch, index)
    arrays += _put_on_each(piece, devices)
    del piece
    # JAX releases the host's piece at the next transfer: make it this one.
    jax.device_put(np.zeros(()), devices[0])
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _place_scalar(value: float, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Places a float32 scalar."""
  scalar = np.float32(value)
  if sharding is None:
    return jnp.asarray(scalar)
  arrays: list[jax.Array] = []
  for _, devices in _devices_by_piece(sharding, ()):
    arrays += _put_on_each(scalar, devices)
  return jax.make_array_from_single_device_arrays((), sharding, arrays)


def _devices_by_piece(
  sharding: jax.sharding.Sharding,
  shape: tuple[int, ...],
) -> list[tuple[Slices, list[jax.Device]]]:
  """Lists the distinct pieces of an array and this process's devices that keep each of them."""
  pieces: dict[Any, tuple[Slices, list[jax.Device]]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    assert index is not None  # None only where a sharding leaves a device out
    bounds = tuple((cut.start, cut.stop) for cut in index)  # slices cannot be hashed
    pieces.setdefault(bounds, (index, []))[1].append(device)
  return list(pieces.values())


def _put_on_each(piece: Any, devices: list[jax.Device]) -> list[jax.Array]:
  """Copies a piece to each device and waits until it is there."""
  copies = [jax.device_put(piece, device) for device in devices]
  return jax.block_until_ready(copies)


def _find_leaf(tree: Any, keys: list[str]) -> Any:
  """Returns the leaf under these keys, None where there is no tree."""
  if tree is None:
    return None
  for key in keys:
    tree = tree[key]
  return tree


def _set_leaf(tree: dict[str, Any], keys: list[str], leaf: Any) -> None:
  """Puts a leaf under these keys and makes the dicts on the way."""
  *parents, last = keys
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf
