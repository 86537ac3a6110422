"""Opening and writing files: gzip by the name, and nothing half written.

Every file that a later run reads is written through here. Only this module and
`data.records` know that a path ending in `.gz` is compressed.
"""

import contextlib
import gzip
import os
from pathlib import Path
import shutil
from typing import IO, Iterator

PART = '.part'  # ends the name of a file or folder that is still being written


def open_text(path: str | os.PathLike, mode: str = 'rt') -> IO[str]:
  """Opens a text file in UTF-8; one whose name ends in `.gz` is (de)compressed.

  Args:
    path: the file.
    mode: 'rt' or 'wt'. A character that UTF-8 cannot hold, such as half of a
      surrogate pair, is written as its escape.
  """
  opener = gzip.open if str(path).endswith('.gz') else open
  errors = 'backslashreplace' if 'w' in mode else 'strict'
  return opener(path, mode, encoding='utf-8', errors=errors)


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
  """Opens a file for reading bytes; one whose name ends in `.gz` is decompressed."""
  opener = gzip.open if str(path).endswith('.gz') else open
  return opener(path, 'rb')


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
  """Gives a path to write a file to, which takes the place of `path` when all went well.

  The file appears whole or not at all; what was there before stays until then. The folder is
  made where it is missing. The temporary name keeps the suffix, so that `.gz` still compresses.

  Yields:
    The temporary path.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(PART + '-' + path.name)
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a small text file whole or not at all, in UTF-8."""
  with replacing(path) as temporary, open_text(temporary, 'wt') as file:
    file.write(text)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
  """Gives an empty folder to fill, which takes the place of `path` when all went well.

  Yields:
    The temporary folder.
  """
  path = Path(path)
  temporary = path.with_name(path.name + PART)
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
