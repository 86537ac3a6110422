from pathlib import Path
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_run_equals_the_run_left_alone(tmp_path):
  script = Path(__file__).parents[1] / 'scripts/kill_test.py'
  done = subprocess.run([sys.executable, script, f'--workdir={tmp_path}', '--kills=6', '--seed=1'],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert '\neverything is equal\n' in done.stdout and done.stdout.count(' killed in ') >= 4
