"""Where records come from: JSON Lines files, TFDS (without TensorFlow), the embedded world."""

from collections.abc import Sequence
import dataclasses
import glob
import itertools
from pathlib import Path
import re

from rlhf_jax.data import records
from rlhf_jax.errors import UserError

DEFAULTS = dict(
    source='tinyworld',  # tinyworld, jsonl or tfds
    path=(),  # jsonl: files, globs, .gz too; {split} stands for train or validation. tfds: its name or directory;
              # 'tfds:NAME' in the place of files reads TFDS too
    fields=dict(),  # tfds: our field → theirs, where the names differ
    splits=dict(train='train', validation='validation'),  # tfds: our split → theirs
    seed=0,  # tinyworld: of the world
    variant='',  # tinyworld: another form of it (data/tinyworld/__init__.py: VARIANTS)
    count=0,  # the first so many records; 0 = all (of tinyworld: its default)
)


def load_records(config, kind: str, split: str) -> Sequence:
  """The records of a kind, by number.

  Args:
    config: like DEFAULTS.
    kind: a key of records.TYPES; 'ranking' takes preferences too.
    split: 'train' or 'validation'.

  Raises:
    UserError: nothing there, or a record is not of its form.
  """
  if config.source not in SOURCES:
    raise UserError(f'data.source: expected one of {", ".join(SOURCES)}, got {config.source!r}')
  if config.count < 0:
    raise UserError(f'data.count: expected 0 (all) or more, got {config.count}')
  if config.seed < 0:
    raise UserError(f'data.seed: expected 0 or more, got {config.seed}')
  given = any(str(path).startswith('tfds:') for path in config.path)
  rows = SOURCES['tfds' if given else config.source](config, kind, split)
  if config.count:
    rows = rows[:config.count]
  if not len(rows):
    raise UserError(f'data: {config.source} {" ".join(config.path)} holds no {kind} for {split}')
  return rows


def spread_evenly(rows: Sequence, count: int) -> list:
  """At most `count` of the rows, evenly spread, so that every source of a mixed set is among them."""
  if count < 1:
    raise UserError(f'eval_records, centre_records: expected 1 or more, got {count}')
  if len(rows) <= count:
    return list(rows)
  return [rows[i * len(rows) // count] for i in range(count)]


def _jsonl(config, kind, split):
  if not config.path:
    raise UserError('data.path: expected a file or a glob for data.source = "jsonl"')
  rows = []
  for pattern in config.path:
    pattern = str(pattern).replace('{split}', split)
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    if not files:
      raise UserError(f'data.path: {pattern}: no such file')
    for file in files:
      rows += records.read(file, kind)
  return rows


def _tinyworld(config, kind, split):
  from rlhf_jax.data import tinyworld
  return tinyworld.records(kind, split, seed=config.seed, count=config.count or None,
                           variant=config.variant)


def _tfds(config, kind, split):
  if len(config.path) != 1:
    raise UserError('data.path: expected one TFDS name or directory for data.source = "tfds"')
  known = {field.name for record in records.TYPES.values() for field in dataclasses.fields(record)}
  for ours in set(config.fields) - known:
    raise UserError(f'data.fields: no record has a field {ours!r}; expected some of {", ".join(sorted(known))}')
  import tensorflow_datasets as tfds  # needs no TensorFlow for data sources
  name = str(config.path[0]).removeprefix('tfds:')
  try:
    if Path(name).is_dir():
      source = tfds.builder_from_directory(name).as_data_source(split=config.splits[split])
    else:
      source = tfds.data_source(name, split=config.splits[split])
  except Exception as error:  # TFDS raises many kinds
    said = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise UserError(f'data.path: TFDS {name!r}, split {config.splits[split]!r}: {said}') from error
  return _Rows(source, kind, dict(config.fields), name)


SOURCES = {'jsonl': _jsonl, 'tfds': _tfds, 'tinyworld': _tinyworld}


class _Rows(Sequence):
  """TFDS rows as records, read when asked for."""

  def __init__(self, source, kind, fields, name):
    self._source, self._kind, self._fields, self._name = source, kind, fields, name

  def __len__(self):
    return len(self._source)

  def __getitem__(self, number):
    if isinstance(number, slice):
      return [self[i] for i in range(len(self))[number]]
    number = range(len(self))[number]  # IndexError ends an iteration; TFDS raises ValueError
    where = f'{self._name}[{number}]'
    try:
      row = _text(self._source[number])
    except UnicodeDecodeError as error:
      raise UserError(f'{where}: not UTF-8: {error}') from None
    for theirs in set(self._fields.values()) - set(row):
      raise UserError(f'data.fields: {where} has no field {theirs!r}; found {", ".join(sorted(row))}')
    row = {**row, **{ours: row[theirs] for ours, theirs in self._fields.items()}}
    if 'messages' not in row and all(isinstance(row.get(name), str) for name in ('chosen', 'rejected')):
      row |= _shared_conversation(row['chosen'], row['rejected'], where)
    if self._kind == 'ranking':
      return records.parse_ranking(row, where)
    return records.parse(self._kind, row, where)


def _text(value):
  """TFDS gives bytes for text, arrays for lists, and a dict of lists for a list of dicts."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, dict):
    value = {key: _text(item) for key, item in value.items()}
    if set(value) == {'role', 'content'} and isinstance(value['role'], list):
      return [dict(role=role, content=content) for role, content in zip(value['role'], value['content'])]
    return value
  if hasattr(value, 'tolist'):
    return _text(value.tolist())
  if isinstance(value, list):
    return [_text(item) for item in value]
  return value


def _shared_conversation(chosen, rejected, where):
  """Two whole dialogues '\\n\\nHuman: …\\n\\nAssistant: …' that differ in the last turn (hh-rlhf) → fields."""
  first, second = _turns(chosen), _turns(rejected)
  answered = all(turns and turns[-1]['role'] == 'assistant' for turns in (first, second))
  if not answered or first[:-1] != second[:-1]:
    raise UserError(f'{where}: a preference without "messages" must be two dialogues of "\\n\\nHuman:" and '
                    '"\\n\\nAssistant:" turns that differ in the last answer only')
  return dict(messages=first[:-1], chosen=first[-1]['content'], rejected=second[-1]['content'])


def _turns(dialogue):
  """Messages; turns of one speaker in a row, which hh-rlhf has, are one message. [] = not a dialogue."""
  before, *parts = re.split(r'(?:^|\n\n)(Human|Assistant):', dialogue)
  spoken = itertools.groupby(zip(parts[::2], parts[1::2]), key=lambda turn: turn[0])
  return [] if before.strip() else [
      dict(role={'Human': 'user', 'Assistant': 'assistant'}[speaker], content='\n\n'.join(t.strip() for _, t in turns))
      for speaker, turns in spoken]
