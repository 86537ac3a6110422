"""What a reproduction is: a claim, how it is measured, and the band in which it holds."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Band:
  """The values of a measure with which a claim holds."""

  low: float = -math.inf
  high: float = math.inf

  def holds(self, value: float) -> bool:
    """Says whether a value is in the band."""
    return self.low <= value <= self.high

  def __str__(self) -> str:
    if self.low == -math.inf:
      return f'≤ {self.high:g}'
    if self.high == math.inf:
      return f'≥ {self.low:g}'
    return f'{self.low:g} – {self.high:g}'


@dataclasses.dataclass(frozen=True)
class Measured:
  """What one seed gave."""

  values: dict[str, float]  # by name of the measure
  # Title of a plot → name of a curve → (x, y), for the page.
  curves: dict[str, dict[str, tuple[list[float], list[float]]]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the field, in small.

  Attributes:
    id: its name, such as R1.
    text: what is claimed.
    source: the paper.
    arrangement: what is done here.
    bands: measure → band; a claim holds if the mean over seeds is in every band.
    run: seed → what was measured.
    reported: further measures, which have no band.
    note: what to know of the result, and why it is out of its band where it is.
  """

  id: str
  text: str
  source: str
  arrangement: str
  bands: dict[str, Band]
  run: Callable[[int], Measured]
  reported: tuple[str, ...] = ()
  note: str = ''


def as_floats(values: Any) -> list[float]:
  """Returns an array as a list of rounded floats, for JSON."""
  return [round(float(value), 5) for value in values]
