"""The metric files: their lines, what a resume drops, what is said when they cannot be written."""

import importlib.util
import json

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
