"""What a model asks of the place where it runs: a mesh's layout, or one device."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

Names = Sequence[str | None]  # the axis names of an array, in the model's own terms


class ModelLayout(Protocol):
  """The part of a layout that models use; runtime/mesh.py: Layout has it for a mesh."""

  @property
  def platform(self) -> str:
    """Returns 'cpu', 'gpu' or 'tpu'."""

  def constrain(self, x: jax.Array, names: Names) -> jax.Array:
    """Lays out an activation as its axis names say; inside jit."""

  def shard_map(
    self,
    function: Callable[..., jax.Array],
    inputs: Sequence[Names],
    output: Names,
  ) -> Callable[..., jax.Array] | None:
    """Maps a function over the devices; None where rows are cut over them."""

  def with_gathered_matrix(
    self,
    function: Callable[..., Any],
    matrix: jax.Array,
    *rows: jax.Array,
  ) -> Any:
    """Calls function(matrix, *rows), each device with the whole matrix; inside jit."""


class SingleDevice:
  """The layout of one device: nothing is cut, so nothing is moved."""

  @property
  def platform(self) -> str:
    """Returns the platform of JAX's default device: 'cpu', 'gpu' or 'tpu'."""
    return jax.default_backend()

  def constrain(self, x: jax.Array, names: Names) -> jax.Array:
    """Returns the array as it is.

    Args:
      x: any array.
      names: of its axes; unused.
    """
    del names
    return x

  def shard_map(
    self,
    function: Callable[..., jax.Array],
    inputs: Sequence[Names],
    output: Names,
  ) -> Callable[..., jax.Array]:
    """Returns the function as it is: the one device has all of every array.

    Args:
      function: of arrays.
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
    """Returns function(matrix, *rows): the matrix is whole already.

    Args:
      function: of a matrix and rows.
      matrix: [D, V].
      *rows: arrays [n, B, T, …].
    """
    return function(matrix, *rows)
