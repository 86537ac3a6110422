"""Rows that are decoded in groups on a CPU, one for each core, at the same time.

Most operations of a decoding step are too short for XLA's CPU backend to share them among cores,
so one core does nearly all of them. A group of rows is a call of its own, which a core
computes beside the others. Rows do not depend on each other, so responses are the same.

Letters as in sampler.py: B prompts, K responses to each, N = B * K, R tokens of a response;
G groups.
"""

from collections.abc import Callable
import concurrent.futures
import functools
import operator
import os

import jax
import jax.numpy as jnp

from rlhf_jax.types import Params, Prompts, Samples

FEWEST_ROWS = 4  # of a group; a core computes fewer hardly faster
# Of a model that is decoded in groups. Each core reads all matrices for itself, and those
# of a larger model leave the processor's cache, so that the cores wait for the memory.
MOST_PARAMETERS = 2**24


def count_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # not on macOS
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def count_groups(params: Params, num_prompts: int, num_samples: int, cores: int) -> int:
  """Returns into how many groups rows are best split; 1 = not at all.

  Args:
    params: the model's parameters.
    num_prompts: B.
    num_samples: K.
    cores: the cores of this process.
  """
  if sum(leaf.size for leaf in jax.tree.leaves(params)) > MOST_PARAMETERS:
    return 1
  most = min(cores, num_prompts * num_samples // FEWEST_ROWS)
  possible = [G for G in range(1, most + 1) if num_prompts % G == 0 or num_samples % G == 0]
  return max(possible, default=1)


class GroupedCalls:
  """Calls of one compiled function, at the same time, each with one group of rows.

  XLA's CPU client computes what one thread has called one after the other, hence the threads.
  """

  def __init__(self, respond: Callable[[Params, Prompts, jax.Array], Samples]) -> None:
    """Keeps the compiled function: (params, prompts, uniforms) → Samples."""
    self.respond = respond
    self.threads: list[concurrent.futures.Executor] = []

  def __call__(self, params: Params, prompts: Prompts, uniforms: jax.Array, groups: int) -> Samples:
    """Samples responses in groups.

    Args:
      params: the parameters.
      prompts: Prompts [B, P].
      uniforms: [R, N, 2] float32, the random numbers of all tokens.
      groups: G, from `count_groups`.

    Returns:
      Samples [N, R].
    """
    while len(self.threads) < groups:
      self.threads.append(concurrent.futures.ThreadPoolExecutor(max_workers=1))
    parts = []
    for thread, group in zip(self.threads, split(prompts, uniforms, groups)):
      # The result is there at once, and its values later: so the first call compiles for all.
      parts.append(thread.submit(self.respond, params, *group).result())
    return join(tuple(parts), len(prompts.tokens))


@functools.partial(jax.jit, static_argnums=2)
def split(prompts: Prompts, uniforms: jax.Array, groups: int) -> list[tuple[Prompts, jax.Array]]:
  """Splits rows into groups: by prompts if these can be divided, else by responses to them.

  Args:
    prompts: Prompts [B, P].
    uniforms: [R, N, 2].
    groups: G, which divides B or K.

  Returns:
    G times (prompts, [B / G, P] or [B, P]; uniforms [R, N / G, 2]).
  """
  R, N, _ = uniforms.shape
  B = len(prompts.tokens)
  grid = uniforms.reshape(R, B, N // B, 2)
  axis = _split_axis(B, groups)
  parts = []
  for number, part in enumerate(jnp.split(grid, groups, axis=1 + axis)):
    of_group = prompts if axis == 1 else _take_part(prompts, number, groups)
    parts.append((of_group, part.reshape(R, -1, 2)))
  return parts


def _take_part(prompts: Prompts, number: int, groups: int) -> Prompts:
  """Returns one of so many equal parts of prompts [B, P]."""
  size = len(prompts.tokens) // groups
  take = operator.itemgetter(slice(number * size, (number + 1) * size))
  return jax.tree.map(take, prompts)


@functools.partial(jax.jit, static_argnums=1)
def join(parts: tuple[Samples, ...], num_prompts: int) -> Samples:
  """Joins the samples of all groups in the order of the rows.

  Args:
    parts: G times Samples [N / G, R], in the order of `split`.
    num_prompts: B.

  Returns:
    Samples [N, R].
  """
  axis = _split_axis(num_prompts, len(parts))
  rows = num_prompts // len(parts) if axis == 0 else num_prompts  # prompts of a group

  def join_leaves(*leaves: jax.Array) -> jax.Array:
    grids = [leaf.reshape(rows, -1, *leaf.shape[1:]) for leaf in leaves]
    return jnp.concatenate(grids, axis).reshape(-1, *leaves[0].shape[1:])

  return jax.tree.map(join_leaves, *parts)


def _split_axis(num_prompts: int, groups: int) -> int:
  """Returns the axis of [B, K] along which groups are split."""
  return 0 if num_prompts % groups == 0 else 1
