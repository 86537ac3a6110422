"""Reads the next batch while the devices compute the current step."""

from typing import Any, Protocol


class Batches(Protocol):
  """An endless or finite iterator over host batches that can be resumed."""

  def __next__(self) -> Any:
    """Returns the next batch."""

  def get_state(self) -> dict:
    """Returns the position as a JSON object, which later calls of next() do not change."""

  def set_state(self, state: dict) -> None:
    """Moves to a position that `get_state` returned."""


class ReadAhead:
  """An iterator over batches that can read one batch before it is needed.

  Its position counts the batches that were taken, not those that were read.
  Recording the position of an iterator can cost more than reading a batch, so this
  happens only when the position is wanted. If a batch was read ahead by then, the
  iterator moves back to the last recorded position and reads again up to the batch
  that was taken last.
  """

  def __init__(self, batches: Batches):
    """Starts at the present position of `batches`, which only this object may use now."""
    self._batches = batches
    self._recorded = batches.get_state()  # the last recorded position
    self._taken = 0  # batches taken since then
    self._ahead: list[Any] = []  # at most one batch: read, but not yet taken

  def take(self) -> Any:
    """Returns the next batch; raises StopIteration at the end of the data."""
    batch = self._ahead.pop() if self._ahead else next(self._batches)
    self._taken += 1
    return batch

  def read(self) -> None:
    """Reads the next batch, so that the next `take` returns immediately."""
    if self._ahead:
      return
    try:
      self._ahead.append(next(self._batches))
    except StopIteration:
      pass  # raised again by the next `take`, in which it matters

  def position(self) -> dict:
    """Records and returns the position after the batches that were taken."""
    if self._ahead:
      self._move_to(self._taken)
    self._recorded = self._batches.get_state()
    self._taken = 0
    return self._recorded

  def step_back(self) -> None:
    """Undoes the last `take`; not possible directly after `position`."""
    self._move_to(self._taken - 1)

  def _move_to(self, taken: int) -> None:
    """Moves to the position at which `taken` batches were taken since the recorded one."""
    self._batches.set_state(self._recorded)
    for _ in range(taken):
      next(self._batches)
    self._taken = taken
    self._ahead.clear()
