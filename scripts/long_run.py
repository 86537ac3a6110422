"""Runs many steps of the tiny PPO with evaluations and checkpoints, and watches what it uses.

  python scripts/long_run.py --workdir=runs/long --steps=2000

Resident memory, open descriptors, threads, processes and files are to be as many at the end as
after the first quarter. The exit code is 1 if one of them grew by more than a tenth.
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
GROWTH = 1.1  # times what it was, at most
EVERY = 50  # steps between evaluations and between checkpoints


def main() -> int:
  """Runs, watches and prints; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True, type=Path)
  parser.add_argument('--steps', type=int, default=2000)
  options = parser.parse_args()
  loop = {'steps': options.steps, 'eval_every': EVERY, 'save_every': EVERY, 'log_every': 10}
  overrides = [f'--config.ppo.loop.{name}={value}' for name, value in loop.items()]
  overrides += ['--config.ppo.sampling.max_new_tokens=8', '--config.evaluation.models={}']
  experiment = ROOT / 'experiments/quickstart.py:tiny'
  command = [sys.executable, '-m', 'rlhf_jax', f'--config={experiment}', *overrides]
  with subprocess.Popen([*command, f'--workdir={options.workdir}'], cwd=ROOT) as process:
    rows = watch(process, options.workdir, options.steps // 10)
  return process.returncode or compare(rows)


def watch(process: subprocess.Popen, workdir: Path, every: int) -> list[list[float]]:
  """Prints and returns what the process used, about every `every` steps of PPO."""
  print('| step | memory, MB | descriptors | threads | processes | files | events, MB |')
  print('| --- |' + ' --- |' * 6)
  rows: list[list[float]] = []
  while process.poll() is None:
    step = last_step(workdir / 'ppo/metrics.jsonl')
    if step and (not rows or step >= rows[-1][0] + every):
      rows.append([step, *measure(process.pid, workdir)])
      print('| ' + ' | '.join(f'{value:.0f}' for value in rows[-1]) + ' |', flush=True)
    time.sleep(0.2)
  return rows


def measure(process: int, workdir: Path) -> list[float]:
  """Returns memory, descriptors, threads, processes, files and the size of the event files."""
  status = dict(
    line.split(':', 1) for line in Path(f'/proc/{process}/status').read_text().splitlines()
  )
  children = Path(f'/proc/{process}/task/{process}/children').read_text().split()
  paths = [path for path in workdir.rglob('*') if path.is_file()]
  events = sum(path.stat().st_size for path in paths if 'tfevents' in path.name)
  return [
    int(status['VmRSS'].split()[0]) / 1024,
    len(list(Path(f'/proc/{process}/fd').iterdir())),
    int(status['Threads']),
    1 + len(children),
    len([path for path in paths if 'checkpoints' not in path.parts]),
    events / 2**20,
  ]


def last_step(path: Path) -> int:
  """Returns the step of the last complete line of a metrics file; 0 where there is none."""
  if not path.is_file():
    return 0
  lines = path.read_bytes().split(b'\n')[:-1]
  return json.loads(lines[-1])['step'] if lines else 0


def compare(rows: Sequence[Sequence[float]]) -> int:
  """Compares the end with the first quarter; prints what grew and returns the exit code."""
  names = ('memory', 'descriptors', 'threads', 'processes', 'files')
  early = rows[len(rows) // 4]
  grew = [
    f'{name}: {early[place]:.0f} → {rows[-1][place]:.0f}'
    for place, name in enumerate(names, start=1)
    if rows[-1][place] > GROWTH * early[place]
  ]
  print('grew: ' + '; '.join(grew) if grew else 'nothing grew')
  return int(bool(grew))


if __name__ == '__main__':
  sys.exit(main())
