"""Reads rows from files (JSON Lines, JSON, Parquet, Arrow), and finds the files of a folder.

A row is the fields of one record; it comes with its place for error messages.
"""

from collections.abc import Iterator
import decimal
import glob
import os
from pathlib import Path
import re
from typing import Any
import zlib

from rlhf_jax import files, fingerprints, json_lines, plain_text
from rlhf_jax.errors import UserError

# Names of the list of rows in a JSON file that is one object.
_LISTS = ('data', 'rows', 'examples', 'instances')

# How the names of files with rows end.
SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.json.gz', '.ndjson', '.parquet', '.arrow')

# Our name of a split → words that mean it in the file names of data sets on the hub.
_SPLIT_WORDS = {
  'train': ('train', 'training'),
  'validation': ('validation', 'valid', 'val', 'dev'),
  'test': ('test', 'testing', 'eval', 'evaluation'),
}

# Globs of the files that are copied of a data set.
PATTERNS = ('README.md', *(f'*{suffix}' for suffix in SUFFIXES))

_HEAD = 4096  # bytes, of which the form of a file is recognised


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads the rows of a file, whose format is recognised by its contents, not its name.

  Args:
    path: JSON Lines, a JSON array, a JSON object with such an array, Parquet or Arrow; gzip is
      decompressed.

  Yields:
    (place, row); the place is 'FILE:LINE', or 'FILE, row N' in formats without lines.

  Raises:
    UserError: the file cannot be read, or is no longer what a run has written.
  """
  fingerprints.check_file(path)
  try:
    with files.open_bytes(path) as file:
      head = file.read(_HEAD)
  except (OSError, EOFError, zlib.error):
    head = b''  # the reader below reports the error
  if head.startswith(b'PAR1'):
    yield from _read_parquet(path)
  elif head.startswith(b'ARROW1') or str(path).endswith('.arrow'):
    yield from _read_arrow(path)
  elif _is_one_value(head):
    yield from _read_json(path)
  else:
    yield from json_lines.read_values(path)


def find_files(pattern: str, split: str) -> list[str]:
  """Returns the files that a file name, a glob or a folder stands for.

  Args:
    pattern: the name of an existing file is never taken for a glob. A folder may be one that
      `save_to_disk` of `datasets` wrote, a copy of a data set of the hub, or any
      other folder whose file names say their split.
    split: the name of the split in a folder.

  Raises:
    UserError: there is no such file, or the folder has no such split.
  """
  path = Path(pattern)
  if path.is_file():
    return [pattern]
  if path.is_dir():
    return _files_of_folder(path, split)
  matches = sorted(glob.glob(pattern, recursive=True))
  if not matches:
    raise UserError(f'data.path: {pattern}: no such file')
  return matches


# Files.


def _is_one_value(head: bytes) -> bool:
  """Says whether a file holds one JSON value over several lines, or an array in one line.

  Args:
    head: the beginning of the file.
  """
  text = head.removeprefix(b'\xef\xbb\xbf').lstrip()
  first, _, rest = text.partition(b'\n')
  if text[:1] == b'[':
    # One array, in one line or over several. Lines that are arrays each would not be rows.
    return not rest.lstrip().startswith(b'[') and first.rstrip()[1:].lstrip()[:1] in (
      b'{',
      b']',
      b'',
    )
  # One object over several lines: its first line is incomplete.
  return text[:1] == b'{' and bool(rest) and not first.rstrip().endswith(b'}')


def _read_json(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads a JSON file that is one value."""
  data = json_lines.read_all_bytes(path)
  try:
    value = json_lines.parse_json(data, str(path))
  except UserError:
    first_error = _first_bad_line(path)  # perhaps JSON Lines with a damaged first line
    if first_error is not None:
      raise first_error from None
    raise
  rows = value
  if isinstance(value, dict):
    rows = next((value[name] for name in _LISTS if isinstance(value.get(name), list)), [value])
  for number, row in enumerate(rows, 1):
    yield f'{path}, row {number}', row


def _first_bad_line(path: str | os.PathLike) -> UserError | None:
  """Returns the error of the first line that is not JSON; None if no line is a JSON object."""
  error = None
  num_good = 0
  with files.open_bytes(path) as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        value = json_lines.parse_json(line, f'{path}:{number}')
        num_good += isinstance(value, dict)
      except UserError as bad:
        error = error or bad
  return error if num_good else None


