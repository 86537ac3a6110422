"""Measures how the time and the memory of a step grow with rows, their length, and layers.

  python scripts/measure_curves.py

From the benchmark's tiny shape (8 rows, 64 + 64 tokens, 6 layers) one size at a time is halved
and doubled; for an SFT update and for a rollout. All take turns. Prints Markdown: the median time
of a step, the memory that the compiler plans for temporary values, and the growth of both: how many
times each value is the one before it.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benchmarking
sys.path.insert(1, str(Path(__file__).parents[1]))  # this library

from benchmarking import ours
from benchmarking.workload import Workload
import jax

from rlhf_jax.commands import host_memory
from rlhf_jax.generation import sampler
from rlhf_jax.runtime import compilation
from rlhf_jax.runtime.meter import PhaseClock
from rlhf_jax.stages import sft
from rlhf_jax.stages.shared import training

BASE = Workload('sft', layers=6)
# Name of a curve → what changes along it, the middle is BASE.
CURVES: dict[str, list[dict[str, int]]] = {
  'rows': [{'batch': 4}, {}, {'batch': 16}],
  'length': [
    {'prompt_length': 32, 'response_length': 32},
    {},
    {'prompt_length': 128, 'response_length': 128},
  ],
  'layers': [{'layers': 3}, {}, {'layers': 12}],
}
SIZES = {'rows': 'batch', 'length': 'length', 'layers': 'layers'}  # the attribute of Workload


@dataclasses.dataclass
class Point:
  """A step that can be made again and again."""

  work: Workload
  step: Any  # a function of (state, batch), which returns the next state first
  state: Any
  batch: Any
  temporary: int  # bytes, by the compiler
  seconds: list[float] = dataclasses.field(default_factory=list)

  def make_step(self) -> None:
    """Makes a step and notes its time."""
    began = time.perf_counter()
    self.state, *_ = jax.block_until_ready(self.step(self.state, self.batch))
    self.seconds.append(time.perf_counter() - began)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--turns', type=int, default=7, help='steps of each that are timed')
  options = parser.parse_args()
  host_memory.keep_freed_memory()
  compilation.request_exact_products()
  for stage in ('sft', 'generate'):
    prepare = functools.lru_cache(None)(functools.partial(prepare_point, stage))
    curves = {name: [prepare(*point.items()) for point in CURVES[name]] for name in CURVES}
    points = {id(point): point for curve in curves.values() for point in curve}.values()
    for _ in range(1 + options.turns):  # the first one compiles
      for point in points:
        point.make_step()
    print_table(stage, curves)


def prepare_point(stage: str, *changes: tuple[str, int]) -> Point:
  """Prepares the steps of a stage with some sizes of BASE changed."""
  work = dataclasses.replace(BASE, stage=stage, **dict(changes))
  stages_loop = ours.PREPARE[stage](work, PhaseClock())
  state = stages_loop.init()
  batch = next(stages_loop.batches)
  lower = lower_update if stage == 'sft' else lower_rollout
  memory = lower(work, state, batch).compile().memory_analysis()
  return Point(work, stages_loop.step, state, batch, memory.temp_size_in_bytes)


def lower_update(work: Workload, state: Any, batch: Any) -> jax.stages.Lowered:
  """Lowers the benchmark's update."""
  layout = ours.make_layout()
  definitions = training.Definitions(ours.make_model(work, layout), ours.make_optimizer(), layout)
  step: Any = training.compile_train_step(sft.train_step, definitions, sft.Options())
  return step.lower(state, batch)


def lower_rollout(work: Workload, state: Any, prompts: Any) -> jax.stages.Lowered:
  """Lowers a rollout of all rows in one call."""
  layout = ours.make_layout()
  generate: Any = sampler.build_sampler(
    ours.make_model(work, layout), ours.make_sampling(work), (), 0, layout=layout
  )
  prepared = generate.prepare(state.params, len(prompts.tokens))
  return generate.generate.lower(prepared, layout.place(prompts), jax.random.key(2))


def print_table(stage: str, curves: dict[str, list[Point]]) -> None:
  """Prints a row for each curve of a stage."""
  print(f'\n| `{stage}` | sizes | ms a step | growth | MiB of temporary values | growth |')
  print('| --- | --- | --- | --- | --- | --- |')
  for name, points in curves.items():
    times = [1000 * statistics.median(point.seconds[1:]) for point in points]
    memory = [point.temporary / 2**20 for point in points]
    sizes = [getattr(point.work, SIZES[name]) for point in points]
    cells = [name, _list(sizes), _list(times), _grow(times), _list(memory), _grow(memory)]
    print(f'| {" | ".join(cells)} |')


def _list(values: list[float]) -> str:
  return ', '.join(f'{value:.0f}' for value in values)


def _grow(values: list[float]) -> str:
  """Says how many times each value is the one before it."""
  pairs = zip(values, values[1:], strict=False)
  return ', '.join(f'{after / before:.2f}' for before, after in pairs)


if __name__ == '__main__':
  main()
