"""The reader and the writer of JSON Lines, one JSON value a line, for all stages and commands.

A line ends at a line feed, with or without a carriage return before it, and
nowhere else: texts may hold other line separators. Files are UTF-8, with or
without a byte order mark. What the writer writes every reader can read: half a
surrogate pair, which UTF-8 cannot hold, and the line separators of Unicode, at
which some readers break lines, are written as JSON escapes.
"""

from collections.abc import Iterable, Iterator
import json
import os
import re
from typing import Any
import zlib

from rlhf_jax import files
from rlhf_jax.errors import UserError

# A line that is longer is no record: its parts would fill the memory several times.
_LONGEST_LINE = 2**26  # bytes
_DEEPEST = 100  # objects and lists within each other; what reads them recurses

# Half surrogate pairs; next line, line separator, paragraph separator.
_ESCAPED = re.compile('[\ud800-\udfff\x85\u2028\u2029]')

# How a file of another form begins → what it is.
_OTHER_FORMS = {
  b'PAR1': 'Parquet',
  b'ARROW1': 'Arrow',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd; decompress it first',
  b'\xfd7zXZ': 'compressed by xz; decompress it first',
  b'BZh': 'compressed by bzip2; decompress it first',
  b'PK\x03\x04': 'a ZIP archive; unpack it first',
  b'\xff\xfe': 'text in UTF-16; convert it to UTF-8',
  b'\xfe\xff': 'text in UTF-16; convert it to UTF-8',
}


def read_values(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
  """Reads the values of a file one by one; gzip is decompressed. Empty lines are skipped.

  Args:
    path: the file.

  Yields:
    ('FILE:LINE', the value of that line).

  Raises:
    UserError: the file cannot be read, or a line is not JSON. Names file and line.
  """
  for number, line in _read_lines(path):
    if line.strip():
      place = f'{path}:{number}'
      yield place, parse_json(line, place)


def parse_json(data: bytes, place: str) -> Any:
  """Parses JSON in UTF-8.

  Args:
    data: the JSON, with or without a byte order mark.
    place: what error messages call the place.

  Raises:
    UserError: it is not JSON.
  """
  try:
    value = json.loads(data.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{place}: not JSON: {error}') from None
  # Few values have so many brackets that it is worth to look how they stand.
  if data.count(b'{') + data.count(b'[') > _DEEPEST:
    check_depth(value, place)
  return value


def read_all_bytes(path: str | os.PathLike) -> bytes:
  """Reads a whole file; gzip is decompressed.

  Raises:
    UserError: it cannot be read.
  """
  try:
    with files.open_bytes(path) as file:
      return file.read()
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'{path}: cannot read: {error}') from None


def format_value(value: Any) -> str:
  """Returns a value as one line of JSON without its end; it can be encoded in UTF-8."""
  text = json.dumps(value, ensure_ascii=False)
  # Such characters stand within strings only.
  return _ESCAPED.sub(_escape, text)


def write_values(path: str | os.PathLike, values: Iterable[Any]) -> None:
  """Writes values, whole or not at all; `.gz` at the end of the name compresses.

  Args:
    path: the file; its folder is made where it is missing.
    values: what JSON can hold.
  """
  with files.replacing(path) as temporary, files.open_text(temporary, 'wt') as file:
    for value in values:
      file.write(format_value(value) + '\n')


def check_depth(value: Any, place: str) -> None:
  """Refuses a value of JSON or YAML whose objects and lists lie too deep within each other.

  Args:
    value: the value.
    place: what the error message calls its place.

  Raises:
    UserError: what reads the value would recurse too deeply.
  """
  level = [value] if isinstance(value, (dict, list)) else []
  for _ in range(_DEEPEST + 1):
    inner: list[Any] = []
    for item in level:
      inner.extend(item.values() if isinstance(item, dict) else item)
    level = [item for item in inner if isinstance(item, (dict, list))]
    if not level:
      return
  raise UserError(f'{place}: expected at most {_DEEPEST} objects and lists within each other')


def other_form(beginning: bytes) -> str | None:
  """Says what a file is, by its first bytes; None where it may be JSON."""
  for magic, form in _OTHER_FORMS.items():
    if beginning.startswith(magic):
      return form
  return None


def _read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
  """Reads the lines of a file, numbered from 1."""
  number = 0
  try:
    with files.open_bytes(path) as file:
      # Files of bytes break lines at line feeds only.
      while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
          raise UserError(f'{path}:{number}: expected lines of at most {_LONGEST_LINE >> 20} MiB')
        form = other_form(line) if number == 1 else None
        if form:
          raise UserError(f'{path}: expected JSON Lines, got a file that is {form}')
        yield number, line
  except (EOFError, zlib.error) as error:
    # A damaged archive shows only when its bytes are read, in the middle of the file.
    raise UserError(f'{path}:{number + 1}: cannot read: {error}') from None
  except OSError as error:
    place = f'{path}:{number + 1}' if number else path
    raise UserError(f'{place}: cannot read: {getattr(error, "strerror", None) or error}') from None


def _escape(match: re.Match[str]) -> str:
  return f'\\u{ord(match.group()):04x}'
