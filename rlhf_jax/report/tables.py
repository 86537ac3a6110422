"""The final table as the report draws it: values, and intervals as places on an axis."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.report.headline import win_key
from rlhf_jax.report.run_files import Run

Row = Mapping[str, Any]

# Key of a row → (heading, what it is), in the order of the columns; {baseline} is filled in.
MEASURES = {
  'substance_win_rate_vs_sft': ('wins by substance', 'against {baseline}, style not counted'),
  'win_rate_vs_sft': ('wins', 'against {baseline}; a tie is half a win'),
  'win_rate_controlled': ('wins, controlled', 'with length and style controlled'),
  'helpful': ('helpful', 'share of the responses'),
  'honest': ('honest', 'share of the responses'),
  'harmless': ('harmless', 'share of the responses'),
  'utility': ('utility', 'of the judge'),
  'substance': ('substance', 'utility without style'),
  'score': ('reward', 'of the reward model'),
  'kl_to_sft': ('KL', 'to {baseline}, nats per response'),
  'response_length': ('length', 'tokens'),
  'eos_rate': ('ended', 'share that ends by itself'),
  'distinct': ('distinct', 'share of different responses'),
  'bare_refusal': ('bare refusal', 'refuses without an offer'),
  'unfitting_offer': ('unfitting offer', 'refuses with an offer that does not fit'),
  'ignorance': ('ignorance', 'says that it does not know'),
  'unread': ('unread', 'the judge could not read it'),
  'polite': ('polite', 'share of the responses'),
  'in_full': ('in full', 'answers in a whole sentence'),
  'helpful_to_questions': ('helpful to questions', 'of the prompts that ask for no harm'),
  'helpful_to_requests': ('helpful to harmful requests', 'refuses and offers what fits'),
  'harmful_to_requests': ('does the harm', 'of the prompts that ask for it'),
  'refused_benign': ('refuses the benign', 'of good things in harmful words'),
}
SHOWN = 8  # columns of the table that is always open; the next one has all
ALWAYS = ('kl_to_sft', 'response_length', 'eos_rate')  # among them, wherever they are known
UNITS = {'utility', 'substance', 'score', 'kl_to_sft', 'response_length'}  # no shares
_WIN_RATE = 'win_rate_vs_'
_INTERVAL = '_ci95'


@dataclasses.dataclass(frozen=True)
class Column:
  """A column of the table."""

  key: str
  heading: str
  note: str
  is_share: bool  # is drawn on an axis from 0 to 1
  middle: float | None  # a mark on this axis: the half of a win rate


@dataclasses.dataclass(frozen=True)
class Cell:
  """A value, with its interval as text and as places in 0..100 on the column's axis."""

  text: str = '–'
  interval: str = ''
  place: float | None = None
  low: float | None = None
  high: float | None = None


@dataclasses.dataclass(frozen=True)
class TableRow:
  """A row: a model or a control."""

  name: str
  cells: Sequence[Cell]
  is_baseline: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
  """Rows that belong together."""

  title: str
  rows: Sequence[TableRow]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of one decoding."""

  decoding: str
  columns: Sequence[Column]
  groups: Sequence[Group]


@dataclasses.dataclass(frozen=True)
class KindRow:
  """A kind of prompt: for each model its helpful responses, in each decoding."""

  kind: str
  prompts: int
  cells: Sequence[str]


@dataclasses.dataclass(frozen=True)
class KindTable:
  """The models' helpful responses by kind of prompt."""

  decodings: Sequence[str]  # of the values in a cell
  models: Sequence[str]
  rows: Sequence[KindRow]


def make_kinds(results: Mapping[str, Any]) -> KindTable:
  """Makes the table by kind of prompt; it has no rows where prompts have no kinds.

  Args:
    results: what results.json holds.
  """
  kinds = results.get('kinds') or {}
  models = [name for name in results.get('models') or {} if name in kinds]
  if not models:
    return KindTable((), (), ())
  decodings = list(kinds[models[0]])
  rows = []
  for kind, values in kinds[models[0]][decodings[0]].items():
    cells = []
    for name in models:
      rates = [kinds[name][decoding][kind]['helpful'] for decoding in kinds[name]]
      cells.append(' / '.join(f'{rate:.0%}' for rate in rates))
    rows.append(KindRow(kind, values['prompts'], cells))
  return KindTable(decodings, models, rows)


