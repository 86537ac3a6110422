"""Fingerprints of values and files: what a run writes and reads back later is verified.

A small JSON file carries its own fingerprint, in the key `fingerprint`. Other
files of a folder are listed with theirs in its `fingerprints.json`; who reads one
of them calls `check_file`. Nothing else in the package computes fingerprints of
values or files (those of arrays on devices are in runtime/checkpoint.py).
"""

from collections.abc import Iterable, Mapping
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rlhf_jax import files
from rlhf_jax.errors import UserError

LIST = 'fingerprints.json'  # in a folder: its files by name → {size, digest}
KEY = 'fingerprint'  # of a JSON file that carries its own

# A file above this size is sampled: blocks at even distances stand for the whole.
WHOLE = 256 * 2**20  # bytes
BLOCK = 2**20  # bytes
BLOCKS = 64


def of_value(value: Any) -> str:
  """Returns the SHA-256 of a JSON value, in hexadecimal digits."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def of_file(path: str | os.PathLike) -> dict[str, Any]:
  """Returns size and SHA-256 of a file, as a JSON object.

  Of a file above WHOLE bytes only BLOCKS blocks are read, the first and the last among them.

  Raises:
    OSError: it cannot be read.
  """
  digest = hashlib.sha256()
  with open(path, 'rb') as file:
    size = os.fstat(file.fileno()).st_size
    if size <= WHOLE:
      while block := file.read(BLOCK):
        digest.update(block)
    else:
      for number in range(BLOCKS):
        file.seek((size - BLOCK) * number // (BLOCKS - 1))
        digest.update(file.read(BLOCK))
  return {'size': size, 'digest': digest.hexdigest()}


# JSON files that carry their own fingerprint.


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
  """Writes a JSON object with its fingerprint, whole or not at all."""
  sealed = {**values, KEY: of_value(_as_json(values))}
  files.write_text(path, json.dumps(sealed, indent=2, default=list) + '\n')


def read_json(path: str | os.PathLike, remedy: str = 'restore it, or begin anew') -> dict[str, Any]:
  """Reads what `write_json` has written, without the fingerprint.

  Args:
    path: the file.
    remedy: what the user can do where it is damaged.

  Raises:
    UserError: it cannot be read, or is not what was written.
  """
  try:
    values = json.loads(Path(path).read_text(encoding='utf-8'))
    problem = _find_problem(values)
  except OSError as error:
    raise UserError(f'{path}: cannot read: {error.strerror or error}; {remedy}') from None
  except (ValueError, RecursionError) as error:
    problem = f'not JSON ({error})'
  if problem:
    raise UserError(f'{path}: damaged: {problem}; {remedy}')
  values.pop(KEY)
  return values


def _find_problem(values: Any) -> str:
  """Says what is wrong with the content of a JSON file; '' where it is what was written."""
  if not isinstance(values, dict):
    return f'expected an object, got {type(values).__name__}'
  if KEY not in values:
    return f'the key {KEY!r} is missing (an earlier version wrote none)'
  content = {key: value for key, value in values.items() if key != KEY}
  if values[KEY] != of_value(content):
    return 'its content differs from its fingerprint'
  return ''


def _as_json(value: Any) -> Any:
  """Returns a value as it would be read back from JSON."""
  return json.loads(json.dumps(value, default=list))


# Files whose fingerprints stand in a list beside them.


def record_files(folder: str | os.PathLike, names: Iterable[str] = ()) -> None:
  """Lists files of a folder with their fingerprints; earlier entries of other files stay.

  Args:
    folder: where the files are.
    names: which; without any, all files that the folder holds.
  """
  folder = Path(folder)
  path = folder / LIST
  entries = read_json(path) if path.is_file() else {}
  chosen = list(names) or sorted(found.name for found in folder.iterdir() if found.is_file())
  for name in chosen:
    if name != LIST:
      entries[name] = of_file(folder / name)
  write_json(path, entries)


def is_recorded(path: str | os.PathLike) -> bool:
  """Tells whether a file is listed with its fingerprint."""
  beside = Path(path).parent / LIST
  return beside.is_file() and Path(path).name in read_json(beside)


def check_file(path: str | os.PathLike) -> None:
  """Verifies a file that is listed with its fingerprint; others are left to their readers.

  Raises:
    UserError: the file or the list is damaged, or the file is gone.
  """
  path = Path(path)
  beside = path.parent / LIST  # '.' has no name that could be replaced
  if path.name == LIST or not beside.is_file():
    return
  expected = read_json(beside, 'restore it, or remove it to read the folder unverified')
  if path.name not in expected:
    return
  try:
    actual: Any = of_file(path)
  except OSError as error:
    raise UserError(f'{path}: cannot read: {error.strerror}; {LIST} lists it') from None
  if actual != expected[path.name]:
    raise UserError(
      f'{path}: changed or damaged: it differs from its fingerprint in {LIST}; restore it, or '
      'remove that list if the change is meant'
    )


def check_folder(folder: str | os.PathLike) -> None:
  """Verifies all files that a folder lists with their fingerprints.

  Raises:
    UserError: as `check_file`.
  """
  beside = Path(folder) / LIST
  if beside.is_file():
    for name in read_json(beside):
      check_file(beside.with_name(name))
