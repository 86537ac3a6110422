"""Traces a claim: its programs at full size, without computing them.

A size for a GPU takes too long on a CPU, but whether its shapes fit each other can be
said in a second: every program that a claim compiles is traced only, for arrays of the
settings' sizes (units, tokens, rows of a step), and what it would return is made up. The
rest, on the host and on single arrays, runs with fewer samples and steps, whose numbers
are lengths of loops and of lists, in no program's shapes but as these.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What `--trace` lowers, by its name in the settings, at any depth.
MOST = {
  'doublings': 3,
  'largest_n': 64,
  'pairs': 512,
  'pool': 2000,
  'steps': 32,
  'updates': 8,
}


@dataclasses.dataclass
class Traced:
  """What the programs of a claim were when they were traced.

  Attributes:
    programs: how many.
    elements: of all arrays that the largest of them returns.
  """

  programs: int = 0
  elements: int = 0


def lower_counts(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Lowers the numbers of samples and steps."""
  lowered = {}
  for name, value in settings.items():
    if isinstance(value, Mapping):
      value = lower_counts(value)
    elif name in MOST:
      value = min(value, MOST[name])
    lowered[name] = value
  return lowered


@contextlib.contextmanager
def tracing_only():
  """Replaces `jax.jit` while a claim runs; yields what was traced.

  Functions that were compiled before, such as those of the package, are not concerned.
  """
  traced = Traced()
  compile_function = jax.jit

  def trace(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      shapes = jax.eval_shape(function, *args)
      traced.programs += 1
      sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
      traced.elements = max(traced.elements, sum(sizes))
      # Numbers of their own, as differences of results are divided by.
      rng = np.random.default_rng(traced.programs)
      return jax.tree.map(functools.partial(make_up, rng), shapes)

    return call

  jax.jit = trace
  try:
    yield traced
  finally:
    jax.jit = compile_function


def make_up(rng: np.random.Generator, shape: Any) -> Any:
  """Makes an array up: positive floats, and integers that may be tokens."""
  if np.issubdtype(shape.dtype, np.integer):
    return jnp.asarray(rng.integers(0, 2, shape.shape), shape.dtype)
  return jnp.asarray(np.abs(rng.normal(size=shape.shape)), shape.dtype)
