"""Sources of records: files, the hub, functions, TFDS (without TensorFlow), the embedded world.

A new source is a function with the signature of `Reader` and a row in SOURCES.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
from pathlib import Path
import sys
from typing import Any

from rlhf_jax import hub, named_functions
from rlhf_jax.data import records, row_files, tinyworld
from rlhf_jax.errors import UserError

HUB = 'hf:'  # begins a path that is a data set of the hub
TFDS = 'tfds:'  # begins a path that is a TFDS name or directory


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """Says which records a stage reads."""

  # A key of SOURCES, or 'module:function(option=value)', a function of the split that gives rows.
  source: str = 'tinyworld'

  # jsonl: files of any form that docs/data.md lists, globs, folders, or 'hf:ORG/NAME'; {split}
  # stands for the split. tfds: one name or directory. 'tfds:NAME' and 'hf:ORG/NAME' say their
  # source themselves, whatever `source` is.
  path: tuple[str, ...] = ()

  # Our name of a field → theirs, where the names differ; a dot leads into an object.
  fields: dict[str, str] = dataclasses.field(default_factory=dict)

  # Our name of a split → theirs, in folders, on the hub and in TFDS.
  splits: dict[str, str] = dataclasses.field(
    default_factory=functools.partial(dict, train='train', validation='validation')
  )

  seed: int = -1  # tinyworld: of the world; -1 = that of the run (0 where there is none)
  people: int = tinyworld.DEFAULT_PEOPLE  # tinyworld: persons it knows; more need a larger model
  variant: str = ''  # tinyworld: another form of it, one of tinyworld.VARIANTS
  count: int = 0  # how many records, from the first; 0 = all (tinyworld: its default)


def load_records(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Loads the records of a kind from the source that the options name.

  Args:
    options: which records.
    kind: a key of records.RECORD_TYPES; `records.parse_record` says what may stand for it.
    split: 'train', 'validation', or 'test', which tinyworld has too.

  Returns:
    The records by number; a source may read each of them only when it is asked for.

  Raises:
    UserError: there are none, or a record is not of its form.
  """
  if options.count < 0:
    raise UserError(f'data.count: expected 0 (all) or more, got {options.count}')
  if options.seed < -1 or options.people < 1:
    raise UserError(
      f'data: expected a seed from -1 and people from 1, got {options.seed} and {options.people}'
    )
  _check_field_names(options.fields)
  rows = _find_reader(options)(options, kind, split)
  if options.count:
    rows = rows[: options.count]
  if not len(rows):
    paths = ' '.join(options.path)
    raise UserError(f'data: {options.source} {paths} holds no {kind} for {split}')
  return rows


