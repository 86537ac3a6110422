"""How JAX compiles in this process: the cache on disk and the precision of products."""

import contextlib
import os
from pathlib import Path

import jax

# The largest size of the cache on disk; the least recently used programs are deleted first.
CACHE_BYTES = 4 * 2**30


def cache_compilations() -> None:
  """Switches on JAX's cache of compiled programs, in the user's cache directory.

  It keeps at most CACHE_BYTES. The environment variable JAX_COMPILATION_CACHE_DIR
  sets another directory, whose size is not limited unless
  JAX_COMPILATION_CACHE_MAX_SIZE is
  set: other programs may share it.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    directory = root / 'rlhf_jax' / 'compiled'
    complete_access_times(directory)
    jax.config.update('jax_compilation_cache_dir', str(directory))
    if 'JAX_COMPILATION_CACHE_MAX_SIZE' not in os.environ:
      jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Reading a program from a file takes about as long as half a second of compilation.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def complete_access_times(directory: Path) -> None:
  """Gives every program of a bounded cache its time of access, where that is lost.

  JAX keeps the time in a file of its own. A program without it, as a kill between the two
  writes leaves behind, makes every later write to the cache fail.
  """
  for program in directory.glob('*-cache'):
    access_time = program.with_name(program.name.removesuffix('-cache') + '-atime')
    # Another process may delete the program meanwhile; a read-only cache stays as it is.
    with contextlib.suppress(OSError):
      if not access_time.exists():
        access_time.write_bytes(program.stat().st_mtime_ns.to_bytes(8, 'little'))


def request_exact_products() -> None:
  """Makes float32 matrix products use full float32 precision on every device.

  By default a GPU rounds the factors of a float32 product to 10 bits of mantissa
  (TF32) and a TPU to 7 (bfloat16), also in rewards, KL penalties and gradients.
  Products of narrower dtypes, and products on a CPU, are not affected. The
  environment variable JAX_DEFAULT_MATMUL_PRECISION takes precedence.
  """
  if 'JAX_DEFAULT_MATMUL_PRECISION' not in os.environ:
    jax.config.update('jax_default_matmul_precision', 'highest')
