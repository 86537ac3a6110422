"""Several rounds of collection within an experiment; simulated people answer over HTTP."""

import json
import os
import subprocess
import sys

import pytest
from server_process import ROOT


@pytest.mark.slow
def test_two_rounds_over_http(tmp_path):
  workdir = tmp_path / 'run'
  command = ['scripts/simulate_people.py', '--config=experiments/people.py:tiny']
  done = subprocess.run(
    [sys.executable, *command, f'--workdir={workdir}'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''},  # one device
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert '64 rankings were sent over HTTP' in done.stdout  # 16 of each split, twice
  seen = []
  for number in (1, 2):
    for split in ('train', 'validation'):
      path = workdir / f'rankings{number}' / f'people.{split}.jsonl'
      rows = [json.loads(line) for line in path.read_text().splitlines()]
      assert len(rows) == 16 and all(row['stands'] for row in rows)
      seen += [row['judgement'] for row in rows]
  assert len(set(seen)) == 64
  # the second reward model has learnt from the rankings of both rounds
  second = json.loads((workdir / 'config.json').read_text())['reward2']['data']['path']
  assert [path.split('/')[1] for path in second] == ['rankings1', 'rankings2']
  assert (workdir / 'ppo2' / 'finished.json').exists()
