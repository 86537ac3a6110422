"""A workdir behind a URL: whatever moment the process ends at, the URL holds a whole state."""

import contextlib
import functools
import threading
import uuid

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.experiment import remote_workdir
from rlhf_jax.experiment.remote_workdir import LOCK, MANIFEST, RemoteWorkdir


@pytest.fixture
def url(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return f'memory://bucket/{uuid.uuid4().hex}'


def write(folder, **contents):
  """Writes files, whose names have __ for a slash; None removes one."""
  for name, text in contents.items():
    path = folder / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if text is not None else path.unlink()


def read(folder):
  return {
    str(path.relative_to(folder)): path.read_text()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
    and path.name != LOCK
    and '.part-' not in path.name
    and 'tmp' not in path.parts[-2]
  }


def restored(url, tmp_path, monkeypatch):
  """What a machine with an empty disk gets."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / uuid.uuid4().hex))
  remote = RemoteWorkdir(url)
  remote.restore()
  return read(remote.folder) if remote.folder.exists() else {}


FIRST = {'config.json': '1', 'sft/metrics.jsonl': 'a\n', 'sft/checkpoints/5/params': 'p5'}
SECOND = {
  'config.json': '1',
  'sft/metrics.jsonl': 'a\nb\n',
  'sft/checkpoints/10/params': 'p10',
}
THIRD = {**SECOND, 'sft/metrics.jsonl': 'a\nb\nc\n', 'results.json': 'r'}


class Killed(BaseException):
  """Stands for the end of the process at this place."""


def publish_states(url, limit=None):
  """Publishes three states, one after the other; `limit` operations of the store come to pass."""
  remote = RemoteWorkdir(url)
  count = 0
  for name in ('put_file', 'pipe_file', 'rm_file'):
    original = getattr(remote._store, name)

    def counted(*arguments, original=original, **options):
      nonlocal count
      if count == limit:
        raise Killed
      count += 1
      return original(*arguments, **options)

    setattr(remote._store, name, counted)
  try:
    with contextlib.suppress(Killed):
      remote.restore()
      for state in (FIRST, SECOND, THIRD):
        for path in read(remote.folder) if remote.folder.exists() else {}:
          if path not in state:
            (remote.folder / path).unlink()
        for path, text in state.items():
          write(remote.folder, **{path.replace('/', '__'): text})
        write(remote.folder, **{'.part-x': 'half', 'sft__9.orbax-checkpoint-tmp__y': 'half'})
        remote.publish()
  finally:
    for name in ('put_file', 'pipe_file', 'rm_file'):
      delattr(remote._store, name)
  return count


def test_every_moment_of_death_leaves_a_whole_state(url, tmp_path, monkeypatch):
  total = publish_states(url)
  assert restored(url, tmp_path, monkeypatch) == THIRD and total >= 9
  seen = []
  for limit in range(total):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / f'machine {limit}'))
    one = f'{url}-{limit}'
    publish_states(one, limit)
    found = restored(one, tmp_path, monkeypatch)
    assert found in ({}, FIRST, SECOND, THIRD)
    seen.append([{}, FIRST, SECOND, THIRD].index(found))
  assert seen == sorted(seen) and set(seen) == {0, 1, 2, 3}


def test_what_is_there_already_is_not_copied_again(url, monkeypatch):
  publish_states(url)
  remote = RemoteWorkdir(url)
  write(remote.folder, **{'results.json': 'torn', 'stray': 'x'})
  fetched = []
  original = remote._store.get_file
  monkeypatch.setattr(
    remote._store, 'get_file', lambda *a: (fetched.append(a[0]), original(*a)), raising=False
  )
  remote.restore()
  assert read(remote.folder) == THIRD
  assert [name.rsplit('/', 1)[1] for name in fetched] == ['results.json']


def test_another_run_and_damage_are_named(url, tmp_path, monkeypatch):
  publish_states(url)
  first, second = RemoteWorkdir(url), RemoteWorkdir(url)
  first.restore()
  second.restore()
  write(first.folder, new='1')
  first.publish()
  write(second.folder, new='2')
  with pytest.raises(UserError, match='another run has written there meanwhile'):
    second.publish()

  root = first._root
  store = first._store
  store.pipe_file(f'{root}/results.json', b'?')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'empty'))
  with pytest.raises(UserError, match='results.json differs from manifest.json'):
    RemoteWorkdir(url).restore()
  text = store.cat_file(f'{root}/{MANIFEST}').replace(b'results', b'rosulta')
  store.pipe_file(f'{root}/{MANIFEST}', text)
  with pytest.raises(UserError, match=f'{MANIFEST}: damaged'):
    RemoteWorkdir(url).restore()


def test_one_run_of_a_machine_at_a_time(url):
  with remote_workdir.opened(url) as remote:
    write(remote.folder, a='1')
    with pytest.raises(UserError, match='another run is using this folder'):
      remote_workdir.fetch(url, '--from')
  assert read(remote_workdir.fetch(url, '--from')) == {'a': '1'}
  with pytest.raises(UserError, match='--from=.*no manifest.json'):
    remote_workdir.fetch(url + '-none', '--from')


@pytest.mark.parametrize(
  'bad,message',
  [
    ('nosuch://bucket/run', 'nosuch:// is an unknown scheme; expected gs://, s3://'),
    ('gs://bucket/run', r'gs:// cannot be served: .*gcsfs'),
  ],
)
def test_schemes_that_cannot_be_served(bad, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f'^--workdir: {bad}: {message}'):
    RemoteWorkdir(bad)
  assert not list(tmp_path.iterdir())


class Processes:
  """Two processes as threads, which exchange texts as those of a run do."""

  def __init__(self, url, monkeypatch, limit=None):
    self.remotes = [RemoteWorkdir(url, number) for number in range(2)]
    self.barrier = threading.Barrier(2)
    self.texts = ['', '']
    self.limit, self.count = limit, 0  # operations of the store before the death of all
    monkeypatch.setattr(remote_workdir.hosts, 'gather_texts', self.gather)

  def gather(self, text):
    self.texts[int(threading.current_thread().name)] = text
    self.barrier.wait()
    texts = list(self.texts)
    self.barrier.wait()
    return texts

  def both(self, action):
    """Calls a method of both processes at the same time."""
    threads = [
      threading.Thread(target=self._call, args=(remote, action), name=str(number))
      for number, remote in enumerate(self.remotes)
    ]
    if self.barrier.broken:  # both are dead
      return
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  def _call(self, remote, action):
    with contextlib.suppress(Killed, threading.BrokenBarrierError):
      getattr(remote, action)()

  def watch(self, monkeypatch):
    """Counts what is written to the store, and kills both processes at the limit."""
    store = self.remotes[0]._store  # fsspec has one for all
    for name in ('put_file', 'pipe_file', 'rm_file'):
      monkeypatch.setattr(
        store, name, functools.partial(self._count, getattr(store, name)), raising=False
      )

  def _count(self, original, *arguments, **options):
    if self.count == self.limit:
      self.barrier.abort()
      raise Killed
    self.count += 1
    return original(*arguments, **options)


OF_THE_FIRST = {'config.json': 'c', 'sft/checkpoints/5/meta': 'm', 'sft/checkpoints/5/a.0': '0'}
OF_THE_SECOND = {
  'config.json': 'old',
  'gone.json': 'g',
  'sft/checkpoints/4/a.1': 'old',
  'sft/checkpoints/5/meta': 'another',
  'sft/checkpoints/5/a.1': '1',
}
TOGETHER = {**OF_THE_FIRST, 'sft/checkpoints/5/a.1': '1'}
LATER = {**TOGETHER, 'config.json': 'c2', 'sft/checkpoints/5/a.1': '1', 'sft/export/model': 'x'}


def run_both(processes):
  processes.both('restore')
  first, second = processes.remotes
  for remote, state in ((first, OF_THE_FIRST), (second, OF_THE_SECOND)):
    for path, text in state.items():
      write(remote.folder, **{path.replace('/', '__'): text})
  processes.both('share')
  write(first.folder, **{'config.json': 'c2', 'sft__export__model': 'x'})
  processes.both('share')


def test_processes_without_a_shared_disk_upload_their_parts(url, tmp_path, monkeypatch):
  processes = Processes(url, monkeypatch)
  run_both(processes)
  first, second = (read(remote.folder) for remote in processes.remotes)
  assert first == LATER
  assert second == {path: text for path, text in LATER.items() if 'export' not in path}
  assert not (processes.remotes[1].folder / 'sft/checkpoints/4').exists()
  assert restored(url, tmp_path, monkeypatch) == LATER


def test_the_death_of_both_leaves_a_whole_state(url, tmp_path, monkeypatch):
  seen = set()
  for limit in range(10):
    with monkeypatch.context() as patch:
      patch.setenv('XDG_CACHE_HOME', str(tmp_path / f'machines {limit}'))
      processes = Processes(f'{url}-{limit}', patch, limit)
      processes.watch(patch)
      run_both(processes)
    found = restored(f'{url}-{limit}', tmp_path, monkeypatch)
    states = [{}, TOGETHER, LATER]
    assert found in states
    seen.add(states.index(found))
  assert seen == {0, 1, 2}
