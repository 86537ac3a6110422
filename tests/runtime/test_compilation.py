"""The cache of compiled programs has a limit, which holds, and leaves users' own caches alone."""

import os
from pathlib import Path
import subprocess
import sys

from rlhf_jax.runtime import compilation

PROGRAM = """
import jax
import jax.numpy as jnp
from rlhf_jax.runtime import compilation

compilation.CACHE_BYTES = 20_000
compilation.cache_compilations()
for n in range(1, 9):
  jax.jit(lambda x: x @ x + n)(jnp.ones((n, n)))
print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)
"""


def run_program(**environment):
  removed = ('JAX_COMPILATION_CACHE_DIR', 'JAX_COMPILATION_CACHE_MAX_SIZE')
  kept = {key: value for key, value in os.environ.items() if key not in removed}
  root = Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    capture_output=True,
    text=True,
    env={
      **kept,
      'PYTHONPATH': str(root),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      **environment,
    },
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def size_of(directory):
  return sum(path.stat().st_size for path in Path(directory).rglob('*') if path.is_file())


def test_the_cache_is_in_the_users_directory_and_bounded(tmp_path):
  directory, limit = run_program(XDG_CACHE_HOME=str(tmp_path))
  assert directory == str(tmp_path / 'rlhf_jax' / 'compiled') and limit == '20000'
  assert 0 < size_of(directory) <= 21_000  # the times of access come on top
  assert 2**30 <= compilation.CACHE_BYTES


def test_a_cache_of_the_users_choice_is_not_bounded(tmp_path):
  directory, limit = run_program(JAX_COMPILATION_CACHE_DIR=str(tmp_path))
  assert directory == str(tmp_path) and limit == '-1'
  assert size_of(directory) > 21_000


def test_a_cache_that_a_kill_left_incomplete_is_used_on(tmp_path):
  directory = tmp_path / 'rlhf_jax' / 'compiled'
  directory.mkdir(parents=True)
  (directory / 'jit_killed-0-cache').write_bytes(b'a program without its time of access')
  run_program(XDG_CACHE_HOME=str(tmp_path))
  assert len(list(directory.glob('*-cache'))) > 1  # others were added
