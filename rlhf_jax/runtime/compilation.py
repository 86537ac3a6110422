"""How JAX compiles in this process: the cache on disk, and the precision of products."""

import os
from pathlib import Path

import jax

CACHE_BYTES = 4 * 2**30  # of the cache on disk, at most; the least recently used go first


def cache_compilations() -> None:
  """Keeps compiled programs in the user's cache directory, CACHE_BYTES of them at most.

  JAX_COMPILATION_CACHE_DIR names another place, whose size is the user's affair:
  JAX_COMPILATION_CACHE_MAX_SIZE bounds it.
  """
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    root = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    jax.config.update('jax_compilation_cache_dir', str(root / 'rlhf_jax' / 'compiled'))
    if 'JAX_COMPILATION_CACHE_MAX_SIZE' not in os.environ:
      jax.config.update('jax_compilation_cache_max_size', CACHE_BYTES)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Reading a smaller program from a file takes about as long as compiling it.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def request_exact_products() -> None:
  """Makes products of float32 exact on every device; those of narrower dtypes stay as they are.

  By default a GPU rounds the factors of a float32 product to 10 bits of mantissa and a
  TPU to 7, in rewards, KL penalties and gradients too. A CPU never does, so there
  nothing changes. JAX_DEFAULT_MATMUL_PRECISION overrules this.
  """
  if 'JAX_DEFAULT_MATMUL_PRECISION' not in os.environ:
    jax.config.update('jax_default_matmul_precision', 'highest')
