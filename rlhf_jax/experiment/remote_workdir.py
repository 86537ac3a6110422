"""Keeps a workdir behind a URL: what the run writes lies in local folders and is uploaded.

The upload happens after each checkpoint, after each stage and at the end. Its last
object, `manifest.json`, lists all files with their digests; only what it lists is
there. A file that has changed is written beside the version that the last manifest
lists, never over it. So whatever moment a process is killed at, the URL holds a
complete state, and a start with this URL, on any machine, begins from that state:
the local folders are made equal to it.

Each process of a run has a local folder of its own, so that hosts need no disk that
they share. All files are those of the first process, but for the checkpoints, of which
every process writes and uploads its part. Where the others read what the first one has
written, the workdir is uploaded, and each process fetches what it lacks (`meet`).

  URL/manifest.json     path → {size, digest, at}
  URL/PATH              a file, where `at` is PATH
  URL/.changed/PATH     the same file where the one at PATH was still listed when it changed
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Any
import uuid

import jax

from rlhf_jax import file_lock, files, fingerprints, storage
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts, loop

MANIFEST = 'manifest.json'
CHANGED = '.changed/'
LOCK = 'staging.lock'  # in the local folder, which one run uses at a time
_LOCAL_ONLY = ('run.lock', LOCK)  # these say something about a process of this machine
# Folders of a stage that only the first process reads.
_OF_THE_FIRST = ('export', 'adapter')
_ATTEMPTS = 4  # to write or read an object before the run gives up


class RemoteWorkdir:
  """A workdir behind a URL, and the local folder in which this process keeps it.

  Attributes:
    url: where it is kept.
    folder: the local folder.
  """

  def __init__(self, url: str, process: int = 0):
    """Opens the store; nothing is copied yet.

    Args:
      url: where the workdir is kept.
      process: the number of this process, each of which has a folder.

    Raises:
      UserError: the scheme is unknown or cannot be served.
    """
    self.url = url
    self.folder = staging_folder(url, process)
    self._process = process
    self._store, self._root = storage.open_store(url, '--workdir')
    self._manifest: dict[str, Any] | None = None  # as this run has read or written it
    self._digests: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

  @property
  def has_state(self) -> bool:
    """Whether the URL held a state when it was last read or written."""
    return self._manifest is not None

  @property
  def version(self) -> str:
    """What tells this state from all others; '' where there is none."""
    return self._manifest['version'] if self._manifest else ''

  def restore(self) -> None:
    """Makes the local folder equal to what the manifest lists.

    Raises:
      UserError: the store cannot be read, or an object is not what the manifest says.
    """
    self._manifest = self._read_manifest()
    # A local folder may be ahead of its URL; what was never uploaded does not count.
    self._remove_unknown()
    self.fetch_missing()

  def fetch_missing(self) -> None:
    """Fetches what the last manifest lists and the local folder lacks.

    Raises:
      UserError: the store cannot be read, or an object is not what the manifest says.
    """
    for path, entry in self._entries().items():
      if not self._is_wanted(path) or self._describe(path) == _content(entry):
        continue
      with self._errors(), files.replacing(self.folder / path) as temporary:
        _retry(self._store.get_file, self._object(entry['at']), str(temporary))
        if fingerprints.of_file(temporary) != _content(entry):
          raise UserError(f'{self.url}: {entry["at"]} differs from {MANIFEST}; restore it')

  def publish(self) -> None:
    """Uploads what has changed since the last manifest, then the new manifest.

    All processes of a run make this call. Each uploads its part; when all have
    done so, the first one writes the manifest.

    Raises:
      UserError: the store cannot be written, or another run has written it meanwhile.
    """
    old = self._entries()
    self._check_owner()
    local = {path: self._describe(path) for path in self._list_local()}
    # A file may have been removed while the folder was listed.
    mine = json.dumps({path: content for path, content in local.items() if content})
    parts = [json.loads(text) for text in hosts.gather_texts(mine)]
    owners = divide(parts)
    new = {path: _place(path, parts[owner][path], old) for path, owner in owners.items()}
    for path, entry in new.items():
      # What has not changed is not uploaded again, such as earlier checkpoints.
      if owners[path] == self._process and entry != old.get(path):
        with self._errors():
          self._upload(path, entry['at'])
    if self._manifest is not None and new == old:
      return
    # The version tells this run's manifest from that of another one. Agreeing on
    # it is a barrier too: all processes have uploaded their parts.
    version = hosts.gather_texts(uuid.uuid4().hex)[0]
    self._check_owner()  # again, as uploading may take long
    self._write_manifest({'version': version, 'files': new})
    self._remove_unlisted(old, new)

  def share(self) -> None:
    """Uploads what is new, and gives every process what the others have written.

    Raises:
      UserError: as `publish` and `fetch_missing`.
    """
    self.publish()
    if self._process:  # what the first process has removed is gone
      self._remove_unknown()
    self.fetch_missing()

  def _entries(self) -> dict[str, Any]:
    """Returns what the manifest lists, as this run has last read or written it."""
    return {} if self._manifest is None else self._manifest['files']

  def _is_wanted(self, path: str) -> bool:
    """Tells whether this process needs a file."""
    return not self._process or not set(path.split('/')[1:-1]) & set(_OF_THE_FIRST)

  def _remove_unknown(self) -> None:
    """Removes local files that the manifest does not list."""
    entries = self._entries()
    for path in self._list_local():
      if path not in entries:
        (self.folder / path).unlink()
        _remove_empty((self.folder / path).parent)

  def _upload(self, path: str, at: str) -> None:
    target = self._object(at)
    source = str(self.folder / path)
    try:
      _retry(self._store.put_file, source, target)
    except FileNotFoundError:  # a store with folders, which object stores do not have
      self._store.makedirs(os.path.dirname(target), exist_ok=True)
      _retry(self._store.put_file, source, target)

  def _write_manifest(self, manifest: dict[str, Any]) -> None:
    self._manifest = manifest
    if self._process:
      return
    text = json.dumps({**manifest, fingerprints.KEY: fingerprints.of_value(manifest)}, indent=1)
    with self._errors():
      _retry(self._store.pipe_file, self._object(MANIFEST), text.encode())

  def _read_manifest(self) -> dict[str, Any] | None:
    """Reads the manifest; None where there is none."""
    path = self._object(MANIFEST)
    with self._errors():
      # fsspec remembers listings, and another machine may have written since.
      self._store.invalidate_cache()
      if not self._store.exists(path):
        return None
      manifest = json.loads(_retry(self._store.cat_file, path))
    digest = manifest.pop(fingerprints.KEY, None)
    if digest != fingerprints.of_value(manifest):
      raise UserError(f'{self.url}/{MANIFEST}: damaged; restore it, or give another --workdir')
    return manifest

  def _check_owner(self) -> None:
    """Refuses to write over the state of another run; the first process asks."""
    if self._process:
      return
    stored = self._read_manifest()
    if (stored['version'] if stored else '') != self.version:
      raise UserError(
        f'--workdir={self.url}: another run has written there meanwhile; stop one of them, and '
        'repeat the command'
      )

  def _remove_unlisted(self, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Removes the objects that the last manifest listed and the new one does not."""
    if self._process:
      return
    # Only after the new manifest: until then the old one is what a restart reads.
    listed = {entry['at'] for entry in new.values()}
    for entry in old.values():
      if entry['at'] not in listed:
        with contextlib.suppress(FileNotFoundError), self._errors():
          self._store.rm_file(self._object(entry['at']))

  def _object(self, at: str) -> str:
    return f'{self._root}/{at}'

  def _list_local(self) -> list[str]:
    """Lists the files of the local folder, without those that are being written."""
    paths = []
    # pathlib's glob would descend into folders that orbax is just renaming.
    for parent, folders, names in os.walk(self.folder):
      folders[:] = [name for name in folders if not _is_partial(name)]
      for name in names:
        path = os.path.relpath(os.path.join(parent, name), self.folder)
        if path not in _LOCAL_ONLY and not _is_partial(name):
          paths.append(path)
    return sorted(paths)

  def _describe(self, path: str) -> dict[str, Any] | None:
    """Returns size and digest of a local file, read again only if it has changed."""
    full = self.folder / path
    try:
      status = full.stat()
      identity = (status.st_size, status.st_mtime_ns)
      if self._digests.get(path, (None,))[0] != identity:
        self._digests[path] = (identity, fingerprints.of_file(full))
    except OSError:
      return None
    return self._digests[path][1]

  def _errors(self) -> contextlib.AbstractContextManager[None]:
    return storage.user_errors(f'--workdir={self.url}')