def _read_parquet(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads a Parquet file."""
  import pyarrow as pa
  from pyarrow import parquet

  try:
    batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
    yield from _rows_of_batches(batches, path)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f'{path}: cannot read: {plain_text.one_line(str(error), 300)}') from None


def _read_arrow(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads an Arrow file or stream; `datasets` writes streams."""
  import pyarrow as pa

  try:
    with pa.memory_map(str(path)) as source:
      is_file = source.read(6) == b'ARROW1'
      source.seek(0)
      if is_file:
        reader = pa.ipc.open_file(source)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
      else:
        batches = iter(pa.ipc.open_stream(source))
      yield from _rows_of_batches(batches, path)
  except (OSError, pa.ArrowException) as error:
    raise UserError(f'{path}: cannot read: {plain_text.one_line(str(error), 300)}') from None


def _rows_of_batches(batches: Iterator[Any], path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Yields (place, row) for each row of Arrow's record batches."""
  number = 0
  for batch in batches:
    for row in batch.to_pylist():
      number += 1
      yield f'{path}, row {number}', _as_json(row)


def _as_json(value: Any) -> Any:
  """Converts a value of Arrow to types of JSON: dates to text, bytes to the text they encode."""
  if value is None or isinstance(value, (str, bool, int, float)):
    return value
  if isinstance(value, dict):
    return {str(key): _as_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_as_json(item) for item in value]
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, decimal.Decimal):
    return float(value)
  return value.isoformat() if hasattr(value, 'isoformat') else str(value)


# Folders.


def _files_of_folder(folder: Path, split: str) -> list[str]:
  """Returns the files of a split in a folder."""
  if (folder / 'dataset_dict.json').is_file():  # DatasetDict.save_to_disk
    return _files_of_saved(folder / split, folder)
  if (folder / 'state.json').is_file():  # Dataset.save_to_disk
    return _files_of_saved(folder, folder)
  stated = _files_of_card(folder, split)
  if stated is not None:
    return stated
  found = sorted(
    str(path)
    for path in folder.rglob('*')
    if path.is_file() and path.name.endswith(SUFFIXES) and not _is_hidden(path, folder)
  )
  by_split: dict[str, list[str]] = {}
  for path in found:
    by_split.setdefault(_split_of(os.path.relpath(path, folder)), []).append(path)
  if split in by_split:
    return by_split[split]
  if set(by_split) == {''} and split == 'train':
    return by_split['']
  raise _no_split(folder, split, [name or 'files without a split' for name in by_split])


def _files_of_saved(folder: Path, root: Path) -> list[str]:
  """Returns the files that `save_to_disk` lists."""
  state = folder / 'state.json'
  if not state.is_file():
    names = [path.name for path in root.iterdir() if (path / 'state.json').is_file()]
    raise _no_split(root, folder.name, names)
  listed = json_lines.parse_json(json_lines.read_all_bytes(state), str(state))
  return [str(folder / item['filename']) for item in listed['_data_files']]


def _files_of_card(folder: Path, split: str) -> list[str] | None:
  """Returns the files that a data set's card lists for a split; None if it lists no files."""
  card = folder / 'README.md'
  if not card.is_file():
    return None
  match = re.match(r'---\n(.*?)\n---', card.read_text('utf-8', 'replace'), re.DOTALL)
  if match is None:
    return None
  import yaml

  try:
    configs = (yaml.safe_load(match.group(1)) or {}).get('configs') or []
    parts = {config['config_name']: config.get('data_files') for config in configs}
  except (yaml.YAMLError, AttributeError, KeyError, TypeError):
    return None
  if len(parts) > 1 and 'default' not in parts:
    names = ', '.join(sorted(parts))
    raise UserError(
      f'data.path: {folder}: expected one data set, got several ({names}); give the files of one'
    )
  data_files = parts.get('default', next(iter(parts.values()), None))
  if not isinstance(data_files, list) or not all(isinstance(item, dict) for item in data_files):
    return None
  by_split = {item.get('split', 'train'): item.get('path') for item in data_files}
  if split not in by_split:
    raise _no_split(folder, split, list(by_split))
  patterns = by_split[split] if isinstance(by_split[split], list) else [by_split[split]]
  return sorted(
    path for pattern in patterns for path in glob.glob(str(folder / pattern), recursive=True)
  )


def _split_of(name: str) -> str:
  """Returns the split that a file's name contains; '' if it contains none."""
  words = re.split(r'[^a-z]+', name.lower())
  for split, names in _SPLIT_WORDS.items():
    if any(word in names for word in words):
      return split
  return ''


def _is_hidden(path: Path, folder: Path) -> bool:
  return any(part.startswith('.') for part in path.relative_to(folder).parts)


def _no_split(folder: Path, split: str, names: list[str]) -> UserError:
  """Returns the error about a split that a folder does not have."""
  present = ', '.join(sorted(names)) or 'nothing'
  return UserError(
    f'data.path: {folder}: no files of the split {split!r}, got {present}; set data.splits to '
    'read another split in its place, as in splits.validation=test'
  )
