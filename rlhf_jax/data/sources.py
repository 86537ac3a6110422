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

import numpy as np

from rlhf_jax import hub, named_functions, storage, text_table
from rlhf_jax import options as options_lib
from rlhf_jax.data import records, row_files, tinyworld
from rlhf_jax.data.on_disk import OnDisk
from rlhf_jax.errors import UserError
from rlhf_jax.options import Count, Natural, OwnSeed, ShareBelowOne

HUB = 'hf:'  # prefix of a path that names a data set of the hub
HALVES = ('even', 'odd')  # of the training records
TFDS = 'tfds:'  # prefix of a path that is a TFDS name or directory


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """Says which records a stage reads."""

  # A key of SOURCES, or 'module:function(option=value)', a function of the split that gives rows.
  source: str = 'tinyworld'

  # jsonl: files of any form that docs/data.md lists, globs, folders, or
  # 'hf:ORG/NAME'; {split} is replaced by the split. tfds: one name or directory.
  # A path 'tfds:NAME' or 'hf:ORG/NAME' decides the source whatever `source` is.
  path: tuple[str, ...] = ()

  # Our name of a field → the data set's, where they differ; a dot leads into an object.
  fields: dict[str, str] = dataclasses.field(default_factory=dict)

  # Our name of a split → the data set's, in folders, on the hub and in TFDS.
  splits: dict[str, str] = dataclasses.field(
    default_factory=functools.partial(dict, train='train', validation='validation')
  )

  seed: OwnSeed = -1  # tinyworld: of the world; -1 = that of the run (0 where there is none)
  people: Count = tinyworld.DEFAULT_PEOPLE  # tinyworld: its persons; more need a larger model
  variant: str = ''  # tinyworld: another form of it, one of tinyworld.VARIANTS
  # jsonl: the share of the records of a path without {split} that are its
  # validation split, drawn by `seed`; the others are for training. 0 = such a
  # path is one split only.
  hold_out: ShareBelowOne = 0.0
  count: Natural = 0  # how many records, the first ones; 0 = all (tinyworld: its default)
  # Of the training records, every second one: even or odd, by their place; '' = all.
  # Models that were trained on the two halves say how far they agree (docs/reward.md).
  half: str = ''

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    reads = _setting_names(self)
    names = ('path', 'fields', 'splits', 'hold_out', 'seed', 'people', 'variant')
    return {name: f'the source is {self.source!r}' for name in names if name not in reads}


