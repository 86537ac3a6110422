"""Notices data that changed after a stage began with them.

A stage reads its data anew whenever a run is resumed. With other data the batches
after the checkpoint would not be those that the saved position in them means, and
nobody could say what the model was trained on.
"""

from collections.abc import Iterator, Sequence
import os
from pathlib import Path
from typing import Any

from rlhf_jax import fingerprints, storage
from rlhf_jax.data import row_files, sources
from rlhf_jax.data.sources import HUB, TFDS
from rlhf_jax.errors import UserError

RECORD = 'data.json'  # in a stage's folder: the fingerprints of the data that it began with
_SPLITS = ('train', 'validation', 'test')


def fingerprint_data(section: Any, workdir: Path) -> dict[str, Any]:
  """Returns the fingerprints of the data files that a section of a config names.

  Args:
    section: the section, resolved.
    workdir: files in it are made by the run itself and have fingerprints of their own.

  Returns:
    Path or URL → {size, digest}; what cannot be read is missing, as its stage will say so.
  """
  prints: dict[str, Any] = {}
  for name, path in sorted(_list_files(section.to_dict(), workdir)):
    try:
      prints[name] = fingerprints.of_file(path)
    except OSError:
      continue
  return prints


def check_unchanged(path: Path, prints: dict[str, Any], accept: bool) -> None:
  """Compares the data of a stage that goes on with those that it began with.

  Args:
    path: where `fingerprints.write_json` left those of the beginning; if there is no such file,
      nothing is known of them.
    prints: those of now.
    accept: whether a change is accepted.

  Raises:
    UserError: a file has changed, is new or is gone.
  """
  if accept or not path.is_file():
    return
  before = fingerprints.read_json(path)
  changed = sorted(name for name in {*before, *prints} if before.get(name) != prints.get(name))
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    how = 'has changed' if changed[0] in before and changed[0] in prints else 'is new'
    how = how if changed[0] in prints else 'is gone'
    raise UserError(
      f'{changed[0]} {how}{more} since {path.parent.name!r} began with it; restore it, give '
      'another --workdir, or accept the change with --accept_changed_data'
    )


def _list_files(section: dict[str, Any], workdir: Path) -> set[tuple[str, str]]:
  """Lists the files that the data of a section stand for, wherever in it they are named.

  Returns:
    (name, local path) of each; they differ where a file was copied from a URL.
  """
  found: set[tuple[str, str]] = set()
  for value in section.values():
    if not isinstance(value, dict):
      continue
    if 'source' in value and 'path' in value:
      found.update(_files_of_data(value, workdir))
    else:
      found |= _list_files(value, workdir)
  return found


def _files_of_data(data: dict[str, Any], workdir: Path) -> Iterator[tuple[str, str]]:
  """Yields the local files of one DataOptions."""
  paths: Sequence[Any] = data['path']
  inside = os.path.abspath(workdir) + os.sep
  for path in map(str, paths):
    if path.startswith((HUB, TFDS)):
      continue  # a data set with a version of its own
    for split in _SPLITS:
      try:
        local = sources.local_path(path.replace('{split}', split))
        names = row_files.find_files(local, data['splits'].get(split, split))
      except (UserError, OSError):
        continue  # its reader will say what is wrong
      for name in names:
        if storage.as_local_path(path) is None:
          # The copy lies elsewhere on every machine.
          yield f'{path}: {os.path.relpath(name, local)}', name
        elif not os.path.abspath(name).startswith(inside):
          yield name, name
