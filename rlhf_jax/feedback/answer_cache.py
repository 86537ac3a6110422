"""A cache file of a server's answers, so that no question is asked, or paid for, twice.

Each answer is one line of JSON, which is flushed to the disk as soon as the answer arrives. Its
`key` is a hash of everything that the answer depends on.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_jax import file_lock
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
    self.file.write(json.dumps(row).encode() + b'\n')
    os.fsync(self.file.fileno())
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
    The cache. An incomplete last line, left by a process that was killed, is removed
    from the file.

  Raises:
    UserError: the file cannot be written, another process has it open, or one of its
      lines is not an answer.
  """
  with file_lock.open_locked(path, 'another process is using this cache') as file:
    file.seek(0)
    *lines, incomplete = file.read().split(b'\n')
    file.truncate(file.tell() - len(incomplete))
    rows = {}
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
        rows[row['key']] = {name: row[name] for name in _FIELDS}
      except (ValueError, LookupError, TypeError):
        expected = "expected a judge's answer; remove the line to ask again"
        raise UserError(f'{path}:{number}: {expected}') from None
    yield AnswerCache(path, file, rows)
