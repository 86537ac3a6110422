"""The metric files: their lines, what a resume drops, what is said when they cannot be written."""

import hashlib
import importlib.util
import json
import time

import pytest
from tensorboardX.proto import event_pb2

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import metrics


def _lines(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_lines(tmp_path):
  with metrics.Writer(tmp_path / 'new', tensorboard=False) as writer:
    writer.metrics(1, {'loss': 0.5, 'accuracy': float('nan')})
    writer.samples(1, [{'prompt': 'a\nb', 'response': 'é'}, {'prompt': 'c', 'response': ''}])
    # on disk before it closes
    assert _lines(tmp_path / 'new/metrics.jsonl') == [{'step': 1, 'loss': 0.5, 'accuracy': None}]
  assert _lines(tmp_path / 'new/samples.jsonl') == [
    {'step': 1, 'prompt': 'a\nb', 'response': 'é'},
    {'step': 1, 'prompt': 'c', 'response': ''},
  ]


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text(
    '{"step": 10, "loss": 3}\n{"step": 10, "eval/loss": 2}\n{"step": 20, "loss": 1}\n{"step": 3'
  )
  (tmp_path / 'samples.jsonl').write_text(
    '{"step": 10, "response": "a"}\n{"step": 11, "response": "b"}\n'
  )
  with metrics.Writer(tmp_path, tensorboard=False, resume_step=10) as writer:
    writer.metrics(20, {'loss': 1.5})
  assert _lines(tmp_path / 'metrics.jsonl') == [
    {'step': 10, 'loss': 3},
    {'step': 10, 'eval/loss': 2},
    {'step': 20, 'loss': 1.5},
  ]
  assert _lines(tmp_path / 'samples.jsonl') == [{'step': 10, 'response': 'a'}]
  metrics.Writer(tmp_path, tensorboard=False).close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_tensorboard_holds_the_same_values(tmp_path):
  with metrics.Writer(tmp_path) as writer:
    writer.metrics(7, {'loss': 0.25, 'norm/gradient': 2.0, 'bad': float('inf')})
  [path] = tmp_path.glob('events.out.tfevents.*')
  raw, found = path.read_bytes(), {}
  while raw:  # a record: length (8 bytes), checksum (4), event, checksum (4)
    size = int.from_bytes(raw[:8], 'little')
    event = event_pb2.Event.FromString(raw[12 : 12 + size])
    found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    raw = raw[16 + size :]
  assert found == {(7, 'loss'): 0.25, (7, 'norm/gradient'): 2.0}


@pytest.mark.skipif(importlib.util.find_spec('wandb') is not None, reason='wandb is installed')
def test_wandb_asked_for_and_missing(tmp_path):
  with pytest.raises(
    UserError, match='wandb_project=mine: wandb is not installed, run: pip install wandb'
  ):
    metrics.Writer(tmp_path, wandb_project='mine')


def test_directory_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write metrics'):
    metrics.Writer(tmp_path / 'file', tensorboard=False)


DESCRIBED = metrics.RunDescription('run/ppo', 'run', '/a/run/ppo', {'ppo': {'clip': 0.2}})
SAMPLES = [{'prompt': 'a\nb', 'response': 'x|y', 'score': 0.5}, {'prompt': 'c', 'response': ''}]


def test_tensorboard_shows_config_and_samples(tmp_path):
  with metrics.Writer(tmp_path, described=DESCRIBED) as writer:
    writer.samples(3, SAMPLES)
  [path] = tmp_path.glob('events.out.tfevents.*')
  raw, texts = path.read_bytes(), {}
  while raw:
    size = int.from_bytes(raw[:8], 'little')
    event = event_pb2.Event.FromString(raw[12 : 12 + size])
    for value in event.summary.value:
      assert value.metadata.plugin_data.plugin_name == 'text'
      texts[event.step, value.tag] = value.tensor.string_val[0].decode()
    raw = raw[16 + size :]
  assert '"clip": 0.2' in texts[0, 'config']
  assert texts[3, 'samples'].splitlines() == [
    '| prompt | response | score |',
    '| --- | --- | --- |',
    '| a<br>b | x\\|y | 0.5 |',
    '| c |  | None |',
  ]


def wandb_records(raw):
  """Yields the records of a file of W&B: LevelDB's log format behind a header of 7 bytes."""
  place, parts = 7, b''
  while place + 7 <= len(raw):
    room = 32768 - place % 32768
    if room < 7:
      place += room
      continue
    size, kind = int.from_bytes(raw[place + 4 : place + 6], 'little'), raw[place + 6]
    parts += raw[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # the whole of a record, or its end
      yield parts
      parts = b''


def test_wandb_holds_name_group_config_and_samples(tmp_path, monkeypatch):
  """Reads the files of an offline run."""
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  with metrics.Writer(
    tmp_path, tensorboard=False, wandb_project='mine', described=DESCRIBED
  ) as writer:
    for step in (1, 2):
      writer.metrics(step, {'loss': 0.5 / step})
      writer.samples(step, SAMPLES)
  from wandb.proto import wandb_internal_pb2

  runs, history = [], []
  [path] = tmp_path.glob('wandb/offline-run-*/*.wandb')
  for _ in range(100):  # W&B's own process writes the file, perhaps after `finish` has returned
    records = [*map(wandb_internal_pb2.Record.FromString, wandb_records(path.read_bytes()))]
    if records and records[-1].WhichOneof('record_type') == 'exit':
      break
    time.sleep(0.2)
  for record in records:
    if record.WhichOneof('record_type') == 'run':
      runs.append(record.run)
    if record.WhichOneof('record_type') == 'history':
      items = record.history.item
      values = {(item.key or '/'.join(item.nested_key)): item.value_json for item in items}
      history.append({key: json.loads(value) for key, value in values.items()})
  assert runs[0].run_id == hashlib.sha256(b'/a/run/ppo').hexdigest()[:16]  # also after a resume
  assert (runs[0].project, runs[0].display_name, runs[0].run_group) == ('mine', 'run/ppo', 'run')
  config = {item.key: item.value_json for item in runs[0].config.update}
  assert json.loads(config['ppo']) == {'clip': 0.2}
  assert {row['loss'] for row in history if 'loss' in row} == {0.5, 0.25}
  assert sum(any('samples' in key for key in row) for row in history) == 2
  [table, *_] = tmp_path.glob('wandb/offline-run-*/files/media/table/samples_*.json')
  assert json.loads(table.read_text())['data'] == [['a\nb', 'x|y', 0.5], ['c', '', None]]
