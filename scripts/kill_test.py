"""Kills a run again and again (kill -9) and compares what it leaves with a run left alone, bit for bit.

  python scripts/kill_test.py --workdir=runs/kill_test --kills=12 --seed=0

Every stage that trains is killed at random steps and inside the saving of a checkpoint; collecting feedback and the
last evaluation at random moments. After each kill the same command is given again. Any further words, such as
--config.ppo.microbatches=2, go to both runs. Exit code 1 where anything differs.
"""

import argparse
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

STEPS, SAVE_EVERY = 12, 3
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False)
  parser.add_argument('--config', default=str(ROOT / 'experiments/quickstart.py:tiny'), help='the experiment')
  parser.add_argument('--workdir', required=True, help='gets the two runs, alone/ and killed/, emptied first')
  parser.add_argument('--kills', type=int, default=12)
  parser.add_argument('--seed', type=int, default=0, help='of the kill moments')
  options, overrides = parser.parse_known_args()
  for word in overrides:
    if not word.startswith('--config.'):
      parser.error(f'unknown argument {word}')
  sys.path.insert(0, str(ROOT))
  from rlhf_jax import pipeline

  config = pipeline.load_config(options.config, [word.removeprefix('--config.') for word in overrides])
  trained = [name for name in config.stages if 'loop' in config[name]]
  for name in trained:
    loop = dict(steps=STEPS, save_every=SAVE_EVERY, eval_every=2 * SAVE_EVERY, log_every=1)
    overrides += [f'--config.{name}.loop.{key}={value}' for key, value in loop.items()]
  workdir = Path(options.workdir).absolute()
  alone, killed = workdir / 'alone', workdir / 'killed'
  for directory in (alone, killed):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(workdir / 'compiled'))  # restarts are quick

  def start(directory):
    log = (directory / 'log.txt').open('w')
    command = [sys.executable, '-m', 'rlhf_jax', f'--config={options.config}', f'--workdir={directory}', *overrides]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={
        **os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])})

  say('the run left alone')
  began = time.monotonic()
  finish(start(alone), alone)
  say(f'done in {time.monotonic() - began:.0f} s; the run that is killed')
  phases = [*config.stages, *(['evaluation'] if len(config.evaluation.models) else [])]
  seconds = json.loads((alone / 'results.json').read_text())['seconds']
  moments = plan(phases, trained, seconds, options.kills, random.Random(options.seed))
  kills, missed, began = [], [], time.monotonic()
  while True:
    process, outcome = start(killed), False
    before = {name: inode(killed / name / 'metrics.jsonl') for name in trained}
    while moments and process.poll() is None and not outcome:
      moment = moments.pop(0)
      outcome = wait(process, killed, moment, before.get(moment['phase']))
      if outcome is None:  # the process ended by itself
        break
      (kills if outcome else missed).append(moment)
    if not outcome:
      missed += moments
      finish(process, killed)
      break
    process.send_signal(signal.SIGKILL)
    process.wait()
    say(f'{len(kills):3} killed in {describe(moment)}: {found(killed / moment["phase"])}')
  for moment in missed:
    say(f'    missed: {describe(moment)} was over too soon')
  say(f'{len(kills)} kills in {time.monotonic() - began:.0f} s')
  return compare(alone, killed, config.stages, trained)


def plan(phases, trained, seconds, kills, rng):
  """Kill moments in the order in which they come: dicts {phase, step, saving, delay in seconds}."""
  order = sorted(phases, key=lambda name: name not in trained)
  moments = []
  for name in phases:
    count = len(range(order.index(name), kills, len(order)))
    steps = sorted(rng.sample(range(1, STEPS), min(count, STEPS - 1))) if name in trained else [None] * count
    saving = rng.randrange(count) if count > 1 else None
    for number, step in enumerate(steps):
      inside = name in trained and number == saving
      if inside:  # there must be a save to come before the next moment
        step = min(step, STEPS - SAVE_EVERY)
      delay = rng.uniform(0, 0.01 if inside else 0.1 if step else seconds[name] / 2)  # caches are warm then
      moments.append(dict(phase=name, step=step, saving=inside, delay=delay))
  return moments


