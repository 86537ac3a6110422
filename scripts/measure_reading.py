"""Measures the cost of reading a checkpoint onto eight devices: bytes read, and host memory.

  python scripts/measure_reading.py            # a random model of 1.3 GB
  python scripts/measure_reading.py --layers=4

The default takes a minute, 4 GB of memory and 1.3 GB of disk. The model is bfloat16 in files of at
most 200 MB; it is read as float32 with fsdp=8 on 8 forced CPU devices. Host memory is the peak
memory of the process, minus its memory before reading, minus the arrays already placed on devices;
cached pages of files do not count. Linux only. Recorded results are in docs/models.md.
"""

import argparse
import ctypes
import functools
import os
from pathlib import Path
import re
import tempfile
import threading

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.interop import assemble, families, safetensors_io
from rlhf_jax.interop.tensors import Fetch, Slices
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import mesh
from rlhf_jax.types import Params

DEVICES = 8
FILE_BYTES = 200 * 10**6  # maximum size of a file
INTERVAL = 0.005  # seconds between two measurements of the memory


def main() -> None:
  """Writes a random model, reads it, and prints the measurements."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--layers', type=int, default=16)
  config = transformer.ModelConfig(
    vocab_size=32000,
    embed=1536,
    layers=parser.parse_args().layers,
    heads=12,
    kv_heads=4,
    head_dim=128,
    mlp=6144,
    tied=False,
  )
  with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    write_random_weights(directory, config)
    file_sizes = [path.stat().st_size for path in directory.glob('*.safetensors')]
    params, bytes_read, peak = read_weights(directory, config)
  report(params, file_sizes, bytes_read, peak)


def write_random_weights(directory: Path, config: ModelConfig) -> None:
  """Writes random bfloat16 weights of a model, in the format of an export."""
  rng = np.random.default_rng(0)
  entries: list[safetensors_io.Entry] = []
  for tensor in families.list_tensors(config):
    shape = tensor.file_shape(config)
    size = int(np.prod(shape)) * jnp.dtype(jnp.bfloat16).itemsize
    make = functools.partial(draw_tensor, rng, shape)
    entries.extend(safetensors_io.Entry(name, size, make) for name in tensor.names(config))
  safetensors_io.write_weights(directory, entries, FILE_BYTES, writes=True)


def draw_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  """Makes a random bfloat16 tensor."""
  return rng.random(shape, np.float32).astype(jnp.bfloat16)


def read_weights(directory: Path, config: ModelConfig) -> tuple[Params, int, int]:
  """Reads the weights onto the devices, as pretrained.load_parameters does.

  Returns:
    (the parameters, the bytes that were read, the peak of host memory in bytes).
  """
  layout = mesh.make_layout(mesh.MeshOptions(data=1, fsdp=DEVICES))
  model = transformer.build_model(config, layout)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = layout.shardings(model.axes, shapes)
  file_shapes, plain_fetch = safetensors_io.open_weights(directory)
  fetch = CountingFetch(plain_fetch)
  ctypes.CDLL(None).malloc_trim(0)  # returns memory that was freed after writing to the system
  with MemoryWatch() as watch:
    params = assemble.assemble_parameters(
      config,
      file_shapes,
      fetch,
      shardings,
      str(directory),
      bias=0.0,
    )
  return params, fetch.bytes_read, watch.peak


class CountingFetch:
  """Reads parts of tensors, and counts their bytes."""

  def __init__(self, fetch: Fetch):
    self.fetch = fetch
    self.bytes_read = 0

  def __call__(self, name: str, slices: Slices) -> np.ndarray:
    """Reads a part of a tensor."""
    value = self.fetch(name, slices)
    self.bytes_read += value.nbytes
    return value


class MemoryWatch:
  """Watches host memory from a thread while its `with` block runs.

  Attributes:
    peak: the peak of the process's memory in bytes, minus its memory before the block, minus the
      arrays on the devices (forced CPU devices keep their arrays in host memory).
  """

  def __init__(self):
    self.peak = 0
    self.before = 0
    self.done = threading.Event()
    self.thread = threading.Thread(target=self._watch)

  def __enter__(self) -> 'MemoryWatch':
    self.before = host_memory()
    self.thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self.done.set()
    self.thread.join()

  def _watch(self) -> None:
    while not self.done.wait(INTERVAL):
      placed = sum(array.nbytes for array in jax.live_arrays())
      self.peak = max(self.peak, host_memory() - self.before - placed)


def host_memory() -> int:
  """Returns the resident memory of this process that is not backed by files, in bytes."""
  status = Path('/proc/self/status').read_text()
  [kilobytes] = re.findall(r'RssAnon:\s+(\d+)', status)
  return int(kilobytes) * 1024


def report(params: Params, file_sizes: list[int], bytes_read: int, peak: int) -> None:
  """Prints the measurements.

  Args:
    params: the parameters, float32, sharded over the devices.
    file_sizes: the size of each file in bytes.
    bytes_read: bytes read from all files for all devices.
    peak: the peak of host memory in bytes.
  """
  leaves = jax.tree.leaves(params)
  parameters = sum(leaf.size for leaf in leaves)
  pieces = [leaf.addressable_shards[0].data.nbytes for leaf in leaves]  # on the first device
  total = sum(file_sizes)
  share_read = bytes_read / DEVICES / total
  share_placed = sum(pieces) / sum(leaf.nbytes for leaf in leaves)
  print(
    f'{parameters / 1e6:.0f}M parameters, {megabytes(total)} in {len(file_sizes)} files, '
    f'the largest {megabytes(max(file_sizes))}'
  )
  print(
    f'read: {megabytes(bytes_read)}, for each of {DEVICES} devices {share_read:.4f} of the files'
  )
  print(f'placed: {megabytes(sum(pieces))} on the first device, {share_placed:.4f} of float32')
  print(
    f'host memory beyond the placed arrays: {megabytes(peak)}, '
    f'the largest piece is {megabytes(max(pieces))}'
  )


def megabytes(count: int) -> str:
  """Formats a number of bytes as MB."""
  return f'{count / 1e6:.0f} MB'


if __name__ == '__main__':
  main()
