"""One leaf of ours in other people's files: how it is cut, turned, stacked and fused there.

A line of a family's table names axes by letters, those of our leaf and those of the file's matrix:

  v vocab_size, d embed, h heads, n kv_heads, c head_dim, f mlp, l layers, e experts, p max_length

`'ldhc', 'hc,d'` under the name `model.layers.{}.q.weight`: our leaf [L, D, H, C] stands in the file as L matrices
[H · C, D], one for each `{}`. An axis without letters has size 1. `'hc|nc|nc,d'` is three matrices below each other, of
which ours is number `part`.
"""

import dataclasses
import itertools
import math

import numpy as np

SIZES = {'v': 'vocab_size', 'd': 'embed', 'h': 'heads', 'n': 'kv_heads', 'c': 'head_dim', 'f': 'mlp', 'l': 'layers',
         'e': 'experts', 'p': 'max_length'}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One leaf of ours and its place in files.

  Attributes:
    path: keys of the leaf in params, with dots: 'layers.query'.
    axes: letters of our axes; the first of them stand for the `{}` of the name, in their order.
    name: Hugging Face's name.
    matrix: letters of the file's axes, a comma between two.
    part: which of the fused matrices.
  """
  path: str
  axes: str
  name: str
  matrix: str
  part: int = 0

  @property
  def keys(self) -> list[str]:
    return self.path.split('.')

  @property
  def stacked(self) -> str:
    """The axes that are several tensors in a file."""
    return self.axes[:self.name.count('{}')]

  def shape(self, config) -> tuple[int, ...]:
    """Shape of our leaf."""
    return tuple(_size(config, axis) for axis in self.axes)

  def places(self, config) -> list[tuple[int, ...]]:
    """Indices along the stacked axes; the empty one where there are none."""
    return list(itertools.product(*(range(_size(config, axis)) for axis in self.stacked)))

  def names(self, config) -> list[str]:
    """Its names in a file, one for each place."""
    return [self.name.format(*place) for place in self.places(config)]

  def file_shape(self, config) -> tuple[int, ...]:
    """Shape of one tensor of the file."""
    return tuple(sum(_size(config, *part) for part in group.split('|')) for group in self.matrix.split(','))

  @property
  def fused_axis(self) -> int | None:
    """The axis of the file's matrix that holds more leaves than this one."""
    return next((i for i, group in enumerate(self.matrix.split(',')) if '|' in group), None)

  @property
  def fan_in(self) -> bool:
    """A layer's matrix [inputs, outputs] in the file; most files have [outputs, inputs]."""
    inputs, *outputs = self.matrix.split(',')
    return bool(self.stacked and outputs) and self.axes[len(self.stacked):].startswith(inputs)

  def read(self, config, fetch, index=None) -> np.ndarray:
    """Our leaf, or a part of it, out of a file.

    Args:
      config: shape of the model.
      fetch: (name, slices) → that part of a tensor, numpy; called once for each tensor, with the least part needed.
      index: slices of our axes; all of them by default.

    Returns:
      float32, in memory of its own.
    """
    count = len(self.stacked)
    index = index or (slice(None),) * len(self.axes)
    ranges = [range(*cut.indices(_size(config, axis))) for cut, axis in zip(index, self.stacked)]
    piece, out = self._piece(config, index[count:]), None
    for i, place in enumerate(itertools.product(*ranges)):
      part = piece(lambda slices: fetch(self.name.format(*place), slices))
      if not count:
        return np.array(part, np.float32)
      if out is None:
        out = np.empty((math.prod(map(len, ranges)), *part.shape), np.float32)
      out[i] = part
    return out.reshape(*map(len, ranges), *out.shape[1:])

  def _piece(self, config, index):
    """(matrix: slices → numpy) → the part of our axes (without the stacked) that index cuts out."""
    own, groups = self.axes[len(self.stacked):], self._groups()
    cuts, slices, sizes = dict(zip(own, index)), [], []
    for (group, skipped) in groups:  # an axis of the file is cut at its first letter, the others afterwards
      start, stop, _ = cuts[group[0]].indices(_size(config, group[0])) if group else (0, 1, 1)
      skip, inner = sum(_size(config, *other) for other in skipped), _size(config, *group[1:])
      slices.append(slice(skip + start * inner, skip + stop * inner))
      sizes += [stop - start] * bool(group) + [_size(config, axis) for axis in group[1:]]
    order = [''.join(group for group, _ in groups).index(axis) for axis in own]
    rest = tuple(slice(None) if axis in {group[:1] for group, _ in groups} else cuts[axis] for axis in own)
    return lambda matrix: matrix(tuple(slices)).reshape(sizes).transpose(order)[rest]

  def write(self, config, leaf) -> np.ndarray:
    """The file's matrix, or our part of it where it is fused, out of one place of our leaf, numpy."""
    own, groups = self.axes[len(self.stacked):], [group for group, _ in self._groups()]
    turned = leaf.transpose([own.index(axis) for axis in ''.join(groups)])
    return np.ascontiguousarray(turned.reshape([_size(config, *group) for group in groups]))

  def _groups(self):
    """For each axis of the file: our letters in it, and those of the leaves fused before ours."""
    fused = [group.split('|') for group in self.matrix.split(',')]
    return [(group[self.part], group[:self.part]) if len(group) > 1 else (group[0], []) for group in fused]


def _size(config, *axes):
  return math.prod(getattr(config, SIZES[axis]) for axis in axes)
