"""A cache file of a server's answers, so that no question is asked, or paid for, twice.

Each answer is one line of JSON, which is flushed to the disk as soon as the
answer arrives. Its `key` is a hash of everything that the answer depends on.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_jax import file_lock, fingerprints
from rlhf_jax.errors import UserError

# The fields of each row beside `key`; `calls` and `tokens` count towards a judge's limits.
_FIELDS = ('probability', 'text', 'calls', 'tokens')


@dataclasses.dataclass(frozen=True)
class AnswerCache:
  """Answers by key, and the open file to which new ones are appended."""

  path: Path
  file: BinaryIO
  rows: dict[str, dict[str, Any]]

  def keep(self, row: dict[str, Any]) -> None:
    """Appends an answer to the file and flushes it to the disk; `row['key']` is its key."""
    sealed = {**row, fingerprints.KEY: fingerprints.of_value(row)}
    size = os.fstat(self.file.fileno()).st_size
    try:
      line = json.dumps(sealed).encode() + b'\n'
      if self.file.write(line) < len(line):  # the disk took a part of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      os.fsync(self.file.fileno())
    except OSError as error:
      with contextlib.suppress(OSError):
        self.file.truncate(size)  # no half row stays
      raise UserError(f'{self.path}: cannot write: {error.strerror}') from None
    self.rows[row['key']] = row

  def total(self, field: str) -> int:
    """Returns the sum of a numeric field over all answers."""
    return sum(row[field] for row in self.rows.values())


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[AnswerCache]:
  """Opens a cache file for this process alone, and creates it if it is missing.

  Args:
    path: the .jsonl file.

  Yields:
    The cache. An incomplete last line, left by a process that was killed, is
    removed from the file.

  Raises:
    UserError: the file cannot be written, another process has it open, or one
      of its lines is not an answer.
  """
  with file_lock.open_locked(path, 'another process is using this cache') as file:
    file.seek(0)
    *lines, incomplete = file.read().split(b'\n')
    file.truncate(file.tell() - len(incomplete))
    rows = {}
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
        _check_row(row)
        rows[row['key']] = {name: row[name] for name in _FIELDS}
      except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        expected = "expected a judge's answer; remove the line to ask again"
        raise UserError(f'{path}:{number}: {expected}') from None
    yield AnswerCache(path, file, rows)


def _check_row(row: dict[str, Any]) -> None:
  """Raises ValueError for a row that is no answer, or is not what was written."""
  probability, text = row['probability'], row['text']
  counts = (row['calls'], row['tokens'])
  fits = isinstance(row['key'], str) and isinstance(text, str)
  fits = fits and all(type(count) is int and count >= 0 for count in counts)
  if probability is not None:
    fits = fits and type(probability) in (int, float) and 0 <= probability <= 1
  written = {name: value for name, value in row.items() if name != fingerprints.KEY}
  # Earlier versions wrote none.
  is_whole = row.get(fingerprints.KEY, '') in ('', fingerprints.of_value(written))
  if not (fits and is_whole):
    raise ValueError('not an answer')
