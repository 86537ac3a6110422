"""Measures what the machine can do: FLOP/s of a matrix product, bytes/s of reading.

python scripts/benchmarking/roofline.py [float32|bfloat16]     prints one JSON object
"""

import json
from pathlib import Path
import sys
import time

sys.path.insert(1, str(Path(__file__).parents[2]))  # this library

import jax
import jax.numpy as jnp

from rlhf_jax.runtime import compilation


def main() -> None:
  compilation.request_exact_products()
  print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else 'float32')))


def measure(dtype: str) -> dict[str, float]:
  """Measures both limits; the best of several calls, as other work only lowers them."""
  on_cpu = jax.default_backend() == 'cpu'
  size = 2048 if on_cpu else 8192
  square = jnp.ones((size, size), dtype)
  # 512 MiB on a CPU, more than its caches hold; 2 GiB elsewhere.
  rows = (2**29 if on_cpu else 2**31) // (size * square.dtype.itemsize)
  wide = jnp.ones((rows, size), dtype)
  multiply = jax.jit(jnp.matmul)
  calls = 1 if on_cpu else 10  # so many at once, to hide the dispatch
  product = best_seconds(multiply, square, square, calls=calls)
  vector = best_seconds(multiply, wide, square[0], calls=calls, repeats=20)
  return {'flops_per_second': 2 * size**3 / product, 'bytes_per_second': wide.nbytes / vector}


def best_seconds(function, *args, calls: int, repeats: int = 5) -> float:
  """Returns the shortest time of a call, after one that compiles."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    results = [function(*args) for _ in range(calls)]
    jax.block_until_ready(results)
    times.append((time.perf_counter() - began) / calls)
  return min(times)


if __name__ == '__main__':
  main()
