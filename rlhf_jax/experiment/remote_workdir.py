"""Keeps a workdir behind a URL: what the run writes lies in a local folder and is uploaded.

The upload happens after each checkpoint, after each stage and at the end. Its last
object, `manifest.json`, lists all files with their digests; only what it lists is
there. A file that has changed is written beside the version that the last manifest
lists, never over it. So whatever moment a process is killed at, the URL holds a
complete state, and a start with this URL, on any machine, begins from that state:
the local folder is made equal to it.

  URL/manifest.json     path → {size, digest, at}
  URL/PATH              a file, where `at` is PATH
  URL/.changed/PATH     the same file where the one at PATH was still listed when it changed
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
import time
from typing import Any
import uuid

from rlhf_jax import file_lock, files, fingerprints, storage
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts

MANIFEST = 'manifest.json'
CHANGED = '.changed/'
LOCK = 'staging.lock'  # in the local folder, which one run uses at a time
_LOCAL_ONLY = ('run.lock', LOCK)  # these say something about a process of this machine
_ATTEMPTS = 4  # to write or read an object before the run gives up


class RemoteWorkdir:
  """A workdir behind a URL, and the local folder in which the run keeps it.

  Attributes:
    url: where it is kept.
    folder: the local folder.
  """

  def __init__(self, url: str):
    """Opens the store; nothing is copied yet.

    Raises:
      UserError: the scheme is unknown or cannot be served.
    """
    self.url = url
    self.folder = staging_folder(url)
    self._store, self._root = storage.open_store(url, '--workdir')
    self._manifest: dict[str, Any] | None = None  # as this run has read or written it
    self._digests: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

  @property
  def has_state(self) -> bool:
    """Whether the URL held a state when it was last read or written."""
    return self._manifest is not None

  def restore(self) -> None:
    """Makes the local folder equal to what the manifest lists.

    Raises:
      UserError: the store cannot be read, or an object is not what the manifest says.
    """
    self._manifest = self._read_manifest()
    entries = {} if self._manifest is None else self._manifest['files']
    # A local folder may be ahead of its URL; what was never uploaded does not count.
    for path in self._list_local():
      if path not in entries:
        (self.folder / path).unlink()
    for path, entry in entries.items():
      if self._describe(path) == _content(entry):
        continue
      with self._errors(), files.replacing(self.folder / path) as temporary:
        _retry(self._store.get_file, self._object(entry['at']), str(temporary))
        if fingerprints.of_file(temporary) != _content(entry):
          raise UserError(f'{self.url}: {entry["at"]} differs from {MANIFEST}; restore it')

  def publish(self) -> None:
    """Uploads what has changed since the last manifest, then the new manifest.

    Raises:
      UserError: the store cannot be written, or another run has written it meanwhile.
    """
    old = {} if self._manifest is None else self._manifest['files']
    # path → entry of the manifest that is written at the end
    new: dict[str, Any] = {}
    self._check_owner()
    for path in self._list_local():
      content = self._describe(path)
      if content is None:
        continue  # removed while the folder was listed
      # What has not changed is not uploaded again, such as earlier checkpoints.
      before = old.get(path)
      if before is not None and _content(before) == content:
        new[path] = before
        continue
      # Never over the version that the last manifest lists.
      at = CHANGED + path if before is not None and before['at'] == path else path
      with self._errors():
        self._upload(path, at)
      new[path] = {**content, 'at': at}
    if self._manifest is not None and new == old:
      return
    self._check_owner()  # again, as uploading may take long
    self._write_manifest(new)
    self._remove_unlisted(old, new)

  def _upload(self, path: str, at: str) -> None:
    target = self._object(at)
    source = str(self.folder / path)
    try:
      _retry(self._store.put_file, source, target)
    except FileNotFoundError:  # a store with folders, which object stores do not have
      self._store.makedirs(os.path.dirname(target), exist_ok=True)
      _retry(self._store.put_file, source, target)

  def _write_manifest(self, entries: dict[str, Any]) -> None:
    # The version tells this run's manifest from that of another one.
    manifest = {'version': uuid.uuid4().hex, 'files': entries}
    text = json.dumps({**manifest, fingerprints.KEY: fingerprints.of_value(manifest)}, indent=1)
    with self._errors():
      _retry(self._store.pipe_file, self._object(MANIFEST), text.encode())
    self._manifest = manifest

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
    """Refuses to write over the state of another run."""
    stored = self._read_manifest()
    versions = [manifest and manifest['version'] for manifest in (stored, self._manifest)]
    if versions[0] != versions[1]:
      raise UserError(
        f'--workdir={self.url}: another run has written there meanwhile; stop one of them, and '
        'repeat the command'
      )

  def _remove_unlisted(self, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Removes the objects that the last manifest listed and the new one does not."""
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


def staging_folder(url: str) -> Path:
  """Returns the local folder of a workdir behind a URL, the same for all processes of a machine."""
  name = hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]
  return storage.cache_folder('workdirs') / name


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

  Only the first process copies; the others wait for it, and use the same folder.

  Raises:
    UserError: it cannot be read or written, another run uses it, or the processes do not
      share the local folder.
  """
  remote = RemoteWorkdir(url)
  lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
  if hosts.is_first_process():
    lock = file_lock.lock_folder(remote.folder, LOCK)
  with lock:
    if hosts.is_first_process():
      remote.restore()
    hosts.barrier('workdir restored')
    _check_shared(remote.folder, url)
    hosts.say(f'{url}: kept in {remote.folder} and uploaded after each checkpoint')
    try:
      yield remote
    except SystemExit:  # a signal, after which the loop has saved a checkpoint
      publish(remote)
      raise
    publish(remote)
    hosts.barrier('workdir uploaded')  # who ends before the first process would end it too


def publish(remote: RemoteWorkdir) -> None:
  """Uploads the workdir, in the first process."""
  if hosts.is_first_process():
    remote.publish()


def _check_shared(folder: Path, url: str) -> None:
  """Refuses processes that do not see the first one's folder."""
  sees = int((folder / LOCK).is_file())
  if not all(hosts.gather_from_processes(sees)):
    raise UserError(
      f'--workdir={url}: the processes of this run are on machines that share no disk; expected '
      f'a folder that all of them see: set XDG_CACHE_HOME to one (this one uses {folder})'
    )


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
