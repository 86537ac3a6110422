"""The geometry of the report's charts: numbers in, places in an SVG out.

Nothing here knows a colour: the template draws the places, and the style sheet
colours them, so that one chart serves light, dark and paper.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import math

WIDTH, HEIGHT = 360.0, 210.0  # of a chart, in units of its SVG
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 34.0  # margins, which hold the axes
MAX_POINTS = 160  # of a line; of more, neighbours are averaged
MARKED_POINTS = 16  # a line of at most so many points shows each of them

COLORS = 8  # in the style sheet

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
  """A line or a set of points, with values in the units of the data.

  Attributes:
    name: in the legend.
    points: (x, y), by x.
    band: (x, low, high), by x; () without.
    is_line: whether the points are joined.
    has_bars: whether the band is drawn as a bar at each point.
    is_dashed: for what is measured on training data, or a baseline.
    color: its number among the colours; None for the next one.
  """

  name: str
  points: Sequence[Point]
  band: Sequence[tuple[float, float, float]] = ()
  is_line: bool = True
  has_bars: bool = False
  is_dashed: bool = False
  color: int | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
  """A series as the template draws it.

  Attributes:
    name: in the legend.
    path: of the line, in SVG's path language; '' without.
    band: likewise; '' without.
    marks: (x, y, what it says), of points that are shown.
    bars: (x, low, high) in units of the SVG: the intervals of single points.
    readings: [x, y, what it says] of every point, for the pointer.
    is_dashed: whether the line is.
    color: its number among the colours.
  """

  name: str
  path: str
  band: str
  marks: Sequence[tuple[float, float, str]]
  bars: Sequence[tuple[float, float, float]]
  readings: Sequence[tuple[float, float, str]]
  is_dashed: bool
  color: int


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart as the template draws it.

  Attributes:
    title: what is drawn.
    note: the unit, and how to read it.
    x_label: of the axis.
    x_ticks: (place, text).
    y_ticks: likewise.
    series: what is drawn.
    summary: the chart in words, for those who do not see it.
  """

  title: str
  note: str
  x_label: str
  x_ticks: Sequence[tuple[float, str]]
  y_ticks: Sequence[tuple[float, str]]
  series: Sequence[Drawn]
  summary: str


def draw_chart(title: str, note: str, x_label: str, series: Sequence[Series]) -> Chart | None:
  """Places series in one chart; None where there is no point.

  Args:
    title: what is drawn.
    note: the unit, and how to read it.
    x_label: of the horizontal axis.
    series: the values.
  """
  series = [_simplify(one) for one in series if one.points]
  if not series:
    return None
  # Steps and distances are counted from 0.
  places = [0.0, *(x for one in series for x, _ in one.points)]
  x_scale = _Scale(places, LEFT, WIDTH - RIGHT)
  # A band belongs to the chart as much as its line.
  heights = [y for one in series for _, y in one.points]
  heights += [y for one in series for _, low, high in one.band for y in (low, high)]
  y_scale = _Scale(heights, HEIGHT - BOTTOM, TOP, rounded=4)
  return Chart(
    title=title,
    note=note,
    x_label=x_label,
    x_ticks=x_scale.ticks(5),
    y_ticks=y_scale.ticks(4),
    series=[_draw(one, number, x_scale, y_scale, x_label) for number, one in enumerate(series)],
    summary=f'{title}. ' + '; '.join(_summarise(one) for one in series) + '.',
  )


def format_number(value: float) -> str:
  """Formats a number in few characters.

  >>> [format_number(x) for x in (0.0, 0.1234, 12.345, 12000.0, 1e-5)]
  ['0', '0.123', '12.3', '12,000', '1e-05']
  """
  if value == 0:
    return '0'
  size = abs(value)
  if size >= 1e7 or size < 1e-3:
    return f'{value:.2g}'
  if size >= 1000:
    return f'{value:,.0f}'
  return f'{value:.3g}'


