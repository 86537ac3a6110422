"""Sources of records: JSON Lines files, TFDS (without TensorFlow) and the embedded world.

A new source is a function with the signature of `Reader` and a row in SOURCES.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import glob
import itertools
from pathlib import Path
import re
from typing import Any

from rlhf_jax.data import records, tinyworld
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataOptions:
  """Says which records a stage reads."""

  source: str = 'tinyworld'  # a key of SOURCES

  # jsonl: files or globs, of which `.gz` are decompressed; {split} stands for train or validation.
  # tfds: one name or directory. 'tfds:NAME' in the place of a file reads TFDS whatever `source` is.
  path: tuple[str, ...] = ()

  # tfds: our name of a field → theirs, where the names differ.
  fields: dict[str, str] = dataclasses.field(default_factory=dict)

  # tfds: our name of a split → theirs.
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
    kind: a key of records.RECORD_TYPES; 'ranking' takes preferences too.
    split: 'train', 'validation', or 'test', which tinyworld has too.

  Returns:
    The records by number; a source may read each of them only when it is asked for.

  Raises:
    UserError: there are none, or a record is not of its form.
  """
  if options.source not in SOURCES:
    names = ', '.join(SOURCES)
    raise UserError(f'data.source: expected one of {names}, got {options.source!r}')
  if options.count < 0:
    raise UserError(f'data.count: expected 0 (all) or more, got {options.count}')
  if options.seed < -1 or options.people < 1:
    raise UserError(
      f'data: expected a seed from -1 and people from 1, got {options.seed} and {options.people}'
    )
  read = SOURCES[_source_name(options)]
  rows = read(options, kind, split)
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


def read_jsonl(options: DataOptions, kind: str, split: str) -> Sequence[Any]:
  """Reads JSON Lines files, in the order of `path` and, within a glob, of their names."""
  if not options.path:
    raise UserError('data.path: expected a file or a glob for data.source = "jsonl"')
  rows = []
  for pattern in options.path:
    pattern = str(pattern).replace('{split}', split)
    for file in _matching_files(pattern):
      rows += records.read_records(file, kind)
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
  _check_field_names(options.fields)
  import tensorflow_datasets as tfds  # slow to import, and few need it

  name = str(options.path[0]).removeprefix('tfds:')
  split_name = options.splits[split]
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
  'jsonl': read_jsonl,
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
    row = self._renamed(row, where)
    if 'messages' not in row and _is_pair(row):
      row |= _shared_conversation(row['chosen'], row['rejected'], where)
    if self._kind == 'ranking':
      return records.parse_ranking(row, where)
    return records.parse_record(self._kind, row, where)

  def _renamed(self, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds the fields under our names to those under theirs."""
    renamed = dict(row)
    for ours, theirs in self._fields.items():
      if theirs not in row:
        present = ', '.join(sorted(row))
        raise UserError(f'data.fields: {where} has no field {theirs!r}; got the fields {present}')
      renamed[ours] = row[theirs]
    return renamed


def _source_name(options: DataOptions) -> str:
  """Returns the source to read: TFDS where a path says so, else the one that is set."""
  if any(str(path).startswith('tfds:') for path in options.path):
    return 'tfds'
  return options.source


def _matching_files(pattern: str) -> list[str]:
  """Returns the files that a name or a glob stands for; a file that exists is never a glob."""
  if Path(pattern).is_file():
    return [pattern]
  matches = sorted(glob.glob(pattern, recursive=True))
  if not matches:
    raise UserError(f'data.path: {pattern}: no such file')
  return matches


def _check_field_names(fields: dict[str, str]) -> None:
  """Refuses a renaming to a field that no record has."""
  known = set()
  for record_class in records.RECORD_TYPES.values():
    known |= {field.name for field in dataclasses.fields(record_class)}
  for ours in set(fields) - known:
    names = ', '.join(sorted(known))
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


def _is_pair(row: dict[str, Any]) -> bool:
  """Says whether a row has two texts of which one was chosen."""
  return isinstance(row.get('chosen'), str) and isinstance(row.get('rejected'), str)


def _shared_conversation(chosen: str, rejected: str, where: str) -> dict[str, Any]:
  r"""Splits two dialogues that differ in the last turn only (hh-rlhf) into fields.

  Args:
    chosen: a whole dialogue, '\n\nHuman: …\n\nAssistant: …'.
    rejected: the same with another last turn.
    where: what error messages call the place.

  Returns:
    The fields `messages`, `chosen` and `rejected` of a preference.
  """
  first = _turns(chosen)
  second = _turns(rejected)
  both_respond = _ends_with_response(first) and _ends_with_response(second)
  if not both_respond or first[:-1] != second[:-1]:
    raise UserError(
      f'{where}: a preference without "messages" must be two dialogues of "\\n\\nHuman:" and '
      '"\\n\\nAssistant:" turns that differ in the last response only'
    )
  return {
    'messages': first[:-1],
    'chosen': first[-1]['content'],
    'rejected': second[-1]['content'],
  }


def _ends_with_response(messages: list[records.Message]) -> bool:
  """Says whether the assistant speaks last."""
  return bool(messages) and messages[-1]['role'] == 'assistant'


def _turns(dialogue: str) -> list[records.Message]:
  """Splits a dialogue into messages; gives [] for a text that is no dialogue.

  Turns of one speaker in a row, which hh-rlhf has, are joined to one message.
  """
  # Splitting by a pattern with a group gives the names between the texts.
  before, *parts = re.split(r'(?:^|\n\n)(Human|Assistant):', dialogue)
  if before.strip():
    return []
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  messages = []
  for speaker, turns in itertools.groupby(zip(parts[::2], parts[1::2]), key=_speaker):
    content = '\n\n'.join(text.strip() for _, text in turns)
    messages.append({'role': roles[speaker], 'content': content})
  return messages


def _speaker(turn: tuple[str, str]) -> str:
  """Returns who speaks in a turn (speaker, text)."""
  return turn[0]
