"""What a user sees of every kind of end, in processes of their own where signals are sent."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from rlhf_jax.commands import failures
from rlhf_jax.errors import UserError


def _raiser(error):
  def work():
    raise error

  return work


@pytest.mark.parametrize(
  'error,line',
  [
    (UserError('a:1: b\n\x1b[31mc'), 'a:1: b \\x1b[31mc'),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'a.json'), 'a.json: No space left on device'),
    (OSError(errno.EACCES, os.strerror(errno.EACCES), 'a', None, 'b'), 'a → b: Permission denied'),
    (MemoryError(), 'out of memory: use smaller batches'),
    (RuntimeError('RESOURCE_EXHAUSTED: 9 GB'), 'out of memory: use smaller batches'),
    (SystemExit(0), 'called sys.exit(0)'),
  ],
)
def test_one_line_and_exit_code_2(error, line, capsys):
  assert failures.run(_raiser(error)) == 2
  said = capsys.readouterr().err
  assert said.startswith('rlhf_jax: error: ') and said.count('\n') == 1 and line in said


def test_a_full_disk_without_a_file_names_the_workdir(tmp_path, capsys):
  def work():
    with open('/dev/full', 'w') as full:
      full.write('x')

  assert failures.run(work, tmp_path) == 2
  assert f'space left on device (the workdir is {tmp_path}); repeat' in capsys.readouterr().err


def test_a_bug_leaves_its_traceback_in_a_file(tmp_path, capsys):
  assert failures.run(_raiser(ZeroDivisionError('a\nb')), tmp_path) == failures.BUG
  said = capsys.readouterr().err
  [path] = tmp_path.iterdir()
  assert said == (
    f'rlhf_jax: this is a bug: ZeroDivisionError: a b; please report it with {path}\n'
  )
  assert 'Traceback' in path.read_text() and 'test_failures.py' in path.read_text()


def test_signals_end_the_work_and_a_second_one_ends_the_process():
  code = (
    'import os, signal, sys, time; from rlhf_jax.commands import failures\n'
    'def work():\n'
    '  try:\n'
    '    os.kill(os.getpid(), int(sys.argv[1])); time.sleep(60)\n'
    '  finally:\n'
    '    if len(sys.argv) > 2: os.kill(os.getpid(), int(sys.argv[2])); time.sleep(60)\n'
    'sys.exit(failures.run(work))'
  )

  def send(*signals):
    return subprocess.run(
      [sys.executable, '-c', code, *(str(int(number)) for number in signals)],
      capture_output=True,
      text=True,
      timeout=30,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )

  for number in (signal.SIGTERM, signal.SIGINT):
    done = send(number)
    assert done.returncode == 128 + number
    assert f'interrupted by {number.name}: what was finished is kept' in done.stderr
  assert send(signal.SIGTERM, signal.SIGTERM).returncode == -signal.SIGTERM


def test_a_signal_that_the_garbage_collector_loses_is_sent_again():
  code = (
    'import gc, os, signal, sys, time; from rlhf_jax.commands import failures\n'
    'def kill(phase, info):\n'
    '  gc.callbacks.remove(kill); os.kill(os.getpid(), signal.SIGINT)\n'
    'def work():\n'
    '  gc.callbacks.append(kill); gc.collect(); time.sleep(60)\n'
    'sys.exit(failures.run(work))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    timeout=30,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert done.returncode == 128 + signal.SIGINT
  assert 'interrupted by SIGINT' in done.stderr and 'Traceback' not in done.stderr
