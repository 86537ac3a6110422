"""Measures a stage's speed on this machine, alone or in turns with other libraries.

  python scripts/benchmark.py --stage sft,ppo --roofline
  python scripts/benchmark.py --stage grpo --peer trl=PYTHON --peer tunix=PYTHON --roofline

Each library runs in its own process, warmed up by three steps. Then the libraries take turns of
--steps steps, --turns times. One line of JSON for each stage and library goes to stdout:

  tokens_per_second  of the median step; `tokens` says which tokens are counted
  step_seconds       median and shortest, after the warm-up
  first_step         seconds from the start of the process to the end of the first step: `cold` with
                     an empty compilation cache, `warm` with a filled one
  flops              that a step needs, by sizes alone (rlhf_jax/planning/model_flops.py)
  share, of          the share of the machine's limit that `of` names; with --roofline
  phases             rollout, scoring, update: seconds, and the shares of both limits
  host               seconds in which no phase runs, from one step's results to the next's
  host_bytes, device_bytes   peak memory of the process and of the device
  compilations       programs compiled up to the first step, and after it (which must be 0)

Rows are full and responses never end early, so that all libraries compute the same tokens. The
device is the first one: CPU, GPU or TPU. docs/performance.md explains the figures.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(1, str(ROOT))

from benchmarking import figures
from benchmarking.workload import SHAPES, STAGES, Workload

FOLDER = ROOT / 'scripts' / 'benchmarking'
OURS = 'rlhf_jax'
PEERS = {'trl': 'trl_peer.py', 'tunix': 'tunix_peer.py'}
# What identifies a line of an earlier measurement.
IDENTITY = ('library', *(field.name for field in dataclasses.fields(Workload)))


def main() -> None:
  options = parse_arguments()
  earlier = read_lines(options.compare) if options.compare else []
  for stage in options.stage.split(','):
    work = Workload(
      stage,
      options.model,
      options.batch,
      options.prompt_len,
      options.response_len,
      options.dtype,
      options.temperature,
      options.attention,
      options.remat,
    )
    for line in measure(work, options):
      print(json.dumps(line), flush=True)
      compare(line, earlier)


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add('--stage', default='sft', help=f'{", ".join(STAGES)}; several with commas')
  add('--model', default='tiny', choices=SHAPES, help='its shape (default: %(default)s)')
  add('--batch', type=int, default=8, help='rows, pairs, prompts, or responses of grpo')
  add('--prompt-len', type=int, default=64, help='tokens of a prompt')
  add('--response-len', type=int, default=64, help='tokens of a response')
  add('--steps', type=int, default=5, help='steps of a turn')
  add('--turns', type=int, default=3, help='turns of each library')
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  add('--temperature', type=float, default=1.0, help='of the sampling; 0 = greedy')
  add('--attention', default='auto', help="ours: 'plain', 'cudnn', 'splash' or 'auto'")
  add('--remat', default='none', choices=('none', 'dots', 'full'), help='ours')
  add('--roofline', action='store_true', help='measure the limits before, between and after')
  add('--warm-only', action='store_true', help='do not measure a start with an empty cache')
  add('--compare', metavar='FILE', help='lines of an earlier run: say the ratios on stderr')
  add('--profile', metavar='DIR', help='trace our third step, for TensorBoard or Perfetto')
  add(
    '--peer',
    action='append',
    default=[],
    metavar='NAME[=PYTHON]',
    help=f'{", ".join(PEERS)}, and the interpreter that has it; may be repeated',
  )
  options = parser.parse_args()
  for stage in options.stage.split(','):
    if stage not in STAGES:
      parser.error(f'--stage={stage}: expected one of {", ".join(STAGES)}')
  for peer in options.peer:
    if peer.partition('=')[0] not in PEERS:
      parser.error(f'--peer={peer}: expected one of {", ".join(PEERS)}')
  return options


def measure(work: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Measures one workload; yields a line for each library."""
  with contextlib.ExitStack() as stack:
    cache = stack.enter_context(tempfile.TemporaryDirectory())
    first_steps: dict[str, float] = {}
    if not options.warm_only:
      with Worker(OURS, sys.executable, 'ours.py', work, cache) as cold:
        first_steps['cold'] = cold.first_step
    cache = cache if first_steps else ''  # '' = the user's
    workers = [
      stack.enter_context(
        Worker(OURS, sys.executable, 'ours.py', work, cache, options.profile or '')
      )
    ]
    for peer in options.peer:
      name, _, python = peer.partition('=')
      workers.append(stack.enter_context(Worker(name, python or sys.executable, PEERS[name], work)))
    for worker in workers:
      worker.warm_up()
    limits = Limits(work.dtype) if options.roofline else None
    for _ in range(options.turns):
      for worker in workers:
        worker.make_steps(options.steps)
      if limits:
        limits.measure()
    for worker in workers:
      warm = {'warm': round(worker.first_step, 2)}
      if worker.library == OURS:
        warm = {**first_steps, **warm}
      line = figures.summarise(
        work, worker.library, worker.described, worker.times, limits and limits.best
      )
      yield {**line, 'first_step': warm}


