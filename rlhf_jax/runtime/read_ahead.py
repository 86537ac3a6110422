"""Reads the next batch while the devices are at work on the one before."""

from typing import Any, Protocol


class Batches(Protocol):
  """An endless or finite iterator over host batches that can be resumed."""

  def __next__(self) -> Any:
    """Returns the next batch."""

  def get_state(self) -> dict:
    """Returns the position as a JSON object, which later calls of next() do not change."""

  def set_state(self, state: dict) -> None:
    """Goes to a position that `get_state` returned."""


class ReadAhead:
  """Batches of which one may be read before it is taken.

  Positions are those of the batches that were taken. To ask an iterator for its
  position may cost more than to read a batch, so it is asked only where a position is
  wanted. Where the batch after that was read already, the iterator goes back to the
  last known position and reads again.
  """

  def __init__(self, batches: Batches):
    """Starts at the position of the iterator, which must not be used elsewhere from now on."""
    self._batches = batches
    self._known = batches.get_state()  # the last position that was asked for
    self._taken = 0  # batches taken since then
    self._ahead: list[Any] = []  # the batch that was read and not taken, if there is one

  def take(self) -> Any:
    """Returns the next batch; raises StopIteration where the data ended."""
    batch = self._ahead.pop() if self._ahead else next(self._batches)
    self._taken += 1
    return batch

  def read(self) -> None:
    """Reads the next batch, so that the next `take` returns at once."""
    if self._ahead:
      return
    try:
      self._ahead.append(next(self._batches))
    except StopIteration:  # the next `take` meets it again
      pass

  def position(self) -> dict:
    """Returns the position after the batches that were taken."""
    if self._ahead:
      self._go_to(self._taken)
    self._known = self._batches.get_state()
    self._taken = 0
    return self._known

  def step_back(self) -> None:
    """Gives the last batch back, which was taken after the last call of `position`."""
    self._go_to(self._taken - 1)

  def _go_to(self, taken: int) -> None:
    """Goes to where so many batches were taken since the known position."""
    self._batches.set_state(self._known)
    for _ in range(taken):
      next(self._batches)
    self._taken = taken
    self._ahead.clear()
