"""Safetensors files, one or several with an index: parts of tensors in, models out by shards."""

from collections.abc import Callable, Mapping
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import UserError
from rlhf_jax.interop.json_files import read_json, write_json
from rlhf_jax.interop.tensors import Fetch, Slices

WEIGHTS = 'model.safetensors'  # where one file holds all weights
INDEX = 'model.safetensors.index.json'  # where several do: tensor → file
METADATA = {'format': 'pt'}  # transformers refuses files without it


def open_weights(directory: Path) -> tuple[dict[str, tuple[int, ...]], Fetch]:
  """Opens the weights of a Hugging Face directory; nothing is read yet.

  Returns:
    The shapes by name, and a function that reads a part of a tensor and nothing else.

  Raises:
    UserError: there are no weights, only pickled weights, or a file is damaged.
  """
  file_of: dict[str, Any] = {}  # name of a tensor → the open file that holds it
  for path in _weight_files(directory):
    file = open_safetensors(path)
    file_of.update(dict.fromkeys(file.keys(), file))
  shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in file_of.items()}
  return shapes, functools.partial(_fetch, file_of)


def open_safetensors(path: Path) -> Any:
  """Opens a file, in the library's own class.

  Raises:
    UserError: it is not there or damaged.
  """
  try:
    return safetensors.safe_open(path, 'numpy')
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except safetensors.SafetensorError as error:
    raise UserError(f'{path}: damaged ({error})') from None


def _fetch(file_of: Mapping[str, Any], name: str, slices: Slices) -> np.ndarray:
  """Reads a part of a tensor."""
  return file_of[name].get_slice(name)[slices]


def _weight_files(directory: Path) -> list[Path]:
  """Lists the files that hold a directory's weights; those of an index need not exist."""
  index = directory / INDEX
  if index.is_file():
    names = set(read_json(index).get('weight_map', {}).values())
    return [directory / name for name in sorted(names)]
  if (directory / WEIGHTS).is_file():
    return [directory / WEIGHTS]
  if list(directory.glob('*.bin')):  # pickles run code when they are opened
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
  """Writes tensors to one file, or to several and an index; holds one shard in memory at a time.

  Args:
    directory: an existing folder.
    entries: what to write, in this order.
    shard_bytes: the most bytes of a file; a larger tensor has a file of its own.
    writes: whether this process writes. All processes make every tensor, because the gathering
      of a sharded one needs them all.
  """
  shards = _split_into_shards(entries, shard_bytes)
  weight_map = {}
  for number, shard in enumerate(shards, 1):
    file_name = _shard_name(number, len(shards))
    tensors = {}
    for entry in shard:
      weight_map[entry.name] = file_name
      tensor = entry.make()
      if writes:
        tensors[entry.name] = tensor
    if writes:
      safetensors.numpy.save_file(tensors, directory / file_name, metadata=METADATA)
  if writes and len(shards) > 1:
    total_size = sum(entry.size for entry in entries)
    index = {'metadata': {'total_size': total_size}, 'weight_map': weight_map}
    write_json(directory / INDEX, index, sort_keys=True)


def _split_into_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
  """Splits entries, in order, so that each shard fits into a file."""
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
  """Names a file as transformers does."""
  if count == 1:
    return WEIGHTS
  return f'model-{number:05}-of-{count:05}.safetensors'
