"""Kills a run repeatedly (kill -9) and compares it with an uninterrupted run, bit for bit.

  python scripts/kill_test.py --workdir=runs/kill_test --kills=12 --seed=0

Every stage that trains is killed at random steps, and while it saves a checkpoint; other stages and
the final evaluation are killed at random moments. With --places it is also killed where files are
written: while it claims the workdir, saves the tokenizer, exports a model, writes rankings, draws
the report; every second of these by SIGTERM twice. After each kill the same command is started
again. Further arguments, such as --config.ppo.microbatches=2, are passed to both runs. The exit
code is 1 if anything differs.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESPONSES = 'evaluation/responses.jsonl'  # the held-out responses of every evaluation
STEPS = 12  # of each stage that trains
SAVE_EVERY = 3  # steps


@dataclasses.dataclass(frozen=True)
class Moment:
  """A moment at which a run is killed.

  Attributes:
    phase: a stage, or 'evaluation'.
    step: the step to wait for; None = wait for the beginning of the phase.
    saving: whether to wait, after that step, for the beginning of the next save.
    delay: seconds between that event and the kill.
    file: a glob in the workdir; wait for such a file instead, '' = do not.
    signals: what is sent.
  """

  phase: str
  step: int | None
  saving: bool
  delay: float
  file: str = ''
  signals: tuple[int, ...] = (signal.SIGKILL,)

  def __str__(self) -> str:
    place = ''
    if self.file:
      how = ' and '.join(signal.Signals(number).name for number in self.signals)
      place = f' when {self.file} is written, by {how}'
    elif self.saving:
      place = f' from step {self.step} on, inside a save'
    elif self.step is not None:
      place = f' at step {self.step}'
    return f'{self.phase}{place}, {self.delay * 1000:.0f} ms later'


def main() -> int:
  """Runs the experiment without and with kills, and compares; returns the exit code."""
  options, overrides = parse()
  sys.path.insert(0, str(ROOT))
  from rlhf_jax.experiment import pipeline

  bare_overrides = [override.removeprefix('--config.') for override in overrides]
  config = pipeline.load_config(options.config, bare_overrides)
  trained = [name for name in config.stages if 'loop' in config[name]]
  command = [f'--config={options.config}', *overrides, *shorten(trained)]
  workdir = Path(options.workdir).absolute()
  uninterrupted = workdir / 'uninterrupted'
  killed = workdir / 'killed'
  for directory in (uninterrupted, killed):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
  # Restarts are fast if programs need not be compiled again.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(workdir / 'compiled'))

  say('the uninterrupted run …')
  began = time.monotonic()
  finish(start(command, uninterrupted), uninterrupted)
  say(f'done in {time.monotonic() - began:.0f} s; the run that is killed …')
  phases = list(config.stages)
  if len(config.evaluation.models):
    phases.append('evaluation')
  seconds = json.loads((uninterrupted / 'results.json').read_text())['seconds']
  rng = random.Random(options.seed)
  moments = plan_moments(phases, trained, seconds, options.kills, rng)
  if options.places:
    moments = add_places(moments, phases, trained)
  kill_at(moments, command, killed, trained)
  return compare(uninterrupted, killed, config.stages, trained)


def parse() -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns the options, and the overrides --config.section.key=value."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config',
    default=str(ROOT / 'experiments/quickstart.py:tiny'),
    help='the experiment',
  )
  parser.add_argument(
    '--workdir',
    required=True,
    help='the folder of the two runs, uninterrupted/ and killed/, which are emptied first',
  )
  parser.add_argument('--kills', type=int, default=12)
  parser.add_argument('--places', action='store_true', help='also kill where files are written')
  parser.add_argument('--seed', type=int, default=0, help='seed of the moments of the kills')
  options, overrides = parser.parse_known_args()
  for argument in overrides:
    if not argument.startswith('--config.'):
      parser.error(f'unknown argument {argument}')
  return options, overrides


def shorten(trained: Sequence[str]) -> list[str]:
  """Returns overrides with which stages train for a few steps and save often."""
  settings = {
    'steps': STEPS,
    'save_every': SAVE_EVERY,
    'eval_every': 2 * SAVE_EVERY,
    'log_every': 1,  # `last_step` reads the steps from the log
  }
  overrides = []
  for name in trained:
    for key, value in settings.items():
      overrides.append(f'--config.{name}.loop.{key}={value}')
  return overrides


def start(command: Sequence[str], directory: Path) -> subprocess.Popen:
  """Starts or resumes a run."""
  paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
  with (directory / 'log.txt').open('w') as log:
    return subprocess.Popen(
      [sys.executable, '-m', 'rlhf_jax', *command, f'--workdir={directory}'],
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
    )


def plan_moments(
  phases: Sequence[str],
  trained: Sequence[str],
  seconds: dict[str, float],
  kills: int,
  rng: random.Random,
) -> list[Moment]:
  """Draws the moments of the kills, in the order in which they will come.

  Args:
    phases: the stages, and perhaps 'evaluation', in the order in which they run.
    trained: the stages that train; if there are fewer kills than phases, these are killed.
    seconds: how long each phase took in the uninterrupted run.
    kills: the number of moments.
    rng: the source of randomness.
  """
  order = sorted(phases, key=lambda name: name not in trained)
  moments = []
  for name in phases:
    trains = name in trained
    count = len(range(order.index(name), kills, len(order)))
    steps: list[int | None] = [None] * count
    if trains:
      steps = [*sorted(rng.sample(range(1, STEPS), min(count, STEPS - 1)))]
    saving = rng.randrange(count) if count > 1 else None
    for number, step in enumerate(steps):
      in_save = trains and number == saving
      if in_save and step:  # there must be another save after this step
        step = min(step, STEPS - SAVE_EVERY)
      longest = seconds[name] / 2  # restarts are faster, as programs are compiled already
      if in_save:
        longest = 0.01
      elif step:
        longest = 0.1
      moments.append(Moment(name, step, in_save, rng.uniform(0, longest)))
  return moments


def add_places(
  moments: list[Moment], phases: Sequence[str], trained: Sequence[str]
) -> list[Moment]:
  """Adds moments at which files are written, each after the other moments of its phase."""
  first = [('run.lock', phases[0]), ('tokenizer/tokenizer.json', phases[0])]
  result = []
  for phase in phases:
    files = [name for name, begun in first if begun == phase]
    if phase == 'evaluation':
      files = ['.part-report.html']
    elif phase in trained:
      files += [f'{phase}/model.json', f'{phase}/export.part']
    else:
      # Of critiques these are rounds, such as .part-train-round-0.jsonl.
      files += [f'{phase}/.part-train*.jsonl', f'{phase}/.part-validation*.jsonl']
    places = []
    for name in files:
      both = (signal.SIGTERM, signal.SIGTERM)
      signals = both if len(result) + len(places) & 1 else (signal.SIGKILL,)
      places.append(Moment(phase, None, False, 0.0, name, signals))
    early = [place for place in places if 'export' not in place.file]
    late = [place for place in places if 'export' in place.file]
    result += [*early, *(moment for moment in moments if moment.phase == phase), *late]
  return result


def kill_at(
  moments: list[Moment],
  command: Sequence[str],
  directory: Path,
  trained: Sequence[str],
) -> None:
  """Runs the experiment to its end; kills and restarts it at each moment that is not missed."""
  waiting = list(moments)
  missed: list[Moment] = []
  kills = 0
  began = time.monotonic()
  while True:
    # A resumed run replaces metrics.jsonl by a new file when it starts to train.
    before = {name: inode(directory / name / 'metrics.jsonl') for name in trained}
    process = start(command, directory)
    reached = None
    while waiting and reached is None and process.poll() is None:
      moment = waiting.pop(0)
      if wait(process, directory, moment, before.get(moment.phase)):
        reached = moment
      else:
        missed.append(moment)
    if reached is None:  # no moment is left, so this process runs to its end
      missed += waiting
      finish(process, directory)
      break
    for signum in reached.signals:
      process.send_signal(signum)
      time.sleep(0.05)  # or the second one comes before the first is handled
    process.wait()
    kills += 1
    say(f'{kills:3} killed in {reached}: {describe_remains(directory / reached.phase)}')
  for moment in missed:
    say(f'    missed: {moment}: the phase was over before')
  say(f'{kills} kills in {time.monotonic() - began:.0f} s')


def wait(
  process: subprocess.Popen,
  directory: Path,
  moment: Moment,
  before: int | None,
) -> bool:
  """Waits for a moment.

  Args:
    process: the run.
    directory: its workdir.
    moment: the moment.
    before: the inode of the phase's metrics.jsonl before the process was started.

  Returns:
    True at the moment; False if it is missed or the process has ended.
  """
  while process.poll() is None:
    if (directory / moment.phase / 'finished.json').exists():
      return False
    if moment.file:
      if any(directory.glob(moment.file)):
        return process.poll() is None
      time.sleep(0.0005)
      continue
    if has_come(directory, moment, before):
      time.sleep(moment.delay)
      return process.poll() is None
    time.sleep(0.003)
  return False


def has_come(directory: Path, moment: Moment, before: int | None) -> bool:
  """Tells whether the event that a moment waits for has happened."""
  if moment.step is None:
    lines = (directory / 'log.txt').read_text().splitlines()
    return any(line.startswith('—') and moment.phase in line for line in lines)
  folder = directory / moment.phase
  metrics = folder / 'metrics.jsonl'
  if inode(metrics) in (None, before) or last_step(metrics) < moment.step:
    return False
  if not moment.saving:
    return True
  return any((folder / 'checkpoints').glob('*tmp*'))  # orbax's name of an unfinished checkpoint


def finish(process: subprocess.Popen, directory: Path) -> None:
  """Waits for the end of a run; if it failed, prints the end of its log and exits."""
  if process.wait():
    log = (directory / 'log.txt').read_text()
    sys.exit(f'the run failed with exit code {process.returncode}:\n{log[-3000:]}')


def inode(path: Path) -> int | None:
  """Returns the inode of a file, None where there is none."""
  return path.stat().st_ino if path.exists() else None


def last_step(path: Path) -> int:
  """Returns the step of the last complete line of a JSONL file, 0 where it is empty."""
  lines = path.read_bytes().split(b'\n')[:-1]
  return json.loads(lines[-1])['step'] if lines else 0


def describe_remains(folder: Path) -> str:
  """Describes what a killed run has written of a stage."""
  metrics = folder / 'metrics.jsonl'
  if metrics.exists():
    saved = sorted(path.name for path in (folder / 'checkpoints').glob('*'))  # critique has none
    return f'left step {last_step(metrics)}, checkpoints {", ".join(saved) or "none"}'
  if folder.exists():
    return 'left ' + ', '.join(sorted(path.name for path in folder.iterdir()))
  return 'left nothing'


def compare(
  uninterrupted: Path,
  killed: Path,
  stages: Sequence[str],
  trained: Sequence[str],
) -> int:
  """Compares two workdirs and prints a table; returns 1 if anything differs, else 0."""
  rows: list[tuple[str, str, str, str]] = []

  def add(place: str, what: str, read: Any, path: str) -> None:
    expected = read(uninterrupted / path)
    actual = read(killed / path)
    verdict = list_differences(expected, actual)
    rows.append((place, what, str(len(expected)), verdict))

  for name in stages:
    if name in trained:
      add(name, 'arrays of the last checkpoint', read_arrays, f'{name}/checkpoints')
      add(name, 'metrics.jsonl', read_lines, f'{name}/metrics.jsonl')
      add(name, 'samples.jsonl', read_lines, f'{name}/samples.jsonl')
      add(name, 'files of export/', read_files, f'{name}/export')
    else:
      add(name, 'files', read_jsonl_files, name)
  if (uninterrupted / RESPONSES).is_file():
    add('evaluation', 'responses.jsonl', read_lines, RESPONSES)
  add('tokenizer', 'files', read_files, 'tokenizer')
  add('results.json', 'values', read_results, 'results.json')
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  for place, what, count, verdict in rows:
    cells = [place.ljust(widths[0]), what.ljust(widths[1]), count.rjust(widths[2]), verdict]
    say('  '.join(cells))
  if all(verdict == 'equal' for *_, verdict in rows):
    say('everything is equal')
    return 0
  say('the killed run DIFFERS from the uninterrupted run')
  return 1


def list_differences(expected: dict, actual: dict) -> str:
  """Returns 'equal', or the first keys whose values differ between two dicts."""
  keys = {*expected, *actual}
  differing = sorted(str(key) for key in keys if expected.get(key) != actual.get(key))
  if not differing:
    return 'equal'
  return 'DIFFERS: ' + ', '.join(differing[:4])


def read_arrays(directory: Path) -> dict[str, Any]:
  """Reads the arrays of the newest checkpoint, its step, and its position in the data.

  Returns:
    Array name → (dtype, shape, bytes); 'step' and 'data'.
  """
  import jax
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  wanted = ocp.args.Composite(
    params=ocp.args.StandardRestore(),
    rest=ocp.args.StandardRestore(),
    data=ocp.args.JsonRestore(),
  )
  with ocp.CheckpointManager(directory, options=options) as manager:
    step = manager.latest_step()
    items = manager.restore(step, args=wanted)
  values = {'step': step, 'data': items.data}
  for item in ('params', 'rest'):
    for path, leaf in jax.tree_util.tree_leaves_with_path(items[item]):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
      leaf = jax.device_get(leaf)
      name = item + jax.tree_util.keystr(path)
      values[name] = (leaf.dtype.str, leaf.shape, leaf.tobytes())  # bytes: NaN equals NaN
  return values


def read_lines(path: Path) -> dict[int, dict]:
  """Reads the lines of a JSONL file, by number; fields time/… are left out."""
  lines = {}
  for number, text in enumerate(path.read_text().split('\n')[:-1]):
    fields = json.loads(text)
    lines[number] = {k: v for k, v in fields.items() if not k.startswith('time/')}
  return lines


def read_files(directory: Path, pattern: str = '*') -> dict[str, bytes]:
  """Reads the files of a folder, by name."""
  return {path.name: path.read_bytes() for path in directory.glob(pattern)}


def read_jsonl_files(directory: Path) -> dict[str, bytes]:
  """Reads the JSONL files of a folder, by name."""
  return read_files(directory, '*.jsonl')


def read_results(path: Path) -> dict[str, Any]:
  """Reads results.json, without the values that contain times."""
  results = json.loads(path.read_text())
  return {
    key: value for key, value in results.items() if key not in ('seconds', 'table', 'fingerprint')
  }


def say(text: str) -> None:
  """Prints a line at once."""
  print(text, flush=True)


if __name__ == '__main__':
  sys.exit(main())