def staging_folder(url: str, process: int = 0) -> Path:
  """Returns the local folder of a workdir behind a URL, for a process of a run."""
  name = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
  # Of each process on this machine its own, as on machines that share no disk.
  return storage.cache_folder('workdirs') / (f'{name}-{process}' if process else name)


def divide(parts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
  """Divides the files of a workdir among the processes that upload them.

  Args:
    parts: of each process its files, by path.

  Returns:
    Path → process, for all files of the workdir: those of the first process, and what
    the others add to the checkpoints that it has too. Whatever else the others have is
    an old copy.
  """
  owners = dict.fromkeys(parts[0], 0)
  steps = {_checkpoint_of(path) for path in owners} - {''}
  for number, part in enumerate(parts):
    for path in part:
      if _checkpoint_of(path) in steps:
        owners.setdefault(path, number)
  return dict(sorted(owners.items()))


def _checkpoint_of(path: str) -> str:
  """Returns the folder STAGE/checkpoints/STEP that a file is in; '' = none."""
  folders = path.split('/')[:-1]
  if 'checkpoints' not in folders[:-1]:
    return ''
  return '/'.join(folders[: folders.index('checkpoints') + 2])


def _place(path: str, content: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the manifest's entry of a file, by what the last manifest lists."""
  before = old.get(path)
  if before is None:
    return {**content, 'at': path}
  if _content(before) == content:
    return before
  # Never over the version that the last manifest lists.
  return {**content, 'at': CHANGED + path if before['at'] == path else path}


def fetch(url: str, where: str) -> Path:
  """Copies a workdir from its URL to this machine, and returns the local folder.

  Raises:
    UserError: no run is kept there, it cannot be read, or a run of this machine uses it.
  """
  remote = RemoteWorkdir(url)
  with file_lock.lock_folder(remote.folder, LOCK):
    remote.restore()
  if not remote.has_state:
    raise UserError(f'{where}={url}: expected the workdir of a run, but it has no {MANIFEST}')
  return remote.folder


@contextlib.contextmanager
def opened(url: str) -> Iterator[RemoteWorkdir]:
  """Restores a workdir from its URL, and uploads it at the end of the block.

  All processes of a run enter it, each with a local folder of its own.

  Raises:
    UserError: it cannot be read or written, or another run uses it.
  """
  _check_seen_by_all(url)
  remote = RemoteWorkdir(url, jax.process_index())
  with file_lock.lock_folder(remote.folder, LOCK):
    remote.restore()
    if len(set(hosts.gather_texts(remote.version))) > 1:
      raise UserError(f'--workdir={url}: another run is writing there; stop it, and try again')
    hosts.say(f'{url}: kept in {remote.folder} and uploaded after each checkpoint')
    try:
      yield remote
    except loop.Interrupted as signal:
      # The loop has saved a checkpoint; all processes have, where they agreed on it.
      if signal.agreed or jax.process_count() == 1:
        remote.publish()
      raise
    remote.publish()
    hosts.barrier('workdir uploaded')  # who ends before the first process would end it too


def meet(remote: RemoteWorkdir | None, place: str) -> None:
  """Waits for all processes, which can then read what the first one wrote before.

  Args:
    remote: the workdir, where it is behind a URL.
    place: a name for this barrier, the same on every process.
  """
  hosts.barrier(place)
  if remote is not None and jax.process_count() > 1:
    remote.share()


def _check_seen_by_all(url: str) -> None:
  """Refuses what lies in the memory of a process where there are several."""
  if url.startswith('memory://') and jax.process_count() > 1:
    raise UserError(
      f'--workdir={url}: memory:// is the memory of one process, and this run has '
      f'{jax.process_count()}; expected a store that all of them reach'
    )


def _remove_empty(folder: Path) -> None:
  """Removes a folder and those around it, as far as they are empty."""
  # An empty one would count as a checkpoint.
  with contextlib.suppress(OSError):
    for one in (folder, *folder.parents):
      one.rmdir()


def _content(entry: dict[str, Any]) -> dict[str, Any]:
  return {'size': entry['size'], 'digest': entry['digest']}


def _is_partial(name: str) -> bool:
  """Tells whether a file or folder is still being written, by its name."""
  return name.startswith(files.PART) or name.endswith(files.PART) or 'checkpoint-tmp' in name


def _retry(action: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function, again after a pause where the connection failed."""
  for attempt in range(1, _ATTEMPTS):
    try:
      return action(*arguments)
    except (OSError, TimeoutError) as error:
      if isinstance(error, (FileNotFoundError, PermissionError)):
        raise
      time.sleep(2**attempt / 4)  # half a second, one, two
  return action(*arguments)
