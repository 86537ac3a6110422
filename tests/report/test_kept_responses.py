import json
import logging

from made_runs import keep_final, keep_training
import pytest

from rlhf_jax.report import kept_responses


def read(workdir):
  rows = kept_responses.read(workdir)
  return [(row.stage, row.step, row.sample, row.response, row.score) for row in rows]


def test_every_evaluation_is_kept_once(tmp_path):
  for step in (0, 2, 4):
    keep_training(tmp_path, step, ['a', 'b'], [step, 1])
  keep_training(tmp_path, 0, ['x', 'y'], [1, 2], stage='dpo')
  keep_final(tmp_path, {'sft': (['s', 't'], [0, 1])})
  path = tmp_path / kept_responses.PLACE
  uninterrupted = path.read_bytes()
  assert uninterrupted.count(b'\n') == 10
  # Killed in the middle of a row after step 2, and resumed there.
  text = path.read_bytes().split(b'\n')
  path.write_bytes(b'\n'.join(text[:5]) + b'\n{"evaluation": "trai')
  keep_training(tmp_path, 4, ['a', 'b'], [4, 1])
  keep_training(tmp_path, 0, ['x', 'y'], [1, 2], stage='dpo')
  for _ in range(2):  # the table is made twice
    keep_final(tmp_path, {'sft': (['s', 't'], [0, 1])})
  assert path.read_bytes() == uninterrupted
  keep_training(tmp_path, 0, ['n', 'm'], [0, 0])  # the stage begins anew
  assert [row[:2] for row in read(tmp_path)] == [('dpo', 0)] * 2 + [('sft', None)] * 2 + [
    ('ppo', 0)
  ] * 2


@pytest.mark.parametrize('count', [3, kept_responses.MAX_ROWS + 1])
def test_too_many_rows_are_thinned_out_evenly(tmp_path, count):
  keep_training(tmp_path, 0, ['a'] * count, [0.0] * count)
  rows = kept_responses.read(tmp_path)
  every = 1 if count == 3 else 2
  assert [row.prompt_id for row in rows] == [f'p{number}' for number in range(0, count, every)]


def test_long_texts_are_cut(tmp_path):
  keep_training(tmp_path, 0, ['a' * 10**5], [0.0])
  (row,) = kept_responses.read(tmp_path)
  assert len(row.response) == kept_responses.MAX_TEXT and row.length == 2


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, caplog):
  (tmp_path / 'evaluation').write_text('not a folder')
  with caplog.at_level(logging.WARNING):
    keep_training(tmp_path, 0, ['a'], [0.0])
  assert 'evaluation/responses.jsonl: not kept' in caplog.text


def test_a_stage_that_is_taken_over_brings_its_rows(tmp_path):
  for stage in ('sft', 'ppo'):
    keep_training(tmp_path / 'old', 0, ['a'], [0.0], stage=stage)
  kept_responses.copy_stage(tmp_path / 'old', tmp_path / 'new', 'sft')
  assert [row.stage for row in kept_responses.read(tmp_path / 'new')] == ['sft']


def test_lines_are_json_with_plain_names(tmp_path):
  keep_training(tmp_path, 2, ['a\x1b[1m\ud800'], [float('nan')], [1.23456789])
  line = json.loads((tmp_path / kept_responses.PLACE).read_text())
  assert line == {
    'evaluation': 'training',
    'stage': 'ppo',
    'step': 2,
    'decoding': 'sampled',
    'prompt_id': 'p0',
    'sample': 0,
    'prompt': 'Question 0?',
    'response': 'a\x1b[1m\ud800',
    'score': None,
    'kl': 0.2,
    'length': 2,
    'ended': True,
    'verdict': {'utility': 1.234568},
  }
