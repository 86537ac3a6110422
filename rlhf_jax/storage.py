"""Reads and writes what lies behind URLs, such as gs://, s3://, memory:// or http://, by fsspec.

Data and models are copied to this machine before they are read. The copies lie in
$XDG_CACHE_HOME/rlhf_jax/copies, and are made again where the original has changed.
"""

from collections.abc import Iterator, Sequence
import contextlib
import fnmatch
import glob
import hashlib
import json
import os
from pathlib import Path, PurePosixPath
import re
import tempfile
from typing import Any

from rlhf_jax import files
from rlhf_jax.errors import UserError

_URL = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*://')
_CURRENT = 'current.json'  # beside copies: file → what identifies the version that was copied


def is_url(name: Any) -> bool:
  """Tells whether a name is a URL; file:// is one too."""
  return _URL.match(str(name)) is not None


def as_local_path(name: str) -> str | None:
  """Returns the path of a file:// URL or of a name that is no URL; None for other URLs."""
  if not is_url(name):
    return name
  return name.removeprefix('file://') if name.startswith('file://') else None


def cache_folder(name: str) -> Path:
  """Returns a folder of this package's cache; it may not exist yet."""
  root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(root) / 'rlhf_jax' / name


def open_store(url: str, where: str) -> tuple[Any, str]:
  """Opens the file system of a URL.

  Args:
    url: scheme and path.
    where: what an error message begins with, such as '--workdir'.

  Returns:
    (an fsspec file system, the path in it without a slash at its end).

  Raises:
    UserError: the scheme is unknown, or the package that serves it is not installed.
  """
  import fsspec  # slow to import, and few need it

  scheme = url.partition('://')[0]
  try:
    store, path = fsspec.core.url_to_fs(url)
  except ImportError as error:
    raise UserError(f'{where}: {url}: {scheme}:// cannot be served: {error}') from None
  except ValueError:
    known = 'gs://, s3://, http://, memory:// or another scheme of fsspec'
    raise UserError(
      f'{where}: {url}: {scheme}:// is an unknown scheme; expected {known}, or a path'
    ) from None
  except Exception as error:  # of any kind: each service has errors of its own
    raise UserError(f'{where}: {url}: cannot be opened: {describe(error)}') from None
  return store, path.rstrip('/')


def local_copy(url: str, where: str, patterns: Sequence[str] = ('*',)) -> str:
  """Copies a file, a folder or the matches of a glob to this machine.

  Args:
    url: what to copy. Behind http://, only what ends in a slash is taken for a folder.
    where: what an error message begins with.
    patterns: globs of the files that are needed of a folder, by their path in it.

  Returns:
    The path of the copy; for a glob, a glob of the copies.

  Raises:
    UserError: it cannot be read, or there is no such file.
  """
  local = as_local_path(url)
  if local is not None:
    return local
  store, root = open_store(url, where)
  with user_errors(f'{where}: {url}'):
    names = _list_files(store, root, url.endswith('/'), patterns)
  if not names:
    raise UserError(f'{where}: {url}: no such file')
  folder = cache_folder('copies') / hashlib.sha256(url.encode()).hexdigest()[:16]
  record = folder / _CURRENT
  current = json.loads(record.read_text()) if record.is_file() else {}
  for name in names:
    target = folder / _relative(name)
    with user_errors(f'{where}: {url}'):
      # An ETag, a time or whatever else the store knows the version by.
      version = str(store.ukey(name))
      if current.get(name) != version or not target.is_file():
        download(store, name, target)
    current[name] = version
  files.write_text(record, json.dumps(current))
  copy = folder / _relative(root)
  return str(copy)


def _list_files(store: Any, root: str, ends_in_slash: bool, patterns: Sequence[str]) -> list[str]:
  """Lists the files that a path stands for; none where there is no such file."""
  if glob.has_magic(root) and not store.exists(root):
    return [name for name in sorted(store.glob(root)) if store.isfile(name)]
  # A server of web pages cannot say what is a folder: any page with links looks like one.
  is_web = 'http' in store.protocol
  if ends_in_slash if is_web else store.isdir(root):
    names = sorted(store.find(root + '/' if is_web else root))
    inside = len(root) + 1
    return [
      name for name in names if any(fnmatch.fnmatch(name[inside:], pattern) for pattern in patterns)
    ]
  return [root] if store.exists(root) else []


def _relative(name: str) -> PurePosixPath:
  """Returns the path of a copy in the cache; what could lead out of it is left out."""
  without_scheme = name.rpartition('://')[2]
  parts = [part for part in without_scheme.split('/') if part not in ('', '.', '..')]
  return PurePosixPath(*parts)


def download(store: Any, name: str, target: Path) -> None:
  """Copies one file of a store to a path, whole or not at all."""
  target.parent.mkdir(parents=True, exist_ok=True)
  # Several processes may copy at once: each to a file of its own.
  handle, temporary = tempfile.mkstemp(prefix=files.PART, dir=target.parent)
  os.close(handle)
  try:
    store.get_file(name, temporary)
    os.replace(temporary, target)
  finally:
    Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def user_errors(where: str) -> Iterator[None]:
  """Converts the errors of a store to a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except FileNotFoundError as error:
    raise UserError(f'{where}: no such file: {describe(error)}') from None
  except Exception as error:  # of any kind: each service has errors of its own
    raise UserError(f'{where}: {describe(error)}') from error


def describe(error: Exception) -> str:
  """Returns the kind and the first line of an error."""
  lines = str(error).splitlines() or ['']
  return f'{type(error).__name__}: {lines[0]:.200}'