def load_records(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Loads the records of a kind from the source that the options name.

  Args:
    options: which source, and which of its records.
    kind: a key of records.RECORD_TYPES; `records.parse_record` says what is converted to it.
    split: 'train', 'validation' or 'test'.

  Returns:
    The records as a sequence; a source may read each one only when it is indexed.

  Raises:
    UserError: there are none, or a row is not such a record.
  """
  options_lib.check_ranges(options, 'data')
  if options.half not in ('', *HALVES):
    raise UserError(f'data.half: expected even, odd or nothing, got {options.half!r}')
  _check_field_names(options.fields)
  rows = _find_reader(options)(options, kind, split)
  if options.count:
    rows = rows[: options.count]
  if options.half and split == 'train':
    rows = rows[HALVES.index(options.half) :: 2]
  if not len(rows):
    paths = ' '.join(options.path)
    raise UserError(f'data: {options.source} {paths} holds no {kind} for {split}')
  return rows


def spread_evenly(rows: Sequence[Any], count: int) -> list[Any]:
  """Chooses at most `count` rows at even distances, so that each source of a mixture has its share.

  Args:
    rows: records; in a mixture, those of one source after those of another.
    count: the largest number of rows.

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
  rows = records.collection(kind)
  for path in options.path:
    pattern = str(path).replace('{split}', split)
    names: Counter[str] = Counter()
    own = records.collection(kind)
    for file in row_files.find_files(local_path(pattern), _split_name(options, split)):
      own.extend(records.iterate_records(file, kind, options.fields, names))
    _report_shapes(pattern, names)
    if options.hold_out and has_one_split(str(path)):
      own = _hold_out(own, options, split)
      said = f'{pattern}: {len(own):,} records are for {split}'
      print(text_table.fit_terminal(said, sys.stderr), file=sys.stderr)
    if len(options.path) == 1:
      return own
    rows.extend(own)
  return rows


def has_one_split(path: str) -> bool:
  """Says whether a path means the same files for every split."""
  if '{split}' in path or path.startswith((HUB, TFDS)):
    return False
  return not Path(local_path(path)).is_dir()


def _hold_out(rows: Any, options: DataOptions, split: str) -> Sequence[Any]:
  """Returns the records of a split, of which a share is validation; both keep their order."""
  if split not in ('train', 'validation'):
    raise UserError(f'data.hold_out: it makes the splits train and validation, got {split!r}')
  count = max(1, round(options.hold_out * len(rows)))
  order = np.random.default_rng(max(0, options.seed)).permutation(len(rows))
  held_out = np.zeros(len(rows), bool)
  held_out[order[:count]] = True
  numbers = np.flatnonzero(held_out == (split == 'validation'))
  if isinstance(rows, OnDisk):
    return rows.choose(numbers)
  return [rows[number] for number in numbers]


def read_function(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Calls the function that `source` names; it returns a split's rows, in any known shape."""
  function = named_functions.find_function(options.source, 'data.source', ('split',))
  given = function(_split_name(options, split))
  if isinstance(given, (str, bytes, dict)) or not isinstance(given, Iterable):
    raise UserError(
      f'data.source {options.source}: expected an iterable of dicts, got {type(given).__name__}'
    )
  names: Counter[str] = Counter()
  rows = records.collection(kind)
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
  """Generates the records of the embedded world (data/tinyworld/)."""
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
  import tensorflow_datasets as tfds  # imported only here, as it is slow

  name = str(options.path[0]).removeprefix(TFDS)
  split_name = _split_name(options, split)
  try:
    # Data sources, unlike tf.data pipelines, need no TensorFlow.
    if Path(name).is_dir():
      source = tfds.builder_from_directory(name).as_data_source(split=split_name)
    else:
      source = tfds.data_source(name, split=split_name)
  except Exception as error:  # TFDS raises exceptions of many types
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise UserError(f'data.path: TFDS {name!r}, split {split_name!r}: {reason}') from error
  return TfdsRecords(source, kind, dict(options.fields), name)


Reader = Callable[[DataOptions, str, str], Sequence[Any]]  # (options, kind, split) → records

# Name of a source in `data.source` → the function that reads it.
SOURCES: dict[str, Reader] = {
  'jsonl': read_files,
  'tfds': read_tfds,
  'tinyworld': read_tinyworld,
}


class TfdsRecords(Sequence):
  """The rows of a TFDS data set as records; each is read and parsed when it is indexed."""

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
    # Raises the IndexError that ends an iteration, for which TFDS raises ValueError.
    number = range(len(self))[number]
    where = f'{self._name}[{number}]'
    try:
      row = _plain(self._source[number])
    except UnicodeDecodeError as error:
      raise UserError(f'{where}: not UTF-8: {error}') from None
    row = records.rename_fields(row, self._fields, where)
    return records.parse_record(self._kind, row, where)


def _setting_names(options: DataOptions) -> tuple[str, ...]:
  """Returns the settings that the source reads, beside `source` and `count`."""
  if any(str(path).startswith((TFDS, HUB)) for path in options.path):
    return ('path', 'fields', 'splits')
  if options.source == 'tinyworld':
    return ('seed', 'people', 'variant')
  if options.hold_out:
    return ('path', 'fields', 'splits', 'hold_out', 'seed')
  if options.source == 'jsonl':
    return ('path', 'fields', 'splits', 'hold_out')
  if options.source in SOURCES:
    return ('path', 'fields', 'splits')
  if named_functions.is_function_name(options.source):
    return ('fields', 'splits')
  # There is no such source: that is said, rather than what else it would not read.
  return tuple(field.name for field in dataclasses.fields(options))


def _find_reader(options: DataOptions) -> Reader:
  """Returns the reader that the prefix of a path decides, else that of `source`."""
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


def local_path(pattern: str) -> str:
  """Returns a local path; what is on the hub or behind a URL is copied to this machine first."""
  if storage.is_url(pattern):
    return storage.local_copy(pattern, 'data.path', row_files.PATTERNS)
  if not pattern.startswith(HUB):
    return pattern
  return str(hub.find_snapshot(pattern.removeprefix(HUB), 'dataset', row_files.PATTERNS))


def _split_name(options: DataOptions, split: str) -> str:
  """Returns what the source calls a split."""
  return options.splits.get(split, split)


def _report_shapes(source: str, names: Counter[str]) -> None:
  """Prints the shapes that the rows of a source were read as, and how many have each."""
  for name, count in names.most_common():
    # On stderr, as stdout may be the output of a command.
    said = f'{source}: read as {name}: {count:,}'
    print(text_table.fit_terminal(said, sys.stderr), file=sys.stderr)


def _check_field_names(fields: dict[str, str]) -> None:
  """Refuses `fields` that map a name which no record has."""
  for ours in set(fields) - records.FIELD_NAMES:
    names = ', '.join(sorted(records.FIELD_NAMES))
    raise UserError(f'data.fields: no record has a field {ours!r}; expected some of {names}')


def _plain(value: Any) -> Any:
  """Converts a TFDS value to types of JSON.

  TFDS gives bytes for text, arrays for lists, and a dict of lists for a list of
  dicts. The last is converted back for messages only.
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
