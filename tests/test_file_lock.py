import json
import os
import subprocess
import sys

import pytest

from rlhf_jax import file_lock
from rlhf_jax.errors import UserError


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
  code = (
    'import sys; from pathlib import Path; from rlhf_jax import file_lock\n'
    'lock = file_lock.lock_folder(Path(sys.argv[1]), "run.lock")\n'
    'print("locked", flush=True); sys.stdin.read()'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, tmp_path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  ) as other:
    assert other.stdout.readline() == b'locked\n'
    with pytest.raises(UserError, match=f'using this folder: process {other.pid} on '):
      file_lock.lock_folder(tmp_path, 'run.lock')
    other.kill()
  with file_lock.lock_folder(tmp_path, 'run.lock'):
    assert json.loads((tmp_path / 'run.lock').read_text())['process'] == os.getpid()
