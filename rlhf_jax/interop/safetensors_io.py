"""Reading and writing of weights in one safetensors file, or in several with an index.

Parts of tensors can be read alone; models are written shard by shard.
"""

from collections.abc import Callable, Mapping
import functools
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from rlhf_jax import files, fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.tensors import Fetch, Slices

WEIGHTS = 'model.safetensors'  # the file, if one holds all weights
INDEX = 'model.safetensors.index.json'  # the index of several files: tensor → file
METADATA = {'format': 'pt'}  # transformers refuses files without it


FLOATS = ('F64', 'F32', 'F16', 'BF16')  # supported types, by their names in safetensors


def open_weights(directory: Path) -> tuple[dict[str, tuple[int, ...]], Fetch]:
  """Opens the weights of a Hugging Face directory, without reading any tensor.

  Returns:
    (name of a tensor → its shape, a function that reads only a part of a tensor and refuses
    numbers that are not finite).

  Raises:
    UserError: there are no weights, only pickled weights, or several sets of them; a file is
      damaged; or the index does not agree with the files about where a tensor is.
  """
  index = directory / INDEX
  stated: dict[str, str] = {}  # tensor → file
  if index.is_file():
    stated = _read_index(index)
  paths = _weight_files(directory, stated)
  file_of: dict[str, Any] = {}  # name of a tensor → the open file that holds it
  path_of: dict[str, Path] = {}
  for path in paths:
    file = open_safetensors(path)
    for name in file.keys():
      if name in path_of:
        raise UserError(f'{directory}: {name} is in {path_of[name].name} and in {path.name} too')
      file_of[name] = file
      path_of[name] = path
  for name, file_name in stated.items():
    if name not in path_of or path_of[name].name != file_name:
      raise UserError(f'{index}: {name} is not in {file_name}, where the index has it')
  shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in file_of.items()}
  return shapes, functools.partial(_fetch, file_of, str(directory))


def open_safetensors(path: Path) -> Any:
  """Opens a safetensors file, as an object of the safetensors library.

  Raises:
    UserError: the file is missing or damaged.
  """
  fingerprints.check_file(path)
  try:
    return safetensors.safe_open(path, 'numpy')
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f'{path}: damaged ({error})') from None


def check_dtype(dtype: str, name: str, where: str) -> None:
  """Refuses a tensor that is not of floating-point numbers, such as a quantised one."""
  if dtype not in FLOATS:
    raise UserError(f'{where}: {name} is of {dtype}, expected one of {", ".join(FLOATS)}')


def check_finite(values: np.ndarray, name: str, where: str) -> None:
  """Refuses a tensor that contains NaN or infinity, because any result would be useless."""
  if not np.isfinite(values).all():
    raise UserError(f'{where}: {name} has numbers that are not finite (NaN or infinity)')


def _fetch(file_of: Mapping[str, Any], where: str, name: str, slices: Slices) -> np.ndarray:
  """Reads a part of a tensor, and checks its numbers."""
  part = file_of[name].get_slice(name)
  check_dtype(part.get_dtype(), name, where)
  values = part[slices]
  check_finite(values, name, where)
  return values


def _read_index(path: Path) -> dict[str, str]:
  """Reads an index: tensor → name of the file in the same directory that holds it."""
  weight_map = read_json(path).get('weight_map')
  fits = isinstance(weight_map, Mapping) and all(
    isinstance(name, str) and Path(name).name == name for name in weight_map.values()
  )
  if not fits or not weight_map:
    raise UserError(f'{path}: expected a weight_map of tensors and the files beside it')
  return dict(weight_map)


def _weight_files(directory: Path, stated: Mapping[str, str]) -> list[Path]:
  """Lists the weight files of a directory; files that the index names may be missing."""
  names = sorted(set(stated.values()))
  has_whole = (directory / WEIGHTS).is_file()
  if has_whole and names and names != [WEIGHTS]:
    raise UserError(
      f'{directory}: two sets of weights, {WEIGHTS} and the files that {INDEX} names; expected '
      'one of them (transformers reads the first)'
    )
  if names:
    return [directory / name for name in names]
  if has_whole:
    return [directory / WEIGHTS]
  if list(directory.glob('*.bin')):  # not read, because opening a pickle can run any code
    raise UserError(
      f'{directory}: only pickled weights (.bin), expected {WEIGHTS}; with torch installed: '
      'AutoModelForCausalLM.from_pretrained(d).save_pretrained(d)'
    )
  raise UserError(f'{directory}: no {WEIGHTS}')


class Entry(NamedTuple):
  """A tensor to write."""

  name: str
  size: int  # bytes
  make: Callable[[], np.ndarray]  # gathers the tensor; every process must call it


def write_weights(
  directory: Path,
  entries: list[Entry],
  shard_bytes: int,
  writes: bool,
) -> None:
  """Writes tensors to one file, or to several with an index; holds one shard in memory at a time.

  Args:
    directory: an existing folder.
    entries: the tensors to write, in this order.
    shard_bytes: the largest number of bytes in a file; a larger tensor gets a file of its own.
    writes: whether this process writes the files. All processes must make every tensor, because
      gathering a sharded tensor needs all of them.
  """
  shards = _split_into_shards(entries, shard_bytes)
  weight_map = {}
  progress = tqdm.tqdm(
    total=sum(entry.size for entry in entries),
    desc=f'writes {directory.parent.name}/{directory.name.removesuffix(files.PART)}',
    unit='B',
    unit_scale=True,
    leave=False,
    disable=None if writes else True,  # None = shown on a terminal only
  )
  for number, shard in enumerate(shards, 1):
    file_name = _shard_name(number, len(shards))
    tensors = {}
    for entry in shard:
      weight_map[entry.name] = file_name
      tensor = entry.make()
      progress.update(entry.size)
      if writes:
        tensors[entry.name] = tensor
    if writes:
      write_tensors(directory / file_name, tensors, METADATA)
  progress.close()
  if writes and len(shards) > 1:
    total_size = sum(entry.size for entry in entries)
    index = {'metadata': {'total_size': total_size}, 'weight_map': weight_map}
    write_json(directory / INDEX, index, sort_keys=True)


def write_tensors(
  path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None
) -> None:
  """Writes one file of tensors.

  Raises:
    OSError: the operating system refuses it, as on a full disk.
  """
  try:
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
  except safetensors.SafetensorError as error:
    found = re.search(r'os error (\d+)', str(error))  # its number is only in the text
    if found is None:
      raise
    number = int(found[1])
    raise OSError(number, os.strerror(number)) from error


def _split_into_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
  """Splits entries, in order, into shards of at most `shard_bytes` or of one larger entry."""
  shards: list[list[Entry]] = [[]]
  room = shard_bytes
  for entry in entries:
    if entry.size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(entry)
    room -= entry.size
  return shards


def _shard_name(number: int, count: int) -> str:
  """Returns the name of a weight file, as transformers names it."""
  if count == 1:
    return WEIGHTS
  return f'model-{number:05}-of-{count:05}.safetensors'
