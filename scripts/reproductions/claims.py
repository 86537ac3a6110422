"""What a reproduction is: a claim, how it is measured, and the band in which it holds.

A claim is a config of experiments/reproductions: `claim` (its id), `text`, `source`,
`arrangement`, `bands`, `reported`, `note`, `seeds`, and `settings`, which the function of
this id reads.
"""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
from typing import Any

from rlhf_jax.experiment import config as configs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path('experiments/reproductions')


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
    config: the file that describes it, below the root of the project.
    text: what is claimed.
    source: the paper.
    arrangement: what is done here.
    bands: measure → band; a claim holds if the mean over seeds is in every band.
    reported: further measures, which have no band.
    note: what to know of the result, and why it is out of its band where it is.
    seeds: with which it is measured.
    settings: sizes, steps, coefficients; what its function reads.
  """

  id: str
  config: str
  text: str
  source: str
  arrangement: str
  bands: dict[str, Band]
  reported: tuple[str, ...]
  note: str
  seeds: tuple[int, ...]
  settings: Mapping[str, Any]


def load_claim(path: str | Path, overrides: tuple[str, ...] = ()) -> Claim:
  """Loads the claim that a config describes.

  Args:
    path: the file; `FILE:gpu` is its size for a GPU, where it has one.
    overrides: texts 'settings.key=value'.
  """
  config = configs.load_plain(str(path), overrides)
  bands = {}
  for name, low, high in config.bands:
    bands[name] = Band(-math.inf if low is None else low, math.inf if high is None else high)
  try:  # as it is named in the commands of the page
    place = str(Path(path).resolve().relative_to(ROOT))
  except ValueError:
    place = str(path)
  return Claim(
    id=config.claim,
    config=place,
    text=config.text,
    source=config.source,
    arrangement=config.arrangement,
    bands=bands,
    reported=tuple(config.reported),
    note=config.note,
    seeds=tuple(config.seeds),
    settings=config.settings.to_dict(),
  )


def list_configs() -> list[Path]:
  """Lists the configs of all claims, in the order of their numbers."""
  return sorted((ROOT / FOLDER).glob('r*.py'), key=_number_of)


def _number_of(path: Path) -> int:
  """Returns the 4 of r4_best_of_n.py."""
  return int(path.stem.partition('_')[0].removeprefix('r'))


def as_floats(values: Any) -> list[float]:
  """Returns an array as a list of rounded floats, for JSON."""
  return [round(float(value), 5) for value in values]
