"""Kills `generate` and `score` repeatedly, and compares their outputs with uninterrupted ones.

  python scripts/kill_lines_test.py --model=runs/quickstart/sft/export --workdir=runs/kill_lines

Each command is killed when it has claimed its output, after random numbers of lines, and at random
moments of its start; every second time by SIGTERM twice in place of SIGKILL. After each kill the
same command is started again, and at the end the output must be the same file, byte for byte. The
exit code is 1 if it is not.
"""

import argparse
from collections.abc import Sequence
import json
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import time

import kill_test

BATCH_SIZE = 2
WINDOW = 16 * BATCH_SIZE  # lines that are written at once
WINDOWS = 12
PROMPTS = ('What is the capital of France?', 'Why?', 'Tell me about the sea.', 'Who was she')
BOTH = (signal.SIGTERM, signal.SIGTERM)


def main() -> int:
  """Runs both commands without and with kills; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', required=True, help='a directory of a language model')
  parser.add_argument('--workdir', required=True, type=Path, help='a folder, emptied first')
  parser.add_argument('--kills', type=int, default=10, help='of each command')
  parser.add_argument('--seed', type=int, default=0, help='seed of the moments of the kills')
  options = parser.parse_args()
  folder = options.workdir.absolute()
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'compiled'))
  rng = random.Random(options.seed)
  common = [f'--model={Path(options.model).absolute()}', f'--batch_size={BATCH_SIZE}']
  commands = {
    'generate': ['--samples=2', '--max_new_tokens=24', '--seed=3'],
    'score': [],
  }
  failed = False
  for name, words in commands.items():
    rows = [make_row(number, name == 'score') for number in range(WINDOW * WINDOWS - 5)]
    source = folder / f'{name}.jsonl'
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    command = [name, *common, *words, f'--input={source}']
    whole = folder / f'{name}-whole.jsonl'
    kill_test.finish(start(command, whole, folder), folder)
    killed = folder / f'{name}-killed.jsonl'
    kills = kill_often(command, killed, folder, options.kills, rng)
    equal = whole.read_bytes() == killed.read_bytes()
    lines = len(whole.read_bytes().splitlines())
    verdict = 'equal' if equal and lines == len(rows) else 'DIFFERS'
    kill_test.say(f'{name}: {kills} kills, {lines} lines: {verdict}')
    failed |= verdict != 'equal'
  return int(failed)


def make_row(number: int, is_text: bool) -> dict[str, str]:
  """Makes a line of the input."""
  prompt = f'{PROMPTS[number % len(PROMPTS)]} {number}'
  return {'text': prompt} if is_text else {'prompt': prompt}


def start(command: Sequence[str], output: Path, folder: Path) -> subprocess.Popen:
  """Starts a command, or resumes it."""
  name, *words = command
  paths = [str(kill_test.ROOT), os.environ.get('PYTHONPATH', '')]
  with (folder / 'log.txt').open('w') as log:
    return subprocess.Popen(
      [sys.executable, '-m', f'rlhf_jax.{name}', *words, f'--output={output}'],
      stdout=log,
      stderr=subprocess.STDOUT,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths)},
    )


def kill_often(
  command: Sequence[str], output: Path, folder: Path, count: int, rng: random.Random
) -> int:
  """Runs a command to its end with kills; returns how many there were."""
  # From the start, at the claim, and between and inside windows.
  early = ['start', 'claim']
  places = sorted(rng.randrange(1, WINDOW * (WINDOWS - 1)) for _ in range(count - len(early)))
  kills = 0
  for number, place in enumerate([*early, *places]):
    process = start(command, output, folder)
    if not wait(process, output, place, rng):
      break
    for signum in BOTH if number % 2 else (signal.SIGKILL,):
      process.send_signal(signum)
      time.sleep(0.05)
    process.wait()
    kills += 1
    kill_test.say(f'{kills:3} {command[0]} killed at {place}: {count_lines(output)} lines left')
  kill_test.finish(start(command, output, folder), folder)
  return kills


def wait(process: subprocess.Popen, output: Path, place: str | int, rng: random.Random) -> bool:
  """Waits for the moment of a kill; returns False where the process has ended before."""
  settings = output.with_name(output.name + '.settings.json')
  if place == 'start':
    time.sleep(rng.uniform(0.5, 3))
  while process.poll() is None and place != 'start':
    if settings.exists() if place == 'claim' else count_lines(output) >= int(place):
      break
    time.sleep(0.002)
  if isinstance(place, int):
    time.sleep(rng.uniform(0, 0.05))
  return process.poll() is None


def count_lines(path: Path) -> int:
  """Returns the number of complete lines of a file, 0 where there is none."""
  return path.read_bytes().count(b'\n') if path.exists() else 0


if __name__ == '__main__':
  sys.exit(main())
