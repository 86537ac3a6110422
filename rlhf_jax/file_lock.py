"""Locks files, so that two processes do not write the same thing.

The kernel gives up a lock when its process ends, however that happens, so no lock is ever stale.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
from pathlib import Path
import socket
from typing import BinaryIO

from rlhf_jax.errors import UserError

# A file system without locks, such as some network ones.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def open_locked(path: Path, busy: str) -> BinaryIO:
  """Opens a file for appending, unbuffered, and locks it until it is closed.

  Args:
    path: the file; it and its folder are created if they are missing.
    busy: what is said where another process has the lock, such as 'another process uses it'.

  Raises:
    UserError: another process has the lock, or the file cannot be opened.
  """
  file = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+b', buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    assert file is not None  # only flock raises it
    file.close()
    raise UserError(f'{path}: {busy}') from None
  except OSError as error:
    if file is not None and error.errno in _NO_LOCKS:
      logging.warning('%s: this file system has no locks; start one process only', path)
      return file
    if file is not None:
      file.close()
    raise UserError(f'{path}: cannot write: {error.strerror}') from None
  return file


def lock_folder(folder: Path, name: str) -> BinaryIO:
  """Locks a folder for this process by a file in it that names host and process.

  Args:
    folder: created if it is missing.
    name: of the file.

  Returns:
    The open file; closing it gives up the lock.

  Raises:
    UserError: another process has the lock, or the folder cannot be written.
  """
  path = folder / name
  file = open_locked(path, f'another run is using this folder{_describe_owner(path)}')
  owner = {'host': socket.gethostname(), 'process': os.getpid()}
  with contextlib.suppress(OSError):  # a full disk: only the owner's name is missing
    file.truncate(0)
    file.write(json.dumps(owner).encode() + b'\n')
  return file


def _describe_owner(path: Path) -> str:
  """Returns who has a lock, as the end of a sentence; '' where its file does not say."""
  try:
    owner = json.loads(path.read_text(encoding='utf-8'))
    return f': process {owner["process"]} on {owner["host"]}; wait for its end'
  except (OSError, ValueError, LookupError, TypeError):
    return ''
