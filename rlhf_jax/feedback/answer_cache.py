"""A file of answers that were paid for, so that no question is asked twice.

Each answer is a line of JSON, on disk before the next question is sent. What it is
kept under (`key`) is a hash of all that it depends on.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_jax.errors import UserError

# What a row must hold; `calls` and `tokens` count against a judge's bounds.
_FIELDS = ('probability', 'text', 'calls', 'tokens')


@dataclasses.dataclass(frozen=True)
class AnswerCache:
  """Answers by key, and the open file to which new ones are appended."""

  path: Path
  file: BinaryIO
  rows: dict[str, dict[str, Any]]

  def keep(self, row: dict[str, Any]) -> None:
    """Writes an answer to the disk; `row['key']` says under what it is kept."""
    self.file.write(json.dumps(row).encode() + b'\n')
    os.fsync(self.file.fileno())
    self.rows[row['key']] = row

  def total(self, field: str) -> int:
    """Adds up a field of all answers."""
    return sum(row[field] for row in self.rows.values())


@contextlib.contextmanager
def open_cache(path: Path) -> Iterator[AnswerCache]:
  """Opens a cache, made if missing, for this process alone.

  Yields:
    The cache. A last line that a kill cut off is removed from the file.

  Raises:
    UserError: the file cannot be written, another process has opened it, or a line
      of it is no answer.
  """
  with _open_locked(path) as file:
    file.seek(0)
    *lines, torn = file.read().split(b'\n')
    file.truncate(file.tell() - len(torn))
    rows = {}
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
        rows[row['key']] = {name: row[name] for name in _FIELDS}
      except (ValueError, LookupError, TypeError):
        expected = "expected a judge's answer; remove the line to ask again"
        raise UserError(f'{path}:{number}: {expected}') from None
    yield AnswerCache(path, file, rows)


def _open_locked(path: Path) -> BinaryIO:
  """Opens a file for appending, unbuffered, and locks it until it is closed."""
  file = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+b', buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if file is not None:
      file.close()
    reason = error.strerror
    if isinstance(error, BlockingIOError):
      reason = 'another process is asking with this cache'
    raise UserError(f'{path}: {reason}') from None
  return file
