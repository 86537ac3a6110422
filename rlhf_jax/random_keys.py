"""Derives random keys by purpose, so that no two uses of a run draw from the same key.

A key is either drawn from, once, or the parent of other keys. `jax.random.split`
gives the same keys as `fold_in` with 0, 1, …, so a parent is only ever used in one
of these ways; where it has children of several kinds, each kind has a name.
"""

import zlib

import jax
import numpy as np


def for_purpose(key: jax.Array, purpose: str) -> jax.Array:
  """Derives the key of one purpose.

  Args:
    key: [] the parent, from which nothing is drawn.
    purpose: its name, such as 'rollout'; the same on every process.

  Returns:
    [] a key that no other purpose, and practically no number, leads to.
  """
  # Numbers of steps, batches and tokens stay far below these 32 bits.
  # crc32, because Python's hash() of a string differs from process to process.
  return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def host_generator(key: jax.Array) -> np.random.Generator:
  """Makes a generator for the host from a key, from which nothing else is drawn."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))
