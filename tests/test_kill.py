import os
from pathlib import Path
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_run_equals_the_run_left_alone(tmp_path):
  script = Path(__file__).parents[1] / 'scripts/kill_test.py'
  done = subprocess.run(
    [sys.executable, script, f'--workdir={tmp_path}', '--kills=6', '--seed=1'],
    capture_output=True,
    text=True,  # one device: the tiny batches do not divide over the tests' eight
    env={key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert '\neverything is equal\n' in done.stdout and done.stdout.count(' killed in ') >= 4
