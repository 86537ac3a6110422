"""How a parameter is stored in Hugging Face's files: transposed, split by layer, fused with others.

A `Tensor` is a row of a family's table. It denotes axes by letters, both the axes of the parameter
(a leaf of our tree) and those of the matrix in the file:

  v vocab_size   d embed      h heads       n kv_heads   c head_dim
  f mlp          l layers     e experts     p max_length

With axes `'ldhc'`, matrix `'hc,d'` and the name `model.layers.{}.q.weight`, our leaf [L, D, H, C]
is stored as L matrices [H · C, D], one for each value of the `{}`. A file axis without letters has
size 1. The matrix `'hc|nc|nc,d'` consists of three matrices stacked along its first axis; the leaf
is the one with number `part`.
"""

from collections.abc import Callable
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from rlhf_jax.models.model_config import ModelConfig

SIZES = {  # letter of an axis → the field of ModelConfig that holds its size
  'v': 'vocab_size',
  'd': 'embed',
  'h': 'heads',
  'n': 'kv_heads',
  'c': 'head_dim',
  'f': 'mlp',
  'l': 'layers',
  'e': 'experts',
  'p': 'max_length',
}

Slices = tuple[slice, ...]
Fetch = Callable[[str, Slices], np.ndarray]  # (name, slices) → that part of a file's tensor


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One leaf of the parameters, and the tensors of a file in which it is stored."""

  path: str  # keys of the leaf joined by dots: 'layers.query'
  axes: str  # letters of the leaf's axes; indices along the first ones replace the `{}` of the name
  name: str  # Hugging Face's name
  matrix: str  # letters of the matrix in the file, with commas between its axes
  part: int = 0  # number of this leaf among the fused matrices

  @property
  def keys(self) -> list[str]:
    """The keys that lead to the leaf in a nested dict."""
    return self.path.split('.')

  @property
  def stacked(self) -> str:
    """The leading axes of the leaf, along which a file has separate tensors."""
    return self.axes[: self.name.count('{}')]

  @property
  def matrix_axes(self) -> str:
    """The axes of the leaf that are inside each tensor of a file."""
    return self.axes[len(self.stacked) :]

  @property
  def fused_axis(self) -> int | None:
    """The axis of the file's matrix along which several leaves are fused; None for one leaf."""
    for number, group in enumerate(self.matrix.split(',')):
      if '|' in group:
        return number
    return None

  @property
  def fan_in(self) -> bool:
    """Whether a layer's matrix is [inputs, outputs] in the file; most are [outputs, inputs]."""
    inputs, *outputs = self.matrix.split(',')
    if not self.stacked or not outputs:
      return False
    return self.matrix_axes.startswith(inputs)

  def shape(self, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of the leaf."""
    return tuple(axis_size(config, axis) for axis in self.axes)

  def places(self, config: ModelConfig) -> list[tuple[int, ...]]:
    """Returns the indices along the stacked axes; [()] where there are no such axes."""
    counts = [range(axis_size(config, axis)) for axis in self.stacked]
    return list(itertools.product(*counts))

  def names(self, config: ModelConfig) -> list[str]:
    """Returns the names of the leaf's tensors in a file, one for each of `places`."""
    return [self.name.format(*place) for place in self.places(config)]

  def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of each tensor in the file, including the leaves fused with this one."""
    return tuple(
      sum(axis_size(config, *letters) for letters in group.split('|'))
      for group in self.matrix.split(',')
    )

  def read(self, config: ModelConfig, fetch: Fetch, index: Slices | None = None) -> np.ndarray:
    """Reads the leaf, or a part of it, from a file.

    Args:
      config: the shape of the model.
      fetch: the function that reads from the file; it is called once for each tensor, with the
        smallest part that is needed.
      index: a slice for each axis of the leaf; None for the whole leaf.

    Returns:
      The part of the leaf, float32, as a copy.
    """
    if index is None:
      index = (slice(None),) * len(self.axes)
    ranges = [range(*cut.indices(axis_size(config, axis))) for cut, axis in zip(index, self.axes)]
    count = len(self.stacked)
    piece = self._piece(config, index[count:])
    leaf = np.empty([len(numbers) for numbers in ranges], np.float32)
    targets = np.ndindex(*leaf.shape[:count])
    for place, target in zip(itertools.product(*ranges[:count]), targets):
      matrix = fetch(self.name.format(*place), piece.slices)
      leaf[target] = piece.arrange(matrix)
    return leaf

  def write(self, config: ModelConfig, leaf: np.ndarray) -> np.ndarray:
    """Converts the leaf at one of its `places` to the matrix of the file.

    Args:
      config: the shape of the model.
      leaf: the leaf at one of `places`, with the axes `matrix_axes`.

    Returns:
      The matrix, contiguous; where several leaves are fused, only this leaf's part of it.
    """
    groups = [axis.letters for axis in self._file_axes()]
    order = [self.matrix_axes.index(letter) for letter in ''.join(groups)]
    shape = [axis_size(config, *letters) for letters in groups]
    return np.ascontiguousarray(leaf.transpose(order).reshape(shape))

  def _piece(self, config: ModelConfig, index: Slices) -> '_Piece':
    """Finds the part of the file's matrix for slices of `matrix_axes`, and how to convert it."""
    cuts = dict(zip(self.matrix_axes, index))
    file_axes = self._file_axes()
    slices = []
    sizes = []
    for letters, fused_before in file_axes:
      if not letters:  # an axis of size 1 that the leaf lacks
        slices.append(slice(0, 1))
        continue
      # Only the first letter can be sliced while reading: its slices are
      # contiguous in the file.
      first = letters[0]
      inner = letters[1:]
      start, stop, _ = cuts[first].indices(axis_size(config, first))
      stride = axis_size(config, *inner)
      offset = sum(axis_size(config, *other) for other in fused_before)
      slices.append(slice(offset + start * stride, offset + stop * stride))
      sizes.append(stop - start)
      sizes.extend(axis_size(config, letter) for letter in inner)
    all_letters = ''.join(axis.letters for axis in file_axes)
    already_cut = {axis.letters[:1] for axis in file_axes}
    return _Piece(
      slices=tuple(slices),
      sizes=sizes,
      order=[all_letters.index(axis) for axis in self.matrix_axes],
      rest=tuple(slice(None) if axis in already_cut else cuts[axis] for axis in self.matrix_axes),
    )

  def _file_axes(self) -> list['_FileAxis']:
    """Describes each axis of the file's matrix."""
    axes = []
    for group in self.matrix.split(','):
      fused = group.split('|')
      part = self.part if len(fused) > 1 else 0  # an axis without '|' is common to all parts
      axes.append(_FileAxis(letters=fused[part], fused_before=fused[:part]))
    return axes


class _FileAxis(NamedTuple):
  """An axis of a matrix in a file."""

  letters: str  # the leaf's axes that it consists of, the outermost first
  fused_before: list[str]  # letters of the fused leaves that precede this one


class _Piece(NamedTuple):
  """A part of a file's matrix, with the steps that convert it to a part of a leaf."""

  slices: Slices  # the part of the file's matrix
  sizes: list[int]  # its shape after the file's axes are split into the leaf's axes
  order: list[int]  # the permutation from these axes to the leaf's order of axes
  rest: Slices  # the slices along the axes that were read whole

  def arrange(self, matrix: np.ndarray) -> np.ndarray:
    """Converts the fetched part of a matrix to the part of the leaf."""
    return matrix.reshape(self.sizes).transpose(self.order)[self.rest]


def axis_size(config: ModelConfig, *letters: str) -> int:
  """Returns the product of the sizes of axes; 1 where there are none."""
  return math.prod(getattr(config, SIZES[letter]) for letter in letters)
