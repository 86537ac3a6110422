"""Disturbs one of the processes of a run, and looks how all of them end.

  python scripts/process_test.py --workdir=runs/processes --out=runs/processes.md

Runs of two and three processes on this machine's CPU, which talk over gloo. One of them is killed,
paused, asked to stop, started late, or has another config, other data, another version of the code,
another command line or workdir. No launcher watches them: each must end by itself within a minute,
and one must say why; or the run goes on and ends as the one that was left alone. After an end in
the middle the same command is started again and must end like that, bit for bit. The exit code is 1
if anything else happens.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
import dataclasses
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]

import kill_test  # noqa: E402

LIMIT = 60  # seconds after the disturbance in which every process must have ended
WHOLE = 400  # seconds for a run that is not disturbed, on a busy machine
STEPS = 100
SAVE_EVERY = 20
ABORTED = -signal.SIGABRT  # the end that jax gives a process whose peer is silent
LOST = 3
MISTAKE = 2

EXPERIMENT = """
import ml_collections

def get_config():
  c = ml_collections.ConfigDict()
  c.stages = ('pretrain',)
  c.model = dict(embed=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=16)
  c.tokenizer = dict(vocab_size=300, documents=50, data=dict(count=50))
  c.pretrain = dict(
    batch_size=12, max_length=64, eval_records=12, shown_responses=0,
    data=dict(source='jsonl', path=('{split}.jsonl',)),
    loop=dict(steps=STEPS, save_every=SAVE_EVERY, eval_every=0, log_every=5, tensorboard=False),
  )
  return c
"""


@dataclasses.dataclass
class Run:
  """A run of several processes.

  Attributes:
    base: holds experiment.py, and the folders of data and of other code.
    workdir: the run's.
    processes: by number.
  """

  base: Path
  workdir: Path
  processes: list[subprocess.Popen]

  def log(self, number: int) -> str:
    """Returns what a process has said so far."""
    return (self.base / f'{self.workdir.name}-{number}.txt').read_text(errors='replace')


@dataclasses.dataclass(frozen=True)
class Difference:
  """How one process is started unlike the others.

  Attributes:
    overrides: further arguments.
    folder: the current folder, whose data it reads.
    code: the folder of the package.
    workdir: another workdir, '' = the same.
    delay: seconds after the others.
  """

  overrides: tuple[str, ...] = ()
  folder: str = 'data'
  code: str = ''
  workdir: str = ''
  delay: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trial:
  """A disturbance.

  Attributes:
    name: what the table calls it.
    count: the number of processes.
    victim: the process that is disturbed.
    disturb: is called with the victim once it trains; None = nothing is done to it.
    difference: how the victim is started.
    codes: the exit codes with which the other processes may end.
    says: what one of the logs must have.
  """

  name: str
  count: int
  victim: int
  disturb: Callable[[subprocess.Popen], None] | None = None
  difference: Difference = Difference()
  codes: tuple[int, ...] = (MISTAKE,)
  says: str = ''


def main() -> int:
  """Runs all trials and prints a table; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', required=True, type=Path, help='a folder, emptied first')
  parser.add_argument('--only', default='', help='the trials whose name has this')
  parser.add_argument('--counts', default='2,3', help='numbers of processes')
  parser.add_argument('--out', type=Path, help='a file for the table')
  options = parser.parse_args()
  base = options.workdir.absolute()
  prepare(base)
  rows = []
  wholes: dict[int, Path] = {}
  for trial in list_trials(map(int, options.counts.split(','))):
    if options.only not in trial.name:
      continue
    if trial.count not in wholes:
      wholes[trial.count] = run_whole(base, base / f'whole-{trial.count}', trial.count).workdir
    rows.append(try_one(base, trial, wholes[trial.count]))
    kill_test.say(' | '.join(rows[-1]))
  heading = ('one process is', 'processes', 'the others', 'after', 'the same command again')
  lines = [heading, ('---',) * len(heading), *(row[:-1] for row in rows)]
  text = ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
  print(text)
  if options.out:
    options.out.write_text(text)
  return int(any(row[-1] for row in rows))


