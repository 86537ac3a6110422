"""Safetensors files, one or several with an index: parts of tensors in, whole models out, a shard at a time."""

import json
from pathlib import Path
from typing import Callable, NamedTuple

from jax.experimental import multihost_utils
import numpy as np
import safetensors
import safetensors.numpy

from rlhf_jax.errors import UserError

INDEX = 'model.safetensors.index.json'


def read_json(path: Path) -> dict:
  """What a JSON file holds.

  Raises:
    UserError: there is no such file, or it is not JSON.
  """
  try:
    return json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path}: not found') from None
  except ValueError as error:
    raise UserError(f'{path}: not JSON ({error})') from None


def open_weights(directory: Path):
  """The tensors of a directory.

  Returns:
    (shapes by name, fetch: (name, slices) → that part and nothing else, numpy).

  Raises:
    UserError: no weights, only pickled weights, or a damaged file.
  """
  holders = {}
  for path in _files(directory):
    try:
      file = safetensors.safe_open(path, 'numpy')
    except FileNotFoundError:
      raise UserError(f'{path}: not found') from None
    except safetensors.SafetensorError as error:
      raise UserError(f'{path}: damaged ({error})') from None
    holders.update(dict.fromkeys(file.keys(), file))
  shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in holders.items()}
  return shapes, lambda name, slices: holders[name].get_slice(name)[slices]


def _files(directory):
  index = directory / INDEX
  if index.is_file():
    return [directory / name for name in sorted(set(read_json(index).get('weight_map', {}).values()))]
  if (directory / 'model.safetensors').is_file():
    return [directory / 'model.safetensors']
  if list(directory.glob('*.bin')):
    raise UserError(f'{directory}: only pickled weights (.bin), expected model.safetensors; with torch installed: '
                    'AutoModelForCausalLM.from_pretrained(d).save_pretrained(d)')
  raise UserError(f'{directory}: no model.safetensors')


class Entry(NamedTuple):
  """A tensor to write: its name, its bytes, and how to make it (numpy)."""
  name: str
  size: int
  make: Callable[[], np.ndarray]


def write_weights(directory: Path, entries: list[Entry], shard_bytes: int, writes: bool) -> None:
  """Writes tensors into one file, or into several of at most shard_bytes (or one tensor) and an index. No more than a
  shard is in memory at a time.

  Args:
    writes: whether this process writes; all of them make every tensor, because a sharded one needs them all.
  """
  shards, room = [[]], shard_bytes
  for entry in entries:
    if entry.size > room and shards[-1]:
      shards.append([])
      room = shard_bytes
    shards[-1].append(entry)
    room -= entry.size
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    name = 'model.safetensors' if len(shards) == 1 else f'model-{i:05}-of-{len(shards):05}.safetensors'
    tensors = {}
    for entry in shard:
      weight_map[entry.name], made = name, entry.make()
      if writes:
        tensors[entry.name] = made
    if writes:
      safetensors.numpy.save_file(tensors, directory / name, metadata={'format': 'pt'})
  if writes and len(shards) > 1:
    index = {'metadata': {'total_size': sum(entry.size for entry in entries)}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n', 'utf-8')


def leaf_to_host(leaf) -> np.ndarray:
  """A global array, whole, on every process."""
  if getattr(leaf, 'is_fully_addressable', True):
    return np.asarray(leaf)
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