class _Scale:
  """A linear axis, from values to places."""

  def __init__(self, values: Sequence[float], first: float, last: float, rounded: int = 0):
    """Fits the axis to values.

    Args:
      values: that are shown.
      first: the place of the least.
      last: the place of the greatest.
      rounded: the axis begins and ends at a tick, if there are about so many; 0
        = at a value.
    """
    low, high = min(values), max(values)
    if low == high:  # a single value stands in the middle
      low, high = low - 0.5, high + 0.5
    if rounded:  # so that no line touches the frame between two ticks
      step = _round_step((high - low) / rounded)
      low = math.floor(low / step + 1e-9) * step
      high = math.ceil(high / step - 1e-9) * step
    self.low, self.high = low, high
    self.first, self.last = first, last

  def place(self, value: float) -> float:
    """Returns the place of a value, to a tenth of a unit."""
    share = (value - self.low) / (self.high - self.low)
    return round(self.first + share * (self.last - self.first), 1)

  def ticks(self, count: int) -> list[tuple[float, str]]:
    """Returns places and texts of about so many round values."""
    step = _round_step((self.high - self.low) / count)
    # The small terms keep a tick that rounding put just outside the axis.
    value = math.ceil(self.low / step - 1e-9) * step
    ticks = []
    while value <= self.high + 1e-9 * step:
      shown = 0.0 if abs(value) < 1e-9 * step else value
      ticks.append((self.place(value), format_number(float(f'{shown:.6g}'))))
      value += step
    return ticks


def _round_step(step: float) -> float:
  """Rounds a distance up to 1, 2 or 5 times a power of ten."""
  power = 10.0 ** math.floor(math.log10(step))
  for factor in (1, 2, 5):
    if step <= factor * power * (1 + 1e-9):
      return factor * power
  return 10 * power