def prepare(base: Path) -> None:
  """Makes the experiment, two sets of data and a copy of the code with another comment."""
  shutil.rmtree(base, ignore_errors=True)
  experiment = EXPERIMENT.replace('STEPS', str(STEPS)).replace('SAVE_EVERY', str(SAVE_EVERY))
  for name, extra in (('data', ''), ('other_data', ' more')):
    folder = base / name
    folder.mkdir(parents=True)
    for split in ('train', 'validation'):
      rows = [f'{{"text": "Document {number} of many words.{extra}"}}\n' for number in range(60)]
      (folder / f'{split}.jsonl').write_text(''.join(rows))
  (base / 'experiment.py').write_text(experiment)
  shutil.copytree(
    ROOT / 'rlhf_jax', base / 'code/rlhf_jax', ignore=shutil.ignore_patterns('__pycache__')
  )
  with (base / 'code/rlhf_jax/errors.py').open('a') as file:
    file.write('# Another version.\n')
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(base / 'compiled'))


def list_trials(counts: Iterable[int]) -> list[Trial]:
  """Lists the disturbances; process 0 coordinates, so it is disturbed on its own."""
  trials = []
  silent = (LOST, ABORTED)
  for count in counts:
    last = count - 1
    for victim in (last, 0):
      which = f'process {victim}' if victim else 'process 0, which coordinates'
      trials += [
        Trial(f'killed ({which})', count, victim, kill, codes=silent, says='(ended|died)'),
        Trial(
          f'paused for 60 s ({which})', count, victim, pause, codes=silent, says='(ended|died)'
        ),
        Trial(f'paused for ever ({which})', count, victim, stop, codes=silent, says='(ended|died)'),
      ]
    differences = {
      'started 40 s late': Difference(delay=40.0),
      'with another learning rate': Difference(
        overrides=('--config.pretrain.optimizer.learning_rate=0.5',)
      ),
      'with other data': Difference(folder='other_data'),
      'with another version of the code': Difference(code='code'),
      'with --extend': Difference(overrides=('--extend',)),
      'with another workdir': Difference(workdir='elsewhere'),
    }
    says = {
      'with another learning rate': f'process {last} has another config',
      'with other data': f'process {last} has another data',
      'with another version of the code': f'process {last} has another code',
      'with --extend': f'process {last} has another command line',
      'with another workdir': f'process {last} has another workdir',
    }
    for name, difference in differences.items():
      codes = (0,) if difference.delay else (MISTAKE, LOST, ABORTED)
      trials.append(Trial(name, count, last, None, difference, codes, says.get(name, '')))
    trials.append(Trial('asked to stop (SIGTERM)', count, last, ask, codes=(143,), says='stopped'))
  return trials


def kill(process: subprocess.Popen) -> None:
  """Kills a process."""
  process.kill()


def pause(process: subprocess.Popen) -> None:
  """Stops a process for a minute."""
  process.send_signal(signal.SIGSTOP)
  time.sleep(60)
  process.send_signal(signal.SIGCONT)


def stop(process: subprocess.Popen) -> None:
  """Stops a process for ever."""
  process.send_signal(signal.SIGSTOP)


def ask(process: subprocess.Popen) -> None:
  """Asks a process to stop."""
  process.terminate()


