"""A part of the harness of malformed and damaged inputs; all of them: scripts/break.py."""

import os
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]


def test_malformed_inputs_end_in_one_clear_line():
  done = subprocess.run(
    [sys.executable, ROOT / 'scripts/break.py', '--part=40', '--workers=1', '--minutes=3'],
    capture_output=True,
    text=True,
    timeout=300,
    env={key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'},
  )
  assert done.returncode == 0, done.stdout + done.stderr[-2000:]
  assert '| all | ' in done.stdout