def spread_evenly(rows: Sequence[Any], count: int) -> list[Any]:
  """Chooses at most `count` rows at even distances, so that each part of a mixture is among them.

  Args:
    rows: records, those of one source after those of another.
    count: how many at most.

  Raises:
    UserError: the count is below 1.
  """
  if count < 1:
    raise UserError(f'eval_records, centre_records: expected 1 or more, got {count}')
  if len(rows) <= count:
    return list(rows)
  return [rows[number * len(rows) // count] for number in range(count)]


def read_files(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Reads files, in the order of `path` and, within a glob or a folder, of their names."""
  if not options.path:
    raise UserError('data.path: expected a file or a glob for data.source = "jsonl"')
  rows = []
  for path in options.path:
    pattern = str(path).replace('{split}', split)
    names: Counter[str] = Counter()
    for file in row_files.find_files(_local_path(pattern), _split_name(options, split)):
      rows += records.read_records(file, kind, options.fields, names)
    _report_shapes(pattern, names)
  return rows


def read_function(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Calls the function that `source` names; it gives the rows of a split, of any known shape."""
  function = named_functions.find_function(options.source, 'data.source')
  given = function(_split_name(options, split))
  if isinstance(given, (str, bytes, dict)) or not isinstance(given, Iterable):
    raise UserError(
      f'data.source {options.source}: expected rows, which are dicts, got {type(given).__name__}'
    )
  names: Counter[str] = Counter()
  rows = []
  for number, row in enumerate(given, 1):
    place = f'{options.source}, row {number}'
    if dataclasses.is_dataclass(row):
      rows.append(row)  # a record already
      continue
    row = records.rename_fields(row, options.fields, place)
    record, name = records.parse_named(kind, row, place)
    names[name] += 1
    rows.append(record)
  _report_shapes(options.source, names)
  return rows


def read_tinyworld(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Makes the records of the embedded world (data/tinyworld/)."""
  return tinyworld.records(
    kind,
    split,
    seed=max(0, options.seed),
    count=options.count or None,
    variant=options.variant,
    num_people=options.people,
  )


def read_tfds(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Opens a TFDS data set, by name or by directory, without importing TensorFlow."""
  if len(options.path) != 1:
    raise UserError('data.path: expected one TFDS name or directory for data.source = "tfds"')
  import tensorflow_datasets as tfds  # slow to import, and few need it

  name = str(options.path[0]).removeprefix(TFDS)
  split_name = _split_name(options, split)
  try:
    # Data sources, unlike tf.data pipelines, need no TensorFlow.
    if Path(name).is_dir():
      source = tfds.builder_from_directory(name).as_data_source(split=split_name)
    else:
      source = tfds.data_source(name, split=split_name)
  except Exception as error:  # TFDS raises many kinds
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise UserError(f'data.path: TFDS {name!r}, split {split_name!r}: {reason}') from error
  return TfdsRecords(source, kind, dict(options.fields), name)


Reader = Callable[[DataOptions, str, str], Sequence[Any]]  # (options, kind, split) → records

# Name of a source, as `data.source` in a config → the function that reads it.
SOURCES: dict[str, Reader] = {
  'jsonl': read_files,
  'tfds': read_tfds,
  'tinyworld': read_tinyworld,
}


class TfdsRecords(Sequence):
  """Rows of a TFDS data set as records; each row is read and parsed when it is asked for."""

  def __init__(self, source: Sequence[Any], kind: str, fields: dict[str, str], name: str):
    self._source = source
    self._kind = kind
    self._fields = fields  # our name → theirs
    self._name = name

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, number: Any) -> Any:
    if isinstance(number, slice):
      return [self[index] for index in range(len(self))[number]]
    number = range(len(self))[number]  # IndexError ends an iteration; TFDS raises ValueError
    where = f'{self._name}[{number}]'
    try:
      row = _plain(self._source[number])
    except UnicodeDecodeError as error:
      raise UserError(f'{where}: not UTF-8: {error}') from None
    row = records.rename_fields(row, self._fields, where)
    return records.parse_record(self._kind, row, where)


def _find_reader(options: DataOptions) -> Reader:
  """Returns what reads the source: what a path says by its beginning, else the one that is set."""
  if any(str(path).startswith(TFDS) for path in options.path):
    return read_tfds
  if any(str(path).startswith(HUB) for path in options.path):
    return read_files
  if options.source == 'tinyworld' and options.path:
    raise UserError(
      f'data.path is {options.path[0]!r}, which data.source = "tinyworld" does not read; '
      'expected data.source = "jsonl"'
    )
  if options.source in SOURCES:
    return SOURCES[options.source]
  if named_functions.is_function_name(options.source):
    return read_function
  names = ', '.join(SOURCES)
  raise UserError(
    f"data.source: expected one of {names}, or 'module:function', got {options.source!r}"
  )


def _local_path(pattern: str) -> str:
  """Returns a path on this machine: that of a copy, where the data set is on the hub."""
  if not pattern.startswith(HUB):
    return pattern
  return str(hub.find_snapshot(pattern.removeprefix(HUB), 'dataset', row_files.PATTERNS))


def _split_name(options: DataOptions, split: str) -> str:
  """Returns what the source calls a split."""
  return options.splits.get(split, split)


def _report_shapes(source: str, names: Counter[str]) -> None:
  """Says as what the rows of a source were read."""
  for name, count in names.most_common():
    # Not on stdout, which may be the output of a command.
    print(f'{source}: read as {name}: {count:,}', file=sys.stderr)


def _check_field_names(fields: dict[str, str]) -> None:
  """Refuses a renaming to a field that no record has."""
  for ours in set(fields) - records.FIELD_NAMES:
    names = ', '.join(sorted(records.FIELD_NAMES))
    raise UserError(f'data.fields: no record has a field {ours!r}; expected some of {names}')


def _plain(value: Any) -> Any:
  """Turns a TFDS value into what JSON would hold.

  TFDS gives bytes for text, arrays for lists, and a dict of lists for a list of dicts. Only
  messages are turned back into a list of dicts.
  """
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, dict):
    value = {key: _plain(item) for key, item in value.items()}
    if set(value) == {'role', 'content'} and isinstance(value['role'], list):
      turns = zip(value['role'], value['content'])
      return [{'role': role, 'content': content} for role, content in turns]
    return value
  if hasattr(value, 'tolist'):  # a numpy array or scalar
    return _plain(value.tolist())
  if isinstance(value, list):
    return [_plain(item) for item in value]
  return value
