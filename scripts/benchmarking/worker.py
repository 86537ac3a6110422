"""The process that does the work: it prepares, and then makes steps when it is told to.

A benchmark starts one for each library, so that no two of them share threads, memory or
a compiler's settings, and lets them take turns. The words of the protocol are JSON
objects, one a line: the worker says {"ready": …} after its first step, answers
{"steps": n} with {"times": [{phase: seconds}, …]}, and ends at the end of its input.
"""

from collections.abc import Callable
import json
import os
import resource
import sys
import time
from typing import Any, TextIO

# phase → seconds; `host` is what passes outside of the phases
Times = dict[str, float]


class Turns:
  """The worker's side of the protocol, for libraries that call a function at every step."""

  def __init__(self, describe: Callable[[], dict[str, Any]]):
    """Takes the process's stdout for the protocol; what others print goes to stderr.

    Args:
      describe: () → what is known after the first step: compilations, memory, versions.
    """
    self._output: TextIO = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    self._describe = describe
    self._times: list[Times] = []
    self._wanted = 1  # the first step is made without being told to
    self._began = float(os.environ['BENCHMARK_BEGAN'])  # when the process was started

  @property
  def left(self) -> int:
    """The steps of this turn that are not recorded yet."""
    return self._wanted - len(self._times)

  def done(self, times: Times) -> None:
    """Records a step, and waits here for the next turn where all wanted ones are made."""
    self._times.append(times)
    if len(self._times) < self._wanted:
      return
    if self._began:
      message = {'ready': {'first_step': time.time() - self._began, **self._describe()}}
      self._began = 0.0
    else:
      message = {'times': self._times, **self._describe()}
    self._times = []
    self._say(message)
    self._listen()

  def _say(self, message: dict[str, Any]) -> None:
    self._output.write(json.dumps(message) + '\n')
    self._output.flush()

  def _listen(self) -> None:
    line = sys.stdin.readline()
    if not line:  # the benchmark has what it wanted, or is gone
      sys.exit(0)
    self._wanted = json.loads(line)['steps']


def run(step: Callable[[], Times], turns: Turns) -> None:
  """Makes steps for ever, as the turns have it."""
  while True:
    turns.done(step())


def peak_host_memory() -> int:
  """Returns the largest resident memory of this process so far, in bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
