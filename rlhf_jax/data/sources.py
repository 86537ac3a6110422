"""Where records come from: JSON Lines files, TFDS (without TensorFlow), the embedded world."""

from collections.abc import Sequence
import glob
from pathlib import Path

from rlhf_jax.data import records
from rlhf_jax.errors import UserError

DEFAULTS = dict(
    source='tinyworld',  # tinyworld, jsonl or tfds
    path=(),  # jsonl: files, globs, .gz too; {split} stands for train or validation. tfds: its name or directory;
              # 'tfds:NAME' in the place of files reads TFDS too
    fields=dict(),  # tfds: our field → theirs, where the names differ
    splits=dict(train='train', validation='validation'),  # tfds: our split → theirs
    seed=0,  # tinyworld: of the world
    count=0,  # the first so many records; 0 = all (of tinyworld: its default)
)


def load(config, kind: str, split: str) -> Sequence:
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
  given = any(str(path).startswith('tfds:') for path in config.path)
  rows = SOURCES['tfds' if given else config.source](config, kind, split)
  if config.count:
    rows = rows[:config.count]
  if not len(rows):
    raise UserError(f'data: {config.source} {" ".join(config.path)} holds no {kind} for {split}')
  return rows


def evenly(rows: Sequence, count: int) -> list:
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
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
      raise UserError(f'data.path: {pattern}: no such file')
    for file in files:
      rows += records.read(file, kind)
  return rows


def _tinyworld(config, kind, split):
  from rlhf_jax.data import tinyworld
  return tinyworld.records(kind, split, seed=config.seed, count=config.count or None)


def _tfds(config, kind, split):
  if len(config.path) != 1:
    raise UserError('data.path: expected one TFDS name or directory for data.source = "tfds"')
  import tensorflow_datasets as tfds  # needs no TensorFlow for data sources
  name = str(config.path[0]).removeprefix('tfds:')
  try:
    if Path(name).is_dir():
      source = tfds.builder_from_directory(name).as_data_source(split=config.splits[split])
    else:
      source = tfds.data_source(name, split=config.splits[split])
  except Exception as error:  # TFDS raises many kinds
    raise UserError(f'data.path: TFDS {name!r}, split {config.splits[split]!r}: {str(error).splitlines()[0]}') from error
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
      return [self[i] for i in range(*number.indices(len(self)))]
    if number >= len(self):
      raise IndexError(number)  # ends an iteration; TFDS raises ValueError
    row = _text(self._source[number])
    row = {**row, **{ours: row[theirs] for ours, theirs in self._fields.items() if theirs in row}}
    where = f'{self._name}[{number}]'
    if 'chosen' in row and 'messages' not in row:
      row |= _shared_conversation(row['chosen'], row['rejected'], where)
    if self._kind == 'ranking' and 'chosen' in row:
      return records.ranking(records.parse('preference', row, where))
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
  first, second = (text.rpartition('\n\nAssistant:') for text in (chosen, rejected))
  if not first[1] or not second[1]:
    raise UserError(f'{where}: a preference without "messages" must be a dialogue of "\\n\\nHuman:" and '
                    '"\\n\\nAssistant:" turns')
  messages = []
  for turn in first[0].split('\n\nHuman:')[1:]:
    question, *answers = turn.split('\n\nAssistant:')
    messages.append(dict(role='user', content=question.strip()))
    messages += [dict(role='assistant', content=answer.strip()) for answer in answers[:1]]
  return dict(messages=messages, chosen=first[2].strip(), rejected=second[2].strip())
