"""Measures what reading a checkpoint onto eight devices costs: bytes read, and the host's memory.

  python scripts/measure_reading.py            # a random model of 1 GB
  python scripts/measure_reading.py --layers=4

It takes a minute, 4 GB of memory and 1 GB of disk, on Linux. The model is bfloat16 in files of at
most 200 MB; it is read as float32 with fsdp=8 on 8 forced CPU devices. Host memory is what the
process holds at its peak beyond what it held before and the arrays already placed; pages of files
that the system caches do not count.
"""

import argparse
import ctypes
import json
import os
from pathlib import Path
import re
import tempfile
import threading
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402

from rlhf_jax.interop import families, pretrained, safetensors_io  # noqa: E402
from rlhf_jax.models import transformer  # noqa: E402
from rlhf_jax.models.model_config import ModelConfig  # noqa: E402
from rlhf_jax.runtime import mesh  # noqa: E402

DEVICES = 8
FILE_BYTES = 200 * 10**6
SAMPLE_SECONDS = 0.005  # between two looks at the memory


def anonymous_memory() -> int:
  """Returns the bytes of this process that no file holds."""
  status = Path('/proc/self/status').read_text()
  match = re.search(r'RssAnon:\s+(\d+)', status)
  assert match is not None, 'not on Linux'
  return int(match[1]) * 1024


def write_model(folder: Path, config: ModelConfig) -> None:
  """Writes random weights, file by file."""
  random = np.random.default_rng(0)
  weight_map: dict[str, str] = {}
  part: dict[str, np.ndarray] = {}
  size = 0
  for tensor in families.list_tensors(config):
    for name in tensor.names(config):
      value = random.random(tensor.file_shape(config), np.float32).astype(jnp.bfloat16)
      if part and size + value.nbytes > FILE_BYTES:
        write_file(folder, part, weight_map)
        part = {}
        size = 0
      part[name] = value
      size += value.nbytes
  write_file(folder, part, weight_map)
  index = json.dumps({'weight_map': weight_map})
  (folder / safetensors_io.INDEX).write_text(index)
  (folder / 'config.json').write_text('{}')


def write_file(folder: Path, part: dict[str, np.ndarray], weight_map: dict[str, str]) -> None:
  """Writes the next file and notes what it holds."""
  number = len(set(weight_map.values())) + 1
  name = f'model-{number}.safetensors'
  safetensors.numpy.save_file(part, folder / name)
  weight_map.update(dict.fromkeys(part, name))


def count_reads(sizes: list[int]) -> None:
  """Makes every later reading of a part of a tensor note its bytes."""
  open_weights = pretrained.open_weights

  def open_counted(directory):
    shapes, fetch = open_weights(directory)

    def fetch_counted(name, slices):
      part = fetch(name, slices)
      sizes.append(part.nbytes)
      return part

    return shapes, fetch_counted

  pretrained.open_weights = open_counted


class MemoryWatch:
  """Notes the largest host memory beyond the placed arrays, in a thread."""

  def __init__(self):
    ctypes.CDLL(None).malloc_trim(0)  # gives back what writing left to the C allocator
    self.before = anonymous_memory()
    self.peak = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch)

  def __enter__(self) -> 'MemoryWatch':
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._thread.join()

  def _watch(self) -> None:
    while not self._done.wait(SAMPLE_SECONDS):
      placed = sum(array.nbytes for array in jax.live_arrays())
      self.peak = max(self.peak, anonymous_memory() - self.before - placed)


def report(file_sizes: list[int], reads: list[int], peak: int, params: Any) -> None:
  """Prints what was measured."""
  leaves = jax.tree.leaves(params)
  count = sum(leaf.size for leaf in leaves)
  on_first = [leaf.addressable_shards[0].data.nbytes for leaf in leaves]
  share_read = sum(reads) / DEVICES / sum(file_sizes)
  share_placed = sum(on_first) / (4 * count)
  print(
    f'{count / 1e6:.0f}M parameters, {mega(sum(file_sizes))} in {len(file_sizes)} files, '
    f'the largest {mega(max(file_sizes))}'
  )
  print(f'read: {mega(sum(reads))}, for each of {DEVICES} devices {share_read:.4f} of the files')
  print(f'placed: {mega(sum(on_first))} on the first device, {share_placed:.4f} of float32')
  print(
    f'host memory beyond the placed arrays: {mega(peak)}, the largest piece is '
    f'{mega(max(on_first))}'
  )


def mega(size: int) -> str:
  """Returns bytes in words."""
  return f'{size / 1e6:.0f} MB'


def main() -> None:
  """Writes a model, reads it and prints what that took."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--layers', type=int, default=16)
  config = ModelConfig(
    vocab_size=32000,
    embed=1536,
    layers=parser.parse_args().layers,
    heads=12,
    kv_heads=4,
    head_dim=128,
    mlp=6144,
    tied=False,
  )
  layout = mesh.make_layout({**mesh.DEFAULTS, 'data': 1, 'fsdp': DEVICES})
  model = transformer.build_model(config, layout)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = layout.shardings(model.axes, shapes)
  reads: list[int] = []
  with tempfile.TemporaryDirectory() as place:
    folder = Path(place)
    write_model(folder, config)
    file_sizes = [path.stat().st_size for path in folder.glob('*.safetensors')]
    count_reads(reads)
    with MemoryWatch() as watch:
      params = pretrained.load_parameters(folder, config, shardings)
    report(file_sizes, reads, watch.peak, params)


if __name__ == '__main__':
  main()