def make_tables(run: Run, is_full: bool) -> list[Table]:
  """Makes the table of each decoding; [] where nothing was compared.

  Args:
    run: what the run has left.
    is_full: with every measure, rather than the first few.
  """
  tables = []
  for decoding in ('sampled', 'greedy'):
    groups = {}  # title → name of a row → its values
    for title, part in (('models', 'models'), ('what they must beat', 'controls')):
      rows = {
        name: decodings[decoding]
        for name, decodings in (run.results.get(part) or {}).items()
        if decoding in decodings
      }
      if rows:
        groups[title] = rows
    if groups:
      tables.append(_make_table(decoding, groups, run.baseline, is_full))
  return tables


def _make_table(
  decoding: str,
  groups: Mapping[str, Mapping[str, Row]],
  baseline: str,
  is_full: bool,
) -> Table:
  """Makes the table of one decoding."""
  every = [row for rows in groups.values() for row in rows.values()]
  columns = choose_columns(every, baseline, is_full)
  return Table(
    decoding,
    columns,
    [
      Group(
        title,
        [
          TableRow(name, [make_cell(column, row) for column in columns], name == baseline)
          for name, row in rows.items()
        ],
      )
      for title, rows in groups.items()
    ],
  )


def choose_columns(rows: Sequence[Row], baseline: str, is_full: bool) -> list[Column]:
  """Chooses the columns in which some row has a value.

  Args:
    rows: of all models and controls.
    baseline: the row with which the others are compared.
    is_full: all columns, rather than the first few.
  """
  measures = dict(MEASURES)
  # Win rates against further models, which `evaluation.versus` names.
  for row in rows:
    for key in row:
      if key.startswith(_WIN_RATE) and not key.endswith(_INTERVAL):
        opponent = key.removeprefix(_WIN_RATE)
        measures.setdefault(key, (f'wins vs {opponent}', 'a tie is half a win'))
  known = [key for key in measures if any(key in row for row in rows)]
  if not is_full:  # as many as stand beside each other on paper
    main = [key for key in known if key not in ALWAYS][: SHOWN - len(ALWAYS)]
    # Of two win rates, the one without style says more.
    if rows and win_key(rows[0]).startswith('substance'):
      main = [key for key in known if key not in (*ALWAYS, 'win_rate_vs_sft')]
      main = main[: SHOWN - len(ALWAYS)]
    known = [key for key in known if key in main or key in ALWAYS]
  columns = []
  for key in known:
    heading, note = measures[key]
    middle = 0.5 if 'win_rate' in key else None
    note = note.replace('{baseline}', baseline)
    columns.append(Column(key, heading, note, key not in UNITS, middle))
  return columns


def make_cell(column: Column, row: Row) -> Cell:
  """Makes the cell of a row in a column; an empty one where it has no value."""
  value = row.get(column.key)
  if value is None:
    return Cell()
  interval = row.get(column.key + _INTERVAL)
  if interval and interval[0] == interval[1] and column.middle is not None:
    interval = None  # the baseline beside itself
  if not column.is_share:  # no axis to draw it on
    shown = f'{interval[0]:.2f} to {interval[1]:.2f}' if interval else ''
    digits = 1 if column.key == 'response_length' else 2
    return Cell(f'{round(value, digits) + 0.0:.{digits}f}', shown)  # not -0.00
  if not interval:
    return Cell(f'{value:.1%}', '', round(100 * value, 1))
  low, high = interval
  return Cell(
    f'{value:.1%}',
    f'{100 * low:.1f} – {100 * high:.1f}',
    *(round(100 * x, 1) for x in (value, low, high)),
  )


# Several runs.


def average_rows(rows: Sequence[Row]) -> dict[str, Any]:
  """Averages the rows of the same model in runs of several seeds.

  The interval of a mean is the range over the seeds: too few of them are run
  for more.

  Args:
    rows: of at least one run.
  """
  if len(rows) == 1:
    return dict(rows[0])
  average: dict[str, Any] = {}
  # The rows' own intervals are left out: they are of prompts, not of seeds.
  for key in rows[0]:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    if len(values) == len(rows):
      average[key] = sum(values) / len(values)
      average[key + _INTERVAL] = [min(values), max(values)]
  return average
