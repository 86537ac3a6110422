import os

import pytest

from rlhf_jax.runtime import event_file, metrics


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_a_full_disk_costs_the_events_and_nothing_else(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(event_file.time, 'time', lambda: 7)
  monkeypatch.setattr(event_file.socket, 'gethostname', lambda: 'host')
  (tmp_path / f'events.out.tfevents.0000000007.host.{os.getpid()}').symlink_to('/dev/full')
  with metrics.Writer(tmp_path) as writer:
    for step in range(50):  # more than any queue holds
      writer.metrics(step, {'loss': 1.0})
  assert caplog.text.count('No space left on device; the run goes on without events') == 1
  assert (tmp_path / 'metrics.jsonl').read_text().count('\n') == 50


def test_a_jump_of_the_clock_does_not_matter(tmp_path, monkeypatch):
  now = iter([1e9, 1e9, 1e9, 0, 2e9, 5])
  monkeypatch.setattr(event_file.time, 'time', lambda: next(now, 5))
  file = event_file.EventFile(tmp_path, purge_step=0)
  for step in range(3):
    file.write_scalars(step, {'loss': 1.0})
  file.close()
  [path] = tmp_path.iterdir()
  assert path.read_bytes().count(b'loss') == 3