def wait(process, directory, moment, before):
  """True when the moment has come, False when it is missed, None when the process ended."""
  folder = directory / moment['phase']
  log, metrics = directory / 'log.txt', folder / 'metrics.jsonl'
  while True:
    over = process.poll() is not None
    if over:
      return None
    if (folder / 'finished.json').exists():
      return False
    if moment['step'] is None:
      come = any(line.startswith('—') and moment['phase'] in line for line in log.read_text().splitlines())
    else:  # a file of its own says that this process trains: a resumed run writes it anew
      come = inode(metrics) not in (None, before) and last_step(metrics) >= moment['step']
      come = come and (not moment['saving'] or any((folder / 'checkpoints').glob('*tmp*')))
    if come:
      time.sleep(moment['delay'])
      return None if process.poll() is not None else True
    time.sleep(0.003)


def finish(process, directory):
  if process.wait():
    sys.exit(f'the run failed with exit code {process.returncode}:\n{(directory / "log.txt").read_text()[-3000:]}')


def inode(path):
  return path.stat().st_ino if path.exists() else None


def last_step(path):
  lines = path.read_bytes().split(b'\n')[:-1]
  return json.loads(lines[-1])['step'] if lines else 0


def describe(moment):
  step = moment['step']
  place = '' if step is None else f' from step {step} on, inside a save' if moment['saving'] else f' at step {step}'
  return f'{moment["phase"]}{place}, {moment["delay"] * 1000:.0f} ms later'


def found(folder):
  """What the dead run left of a stage."""
  if not (folder / 'metrics.jsonl').exists():
    return 'left ' + (', '.join(sorted(path.name for path in folder.iterdir())) if folder.exists() else 'nothing')
  saved = sorted(path.name for path in (folder / 'checkpoints').iterdir())
  return f'left step {last_step(folder / "metrics.jsonl")}, checkpoints {", ".join(saved) or "none"}'


def compare(alone, killed, stages, trained) -> int:
  """Prints a table of what is equal; 1 where anything differs."""
  rows = []
  def row(place, what, a, b):
    differing = sorted(str(key) for key in {*a, *b} if a.get(key) != b.get(key))
    rows.append((place, what, len(a), 'equal' if not differing else 'DIFFERS: ' + ', '.join(differing[:4])))

  for name in stages:
    if name in trained:
      row(name, 'arrays of the last checkpoint', *(arrays(base / name / 'checkpoints') for base in (alone, killed)))
      for file in ('metrics.jsonl', 'samples.jsonl'):
        row(name, file, *(dict(enumerate(lines(base / name / file))) for base in (alone, killed)))
      row(name, 'files of export/', *(contents(base / name / 'export') for base in (alone, killed)))
    else:
      row(name, 'files', *(contents(base / name, '*.jsonl') for base in (alone, killed)))
  row('tokenizer', 'files', *(contents(base / 'tokenizer') for base in (alone, killed)))
  results = [json.loads((base / 'results.json').read_text()) for base in (alone, killed)]
  row('results.json', 'values', *({key: value for key, value in result.items() if key not in ('seconds', 'table')}
                                  for result in results))
  widths = [max(len(str(line[i])) for line in rows) for i in range(3)]
  for place, what, count, verdict in rows:
    say(f'{place:{widths[0]}}  {what:{widths[1]}}  {count:{widths[2]}}  {verdict}')
  same = all(verdict == 'equal' for *_, verdict in rows)
  say('everything is equal' if same else 'the killed run DIFFERS from the run left alone')
  return 0 if same else 1


def arrays(directory):
  """Array name → (dtype, shape, bytes) of the newest checkpoint, and its step and place in the data."""
  import jax
  import orbax.checkpoint as ocp
  options = ocp.CheckpointManagerOptions(read_only=True, create=False)
  with ocp.CheckpointManager(directory, options=options) as manager:
    step = manager.latest_step()
    items = manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore(), rest=ocp.args.StandardRestore(), data=ocp.args.JsonRestore()))
  values = {'step': step, 'data': items.data}
  for item in ('params', 'rest'):
    for path, leaf in jax.tree_util.tree_leaves_with_path(items[item]):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
      leaf = jax.device_get(leaf)
      values[item + jax.tree_util.keystr(path)] = leaf.dtype.str, leaf.shape, leaf.tobytes()
  return values


def lines(path):
  """The lines of a JSONL file without the fields time/…."""
  return [{key: value for key, value in json.loads(line).items() if not key.startswith('time/')}
          for line in path.read_text().splitlines()]


def contents(directory, pattern='*'):
  return {path.name: path.read_bytes() for path in directory.glob(pattern)}


def say(text):
  print(text, flush=True)


if __name__ == '__main__':
  sys.exit(main())