def _simplify(series: Series) -> Series:
  """Averages neighbouring points of a line that has more of them than can be seen."""
  size = -(-len(series.points) // MAX_POINTS)  # neighbours that become one point
  if size <= 1:
    return series
  points = [(_mean(xs), _mean(ys)) for xs, ys in _grouped(series.points, size)]
  band = [(_mean(xs), _mean(low), _mean(high)) for xs, low, high in _grouped(series.band, size)]
  return dataclasses.replace(series, points=points, band=band)


def _grouped(rows: Sequence[tuple], size: int) -> Iterable[tuple]:
  """Yields the columns of every `size` rows."""
  for begin in range(0, len(rows), size):
    yield tuple(zip(*rows[begin : begin + size], strict=True))


def _mean(values: Sequence[float]) -> float:
  return math.fsum(values) / len(values)


def _draw(series: Series, number: int, x_scale: _Scale, y_scale: _Scale, x_label: str) -> Drawn:
  """Places one series, the one of this number in its chart."""
  readings = []
  for x, y in series.points:
    text = f'{series.name}: {format_number(y)} at {x_label} {format_number(x)}'
    readings.append((x_scale.place(x), y_scale.place(y), text))
  path = _join(readings) if series.is_line and len(readings) > 1 else ''
  band = [
    (x_scale.place(x), y_scale.place(low), y_scale.place(high)) for x, low, high in series.band
  ]
  # Along the upper edge and back along the lower one.
  outline = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
  shows_marks = not path or len(readings) <= MARKED_POINTS
  return Drawn(
    name=series.name,
    path=path,
    band='' if series.has_bars or len(band) < 2 else _join(outline) + 'Z',
    marks=readings if shows_marks else [],
    bars=band if series.has_bars else [],
    readings=readings,
    is_dashed=series.is_dashed,
    color=(number if series.color is None else series.color) % COLORS,
  )


def _join(places: Iterable[tuple]) -> str:
  """Returns a path through places."""
  return 'M' + 'L'.join(f'{place[0]:g} {place[1]:g}' for place in places)


def _summarise(series: Series) -> str:
  """Describes a series by its first and last value."""
  first, last = series.points[0][1], series.points[-1][1]
  if len(series.points) == 1:
    return f'{series.name}: {format_number(first)}'
  return f'{series.name}: from {format_number(first)} to {format_number(last)}'


# Several runs.


def over_runs(
  name: str,
  lines: Sequence[Sequence[Point]],
  is_dashed: bool = False,
  color: int | None = None,
) -> Series:
  """Makes one series of the same curve of several runs: their mean, and their range as a band.

  Args:
    name: in the legend.
    lines: the points of each run; only those x count that all of them have.
    is_dashed: whether the line is.
    color: as in Series.
  """
  if len(lines) == 1:
    return Series(name, lines[0], is_dashed=is_dashed, color=color)
  # Evaluations may lie at other steps; a mean over fewer runs would jump there.
  values = [dict(line) for line in lines]
  common = sorted(set.intersection(*(set(of_run) for of_run in values)))
  points, band = [], []
  for x in common:
    at_x = [of_run[x] for of_run in values]
    points.append((x, _mean(at_x)))
    band.append((x, min(at_x), max(at_x)))
  return Series(name, points, band, is_dashed=is_dashed, color=color)


# Histograms.


@dataclasses.dataclass(frozen=True)
class Histogram:
  """Bars of equal width over an axis, and the mean.

  Attributes:
    title: whose values.
    bars: (x, y, width, height, what it says), in units of the SVG.
    mean: the place of the mean.
    x_ticks: (place, text).
    summary: in words.
  """

  title: str
  bars: Sequence[tuple[float, float, float, float, str]]
  mean: float
  x_ticks: Sequence[tuple[float, str]]
  summary: str


HISTOGRAM_HEIGHT = 120.0  # in units of the SVG
_BASE = HISTOGRAM_HEIGHT - 24  # of the bars; below stands the axis


def draw_histograms(
  values: Sequence[tuple[str, Sequence[float]]], bins: int = 24
) -> list[Histogram]:
  """Draws a histogram of each set of values, all over the same axis and in the same scale.

  Args:
    values: (title, values) of each; empty ones are left out.
    bins: the number of bars.
  """
  values = [(title, own) for title, own in values if own]
  if not values:
    return []
  # One axis and one scale for all, so that they can be compared.
  every = list(itertools.chain.from_iterable(own for _, own in values))
  scale = _Scale(every, 10.0, WIDTH - 10.0)
  width = (scale.high - scale.low) / bins
  shares = [_count(own, scale.low, width, bins) for _, own in values]
  highest = max(max(own) for own in shares)
  drawn = []
  for (title, own), heights in zip(values, shares, strict=True):
    bars = []
    for number, share in enumerate(heights):
      if not share:
        continue  # an empty bin has no bar
      low = scale.low + number * width
      left, right = scale.place(low), scale.place(low + width)
      height = round((_BASE - 8) * share / highest, 1)
      text = f'{share:.1%} from {format_number(low)} to {format_number(low + width)}'
      bars.append((left, round(_BASE - height, 1), round(right - left - 0.6, 1), height, text))
    mean = _mean(own)
    drawn.append(
      Histogram(
        title=title,
        bars=bars,
        mean=scale.place(mean),
        x_ticks=scale.ticks(6),
        summary=f'{title}: {len(own)} responses, mean {format_number(mean)}, '
        f'from {format_number(min(own))} to {format_number(max(own))}.',
      )
    )
  return drawn


def _count(values: Sequence[float], low: float, width: float, bins: int) -> list[float]:
  """Returns the share of the values in each bin."""
  counts = [0] * bins
  for value in values:
    # The largest value ends the last bin rather than beginning another.
    counts[min(bins - 1, int((value - low) / width))] += 1
  return [count / len(values) for count in counts]