class Worker:
  """A process that works for one library; see benchmarking/worker.py."""

  def __init__(
    self, library: str, python: str, script: str, work: Workload, cache: str = '', trace: str = ''
  ):
    """Starts the process, and returns when its first step is made."""
    self.library = library
    self.times: list[dict[str, float]] = []
    environment = dict(os.environ, BENCHMARK_BEGAN=str(time.time()))
    # Several processes share a GPU's memory.
    environment.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    if cache:
      environment['JAX_COMPILATION_CACHE_DIR'] = cache
    words = [python, str(FOLDER / script), work.to_json(), *([trace] if trace else [])]
    self._process = subprocess.Popen(
      words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.described = self._listen()['ready']
    self.first_step = round(self.described.pop('first_step'), 2)
    self._compiled_first = self.described.get('compilations', 0)

  def warm_up(self) -> None:
    """Makes a few steps that do not count: some libraries compile their second one too."""
    self.make_steps(2)
    self.times.clear()

  def make_steps(self, count: int) -> None:
    """Makes a turn of steps, and keeps their times."""
    assert self._process.stdin
    self._process.stdin.write(json.dumps({'steps': count}) + '\n')
    self._process.stdin.flush()
    answer = self._listen()
    self.times += answer.pop('times')
    self.described = answer
    if 'compilations' in answer:
      later = answer['compilations'] - self._compiled_first
      answer['compilations'] = {'first_step': self._compiled_first, 'later': later}

  def _listen(self) -> dict[str, Any]:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'benchmark: the worker of {self.library} ended with {self._process.wait()}')
    return json.loads(line)

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_: Any) -> None:
    assert self._process.stdin
    self._process.stdin.close()  # it ends at the end of its input
    self._process.wait()


class Limits:
  """What the machine can do: the best of all measurements of a run."""

  def __init__(self, dtype: str):
    self._dtype = dtype
    self.best: dict[str, float] = {}
    self.measure()

  def measure(self) -> None:
    """Measures once more."""
    words = [sys.executable, str(FOLDER / 'roofline.py'), self._dtype]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    for name, value in json.loads(output).items():
      self.best[name] = max(value, self.best.get(name, 0.0))


def read_lines(path: str) -> list[dict[str, Any]]:
  """Reads the lines of an earlier run."""
  return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def compare(line: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> None:
  """Says on stderr how much faster this is than the last earlier line of the same work."""
  # earlier lines may lack what was added since
  same = [old for old in earlier if all(old.get(key, line[key]) == line[key] for key in IDENTITY)]
  if not same:
    return
  before, now = same[-1]['tokens_per_second'], line['tokens_per_second']
  print(
    f'{line["stage"]} {line["library"]}: {before:,.0f} → {now:,.0f} tokens/s, × {now / before:.2f}',
    file=sys.stderr,
  )


if __name__ == '__main__':
  main()
