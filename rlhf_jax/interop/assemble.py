"""Reading of sharded parameters from a weight file of any format.

The file's tensors are checked against the family's table first. Then each device's piece of a leaf
is read, placed on the device and released before the next piece is read.
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
UNPREFIXED = (OUTPUT_MATRIX, SCORE)  # names that never have the family's prefix
NAMED_IN_ERRORS = 3  # number of wrong tensors that an error names; the others are only counted
COMPARED_ROWS = 4096  # rows of the output matrix and the embedding that are compared at once


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
    config: the shape of the model. With `head`, but without a score in the file, the result has
      no `score`.
    shapes: Hugging Face's name of each tensor in the file → its shape.
    fetch: reads a part of a tensor, by Hugging Face's name.
    shardings: a tree like the parameters, possibly with more leaves; None: whole
      arrays on the first device.
    where: the name of the file in error messages.
    bias: the bias of the scalar head.

  Returns:
    The parameters, float32.

  Raises:
    UserError: tensors are missing, unknown or of a wrong shape, or the output matrix differs from
      the embedding although config.json ties them. The message names the first
      few tensors and what was expected.
  """
  file_names = _names_with_prefix(config, shapes)
  shapes = {name: shapes[file_name] for name, file_name in file_names.items()}
  fetch = functools.partial(_fetch_renamed, fetch, file_names)
  table = [
    tensor
    for tensor in families.list_tensors(config)
    if tensor.path != 'score.kernel' or SCORE in shapes  # a language model's file has no score
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
  """Maps the names in the table to those in the file; some files omit the family's prefix."""
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
  """Fetches a part of a tensor, by its name in the family's table."""
  return fetch(file_names[name], slices)


def _check_tensors(
  config: ModelConfig,
  table: list[Tensor],
  shapes: Shapes,
  fetch: Fetch,
  where: str,
) -> None:
  """Refuses a file whose tensors differ from those of the family's table."""
  expected = {name: tensor.file_shape(config) for tensor in table for name in tensor.names(config)}
  # Some files contain the tied matrix twice, as embedding and as output matrix.
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
  """Formats the message for a missing tensor; for the output matrix it says why it is expected."""
  if name == OUTPUT_MATRIX and not config.tied:
    return f'missing {name} (config.json says that it is not tied to the embedding)'
  return f'missing {name}'


def _is_copy(config: ModelConfig, embedding: str, shapes: Shapes, fetch: Fetch) -> bool:
  """Tells whether the output matrix equals the embedding; compares a block of rows at a time."""
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
  """Reads one leaf onto its devices; a piece that several devices hold is read only once."""
  if sharding is None:
    return jnp.asarray(tensor.read(config, fetch))
  shape = tensor.shape(config)
  arrays: list[jax.Array] = []
  for index, devices in _devices_by_piece(sharding, shape):
    piece = tensor.read(config, fetch, index)
    arrays += _put_on_each(piece, devices)
    del piece
    # JAX releases the piece on the host only at the next transfer, so make a small one now.
    jax.device_put(np.zeros(()), devices[0])
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _place_scalar(value: float, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """Places a float32 scalar on its devices."""
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
  """Lists the distinct pieces of an array, each with the devices of this process that hold it."""
  pieces: dict[Any, tuple[Slices, list[jax.Device]]] = {}
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    assert index is not None  # None only where a sharding leaves a device out
    bounds = tuple((cut.start, cut.stop) for cut in index)  # slices cannot be hashed
    pieces.setdefault(bounds, (index, []))[1].append(device)
  return list(pieces.values())


def _put_on_each(piece: Any, devices: list[jax.Device]) -> list[jax.Array]:
  """Copies a piece to each of the devices, and waits until the copies are complete."""
  copies = [jax.device_put(piece, device) for device in devices]
  return jax.block_until_ready(copies)


def _find_leaf(tree: Any, keys: list[str]) -> Any:
  """Returns the leaf at a path of keys; None where the tree is None."""
  if tree is None:
    return None
  for key in keys:
    tree = tree[key]
  return tree


def _set_leaf(tree: dict[str, Any], keys: list[str], leaf: Any) -> None:
  """Stores a leaf at a path of keys, and creates the dicts that are missing on the path."""
  *parents, last = keys
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = leaf
