"""Measures what reading a checkpoint onto eight devices costs: bytes read for each, and the host's memory.

  python scripts/measure_reading.py            # a random model of 1 GB; a minute, 4 GB of memory, 1 GB of disk
  python scripts/measure_reading.py --layers=4

The model is bfloat16 in files of at most 200 MB; it is read as float32 with fsdp=8 on 8 forced CPU devices. Host memory
is what the process holds at its peak beyond what it held before and the arrays already placed; pages of files that the
system caches do not count. On Linux.
"""

import argparse
import ctypes
import json
import os
from pathlib import Path
import re
import tempfile
import threading

os.environ |= {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from rlhf_jax.interop import families, pretrained, safetensors_io
from rlhf_jax.models import transformer
from rlhf_jax.runtime import mesh


def held() -> int:
  """Bytes of this process that no file holds."""
  return int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024


def write(place, config, limit=200 * 10**6):
  """Random weights, file by file."""
  random, part, size, number = np.random.default_rng(0), {}, 0, 1
  shapes = [(name, tensor.file_shape(config)) for tensor in families.list_tensors(config) for name in tensor.names(config)]
  index = {}
  def close():
    safetensors.numpy.save_file(part, place / f'model-{number}.safetensors')
    index.update(dict.fromkeys(part, f'model-{number}.safetensors'))
  for name, shape in shapes:
    value = random.random(shape, np.float32).astype(jnp.bfloat16)
    if part and size + value.nbytes > limit:
      close()
      part, size, number = {}, 0, number + 1
    part[name], size = value, size + value.nbytes
  close()
  (place / safetensors_io.INDEX).write_text(json.dumps({'weight_map': index}))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--layers', type=int, default=16)
  config = transformer.ModelConfig(vocab_size=32000, embed=1536, layers=parser.parse_args().layers, heads=12,
                                   kv_heads=4, head_dim=128, mlp=6144, tied=False)
  layout = mesh.make_layout({**mesh.DEFAULTS, 'data': 1, 'fsdp': 8})
  model = transformer.build_model(config, layout)
  shardings = layout.shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)))
  with tempfile.TemporaryDirectory() as place:
    place, read, peaks = Path(place), [], []
    write(place, config)
    (place / 'config.json').write_text('{}')
    sizes = [path.stat().st_size for path in place.glob('*.safetensors')]
    plain = safetensors_io.open_weights

    def counted(directory):
      shapes, fetch = plain(directory)
      def part(name, index):
        value = fetch(name, index)
        read.append(value.nbytes)
        return value
      return shapes, part

    pretrained.open_weights = counted
    ctypes.CDLL(None).malloc_trim(0)  # what writing left to the C allocator
    before, done = held(), threading.Event()

    def watch():
      while not done.wait(0.005):
        peaks.append(held() - before - sum(array.nbytes for array in jax.live_arrays()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = pretrained.load_parameters(place, config, shardings)
    done.set()
    watcher.join()
    last = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)]
    report(config, sizes, read, peaks, params, last)


def report(config, sizes, read, peaks, params, last):
  mega, total = lambda x: f'{x / 1e6:.0f} MB', sum(leaf.size for leaf in jax.tree.leaves(params))
  print(f'{total / 1e6:.0f}M parameters, {mega(sum(sizes))} in {len(sizes)} files, the largest {mega(max(sizes))}')
  print(f'read: {mega(sum(read))}, for each of 8 devices {sum(read) / 8 / sum(sizes):.4f} of the files')
  print(f'placed: {mega(sum(last))} on the first device, {sum(last) / (4 * total):.4f} of float32')
  print(f'host memory beyond the placed arrays: {mega(max(peaks))}, the largest piece is {mega(max(last))}')


if __name__ == '__main__':
  main()