def start(base: Path, workdir: Path, count: int, victim: int, difference: Difference) -> Run:
  """Starts the processes of a run; the victim unlike the others, and perhaps later."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  run = Run(base, workdir, [])
  by_number = {}
  for number in [*(n for n in range(count) if n != victim), victim]:  # the victim last
    how = difference if number == victim else Difference()
    time.sleep(how.delay)
    by_number[number] = start_process(run, number, count, address, how)
  run.processes = [by_number[number] for number in range(count)]
  return run


def start_process(
  run: Run, number: int, count: int, address: str, how: Difference
) -> subprocess.Popen:
  """Starts one process."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
    'JAX_COORDINATOR_BIND_ADDRESS': address,
    'RLHF_JAX_COORDINATOR': address,
    'RLHF_JAX_PROCESSES': str(count),
    'RLHF_JAX_PROCESS': str(number),
    'PYTHONPATH': str(run.base / how.code if how.code else ROOT),
  }
  workdir = run.base / how.workdir if how.workdir else run.workdir
  command = [sys.executable, '-m', 'rlhf_jax', f'--config={run.base}/experiment.py']
  with (run.base / f'{run.workdir.name}-{number}.txt').open('w') as log:
    return subprocess.Popen(
      [*command, f'--workdir={workdir}', *how.overrides],
      cwd=run.base / how.folder,
      env=env,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def run_whole(base: Path, workdir: Path, count: int) -> Run:
  """Makes a run that nothing disturbs; ends this script where it fails."""
  run = start(base, workdir, count, count - 1, Difference())
  wait(run, WHOLE)
  if any(process.returncode for process in run.processes):
    end(run)
    sys.exit(f'an undisturbed run failed: {run.log(0)[-2000:]}\n{run.log(count - 1)[-2000:]}')
  return run


def try_one(base: Path, trial: Trial, whole: Path) -> tuple[str, ...]:
  """Makes one trial; returns its row, whose last cell is what went wrong, '' = nothing."""
  workdir = base / 'disturbed'
  for folder in (workdir, base / 'elsewhere'):
    shutil.rmtree(folder, ignore_errors=True)
  run = start(base, workdir, trial.count, trial.victim, trial.difference)
  began = time.monotonic()
  problem = ''
  if trial.disturb:
    if not wait_for_training(run):
      problem = 'it did not train'
    else:
      trial.disturb(run.processes[trial.victim])
      began = time.monotonic()
  goes_on = 0 in trial.codes
  lasting = {trial.victim} if trial.disturb is stop else set()  # it cannot end by itself
  wait(run, WHOLE if goes_on or not trial.disturb else LIMIT, lasting)
  seconds = time.monotonic() - began
  codes = end(run)
  dead = {trial.victim} if trial.disturb in (kill, stop) else set()
  others = [code for number, code in enumerate(codes) if number not in dead]
  problem = problem or find_problem(run, trial, others)
  again = 'nothing was begun'
  if trial.disturb and not problem:
    run_whole(base, workdir, trial.count)
    problem = compare(whole, workdir)
    again = 'goes on, equal'
  elif goes_on and not problem:
    problem = compare(whole, workdir)
    again = 'not needed, equal'
  ended = ', '.join(describe_code(code) for code in dict.fromkeys(others))
  name = trial.name
  return (name, str(trial.count), ended, f'{seconds:.0f} s', again, problem)


def wait_for_training(run: Run) -> bool:
  """Waits until the run has saved once; returns False if it ended before."""
  saved = run.workdir / f'pretrain/checkpoints/{SAVE_EVERY}'
  deadline = time.monotonic() + WHOLE
  while not saved.exists():
    if time.monotonic() > deadline or any(p.poll() is not None for p in run.processes):
      return False
    time.sleep(0.02)
  return True


def wait(run: Run, seconds: float, lasting: Collection[int] = ()) -> None:
  """Waits until all processes have ended, but for those that cannot."""
  deadline = time.monotonic() + seconds
  waited_for = [p for number, p in enumerate(run.processes) if number not in lasting]
  while any(p.poll() is None for p in waited_for) and time.monotonic() < deadline:
    time.sleep(0.1)


def end(run: Run) -> list[int | None]:
  """Ends what is left of a run; returns the exit codes, None of a process that had not ended."""
  codes = [process.poll() for process in run.processes]
  for process in run.processes:
    if process.poll() is None:
      process.kill()
    process.wait()
  return codes


def find_problem(run: Run, trial: Trial, others: Sequence[int | None]) -> str:
  """Returns what is wrong with the end of a run, '' = nothing."""
  logs = [run.log(number) for number in range(trial.count)]
  if any(code not in trial.codes for code in others):
    return f'exit codes {list(others)}: {logs[0][-700:]} … {logs[-1][-700:]}'
  if any('Traceback' in log or 'this is a bug' in log for log in logs):
    return f'a traceback: {[log[-1500:] for log in logs]}'
  if trial.says and not any(re.search(trial.says, log) for log in logs):
    return f'nobody says {trial.says!r}: {[log[-700:] for log in logs]}'
  return ''


def compare(whole: Path, workdir: Path) -> str:
  """Compares a run with the undisturbed one; returns the first differences, '' = none.

  The metrics have loss and norms of every fifth step, the export all parameters.
  """
  for what, read, path in (
    ('metrics', kill_test.read_lines, 'pretrain/metrics.jsonl'),
    ('export', kill_test.read_files, 'pretrain/export'),
  ):
    verdict = kill_test.list_differences(read(whole / path), read(workdir / path))
    if verdict != 'equal':
      return f'{what}: {verdict}'
  return ''


def describe_code(code: int | None) -> str:
  """Returns how a process ended, in words."""
  words = {
    0: 'ended rightly',
    MISTAKE: 'one line, exit code 2',
    LOST: 'one line, exit code 3',
    143: 'saved, exit code 143',
    ABORTED: "jax's lines, exit code 134",
    None: 'did not end',
  }
  return words.get(code, f'exit code {code}')


if __name__ == '__main__':
  sys.exit(main())
