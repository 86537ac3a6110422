"""Opens files that may be compressed, and writes files atomically.

Every file that a later run reads is written by this module, so that it is
complete or does not exist. Only this module knows of compression: files are
written as their names say, and read as their contents say.
"""

from collections.abc import Iterator
import contextlib
import errno
import gzip
import io
import os
from pathlib import Path
import re
import shutil
from typing import Any, IO

GZIP = b'\x1f\x8b'  # the first bytes of a gzip file
_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
# Texts compress 3 to 30 times, and deflate can do 1,032 times. A file of which so many bytes come
# out of a share so small is made to fill the memory, or was compressed by mistake.
_WINDOW = 2**23  # bytes
_PIECE = 2**13  # bytes of the compressed file that are read at once
_MOST_EXPANDED = 250  # times
PART = '.part'  # in the name of a file or folder that is still being written


def open_text(path: str | os.PathLike, mode: str = 'rt') -> IO[str]:
  """Opens a text file in UTF-8; one whose name ends in `.gz` is compressed.

  Args:
    path: the file.
    mode: 'rt' or 'wt'. A character that UTF-8 cannot encode, such as a lone surrogate, is
      written as an escape sequence.
  """
  _refuse_url(path)
  errors = 'strict'
  if 'w' in mode:
    errors = 'backslashreplace'  # what a model generates must not make a run fail
  if _is_compressed(path) and 'w' in mode:
    return gzip.open(path, mode, encoding='utf-8', errors=errors)  # type: ignore[return-value]
  if _is_compressed(path):
    return io.TextIOWrapper(open_gzip(path), encoding='utf-8', errors=errors)
  return open(path, mode, encoding='utf-8', errors=errors)


def open_bytes(path: str | os.PathLike) -> IO[bytes]:
  """Opens a file for reading bytes; gzip is decompressed, whatever the name of the file is."""
  with open(path, 'rb') as file:
    is_compressed = file.read(2) == GZIP
  return open_gzip(path) if is_compressed else open(path, 'rb')


def open_gzip(path: str | os.PathLike) -> io.BufferedReader:
  """Opens a file that is compressed by gzip; reading raises OSError where it expands too much."""
  return io.BufferedReader(_Gzip(path), 2**16)


class _Gzip(io.RawIOBase):
  """Decompresses a file, as long as no part of it expands beyond all measure."""

  def __init__(self, path: str | os.PathLike):
    super().__init__()
    self._path = os.fspath(path)
    self._compressed = open(path, 'rb')
    self._content = gzip.GzipFile(fileobj=_Pieces(self._compressed), mode='rb')
    self._window_begins = 0  # in the compressed file
    self._window_size = 0  # bytes decompressed since then

  def readable(self) -> bool:
    """Returns True."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills a buffer; returns the number of bytes, 0 at the end."""
    # As much as there is: what stands before damage is read before the damage is met.
    data = self._content.read1(len(buffer))
    count = len(data)
    buffer[:count] = data
    self._window_size += count
    if self._window_size >= _WINDOW:
      place = self._compressed.tell()
      if self._window_size > _MOST_EXPANDED * (place - self._window_begins):
        reason = f'it expands more than {_MOST_EXPANDED} times; decompress it if you mean it'
        raise OSError(errno.EFBIG, reason, self._path)
      self._window_begins, self._window_size = place, 0
    return count

  def close(self) -> None:
    """Closes both files."""
    self._content.close()
    self._compressed.close()
    super().close()


class _Pieces:
  """Reads a file in small pieces, so that its position says what was decompressed."""

  def __init__(self, file: IO[bytes]):
    self._file = file
    self.seek = file.seek

  def read(self, size: int) -> bytes:
    """Reads the next bytes, perhaps fewer than `size`."""
    return self._file.read(min(size, _PIECE))


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
  """Provides a temporary path; the file written there replaces `path` at the end of the block.

  The replacement is atomic, and happens only if the block raises no exception.
  The folder is created if it is missing. The temporary name has the same suffix,
  so that a file whose name ends in `.gz` is compressed.

  Args:
    path: the file to write or replace.

  Yields:
    The temporary path.
  """
  _refuse_url(path)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(PART + '-' + path.name)  # on the same file system
  try:
    yield temporary
    os.replace(temporary, path)  # atomic
  except OSError as error:
    _name_file(error, path)
    raise
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a small text file in UTF-8, atomically."""
  with replacing(path) as temporary, open_text(temporary, 'wt') as file:
    file.write(text)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
  """Provides an empty temporary folder, which replaces `path` at the end of the block.

  It does so only if the block raises no exception. Unlike a file, a folder cannot
  be replaced atomically: if the process is killed between the removal of the old
  folder and the renaming of the new one, no folder has this name.

  Args:
    path: the folder to write or replace.

  Yields:
    The temporary folder.
  """
  _refuse_url(path)
  path = Path(path)
  temporary = path.with_name(path.name + PART)
  shutil.rmtree(temporary, ignore_errors=True)  # it may remain from a process that was killed
  temporary.mkdir(parents=True)
  try:
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
  except OSError as error:
    _name_file(error, path)
    raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _name_file(error: OSError, path: Path) -> None:
  """Names the file that was written, as what a full disk raises names none."""
  if error.errno is not None and error.filename is None:
    error.filename = os.fspath(path)


def _refuse_url(path: str | os.PathLike) -> None:
  """Refuses what would become a local folder 'gs:'; pathlib makes 'gs:/…' of 'gs://…'."""
  if _URL.match(os.fspath(path)):
    raise OSError(errno.EINVAL, 'expected a local path, not a URL', os.fspath(path))


def _is_compressed(path: str | os.PathLike) -> bool:
  return str(path).endswith('.gz')
