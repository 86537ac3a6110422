"""Sequences whose items lie in a temporary file, so that memory does not grow with the data.

The file is in $XDG_CACHE_HOME/rlhf_jax/spool and has no name: it vanishes with the
process, however that ends. Items are read by position, not memory-mapped, as mapped
pages would count as memory of the process. In memory are 8 bytes for each item.
"""

import array
from collections.abc import Callable, Iterable, Sequence
import os
import tempfile
from typing import Any, overload

import numpy as np

from rlhf_jax import storage


class _Spool:
  """A file to which items are appended.

  Attributes:
    ends: where each item ends, in bytes.
  """

  def __init__(self) -> None:
    folder = storage.cache_folder('spool')
    folder.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which is memory on some machines.
    self._file = tempfile.TemporaryFile(dir=folder)
    self._is_flushed = True
    self.ends = array.array('q')

  def append(self, data: bytes) -> None:
    """Appends an item."""
    self._file.write(data)
    self._is_flushed = False
    self.ends.append((self.ends[-1] if self.ends else 0) + len(data))

  def read(self, number: int) -> bytes:
    """Returns an item; several threads may read at once."""
    if not self._is_flushed:
      self._file.flush()
      self._is_flushed = True
    # pread has no position of the file that threads could move for each other.
    begin = self.ends[number - 1] if number else 0
    return os.pread(self._file.fileno(), self.ends[number] - begin, begin)


class OnDisk(Sequence[Any]):
  """A sequence on disk; slices and choices of it share its file."""

  def __init__(self, pack: Callable[[Any], bytes], unpack: Callable[[bytes], Any]):
    """Makes an empty sequence.

    Args:
      pack: item → bytes.
      unpack: bytes → the item.
    """
    self._pack = pack
    self._unpack = unpack
    self._spool = _Spool()
    self._order: Sequence[int] | np.ndarray | None = None  # None = all of the file, as it grows

  def append(self, item: Any) -> None:
    """Appends an item; a choice of items cannot grow."""
    assert self._order is None
    self._spool.append(self._pack(item))

  def extend(self, items: Iterable[Any]) -> None:
    """Appends items."""
    for item in items:
      self.append(item)

  def choose(self, numbers: Sequence[int] | np.ndarray) -> 'OnDisk':
    """Returns the items with these numbers, in this order."""
    chosen = object.__new__(OnDisk)
    chosen.__dict__.update(self.__dict__)
    chosen._order = numbers if self._order is None else np.asarray(self._order)[numbers]
    return chosen

  def __len__(self) -> int:
    return len(self._spool.ends) if self._order is None else len(self._order)

  @overload
  def __getitem__(self, number: int) -> Any: ...

  @overload
  def __getitem__(self, number: slice) -> 'OnDisk': ...

  def __getitem__(self, number: Any) -> Any:
    numbers = range(len(self))
    if isinstance(number, slice):
      return self.choose(np.arange(*number.indices(len(self))))
    place = numbers[number]  # raises the IndexError that ends an iteration
    if self._order is not None:
      place = int(self._order[place])
    return self._unpack(self._spool.read(place))
