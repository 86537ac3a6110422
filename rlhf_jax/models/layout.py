"""The interface between a model and its devices: the layout of a mesh, or one device."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

Names = Sequence[str | None]  # the axis names of an array, in the model's own terms


class ModelLayout(Protocol):
  """The part of a layout that models use; `Layout` in runtime/mesh.py is that of a mesh."""

  @property
  def platform(self) -> str:
    """Returns 'cpu', 'gpu' or 'tpu'."""

  @property
  def is_one_device(self) -> bool:
    """Returns whether there is one device only, which exists and runs programs."""

  @property
  def shards_rows_only(self) -> bool:
    """Returns whether devices share nothing of a row, so that each computes its rows alone."""

  def constrain(self, x: jax.Array, names: Names) -> jax.Array:
    """Shards an activation as its axis names say; called inside jit."""

  def shard_map(
    self,
    function: Callable[..., jax.Array],
    inputs: Sequence[Names],
    output: Names,
  ) -> Callable[..., jax.Array] | None:
    """Maps a function over the devices; None if they share the tokens of a row."""

  def with_gathered_matrix(
    self,
    function: Callable[..., Any],
    matrix: jax.Array,
    *rows: jax.Array,
  ) -> Any:
    """Calls function(matrix, *rows) with the whole matrix on each device; inside jit."""


class SingleDevice:
  """The layout of one device, on which nothing is sharded."""

  @property
  def platform(self) -> str:
    """Returns the platform of JAX's default device: 'cpu', 'gpu' or 'tpu'."""
    return jax.default_backend()

  @property
  def is_one_device(self) -> bool:
    """Returns True."""
    return True

  @property
  def shards_rows_only(self) -> bool:
    """Returns True."""
    return True

  def constrain(self, x: jax.Array, names: Names) -> jax.Array:
    """Returns the array unchanged.

    Args:
      x: any array.
      names: the names of its axes; unused.
    """
    del names
    return x

  def shard_map(
    self,
    function: Callable[..., jax.Array],
    inputs: Sequence[Names],
    output: Names,
  ) -> Callable[..., jax.Array]:
    """Returns the function unchanged, as the one device holds every array whole.

    Args:
      function: a function of arrays.
      inputs: the axis names of its arguments; unused.
      output: the axis names of its result; unused.
    """
    del inputs, output
    return function

  def with_gathered_matrix(
    self,
    function: Callable[..., Any],
    matrix: jax.Array,
    *rows: jax.Array,
  ) -> Any:
    """Returns function(matrix, *rows), as the matrix is whole already.

    Args:
      function: a function of the matrix and the rows.
      matrix: [D, V].
      *rows: arrays [n, B, T, …].
    """
    return function(matrix, *rows)
