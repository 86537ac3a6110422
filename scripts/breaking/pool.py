"""Runs cases in forked processes, each with limits of time and memory."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import multiprocessing
from multiprocessing import connection
import os
from pathlib import Path
import shutil
import sys
import tempfile
import time
from typing import Any

from breaking.cases import Case

PATIENCE = 6  # times a case's seconds of CPU time may pass by the clock, on a loaded machine
MEMORY = 2 * 2**30  # bytes that a process may have in memory
VERDICTS = ('clear', 'read', 'vague', 'traceback', 'hang', 'accepted')


@dataclasses.dataclass
class _Worker:
  """A process and what it is doing."""

  process: Any
  pipe: Any
  index: int | None = None  # of the case
  deadline: float = 0.0  # by the clock
  used: float = 0.0  # seconds of CPU time before the case


def run_cases(
  cases: Sequence[Case], workers: int, minutes: float, show: Callable[[Case, str, str], None]
) -> list[tuple[str, str]]:
  """Runs all cases.

  Args:
    cases: the cases.
    workers: processes at once.
    minutes: after them no further case is begun.
    show: gets each case with its result at once.

  Returns:
    (verdict, what the user saw) of each case; ('', '') of one that was not tried.
  """
  end = time.monotonic() + 60 * minutes
  results: list[tuple[str, str]] = [('', '')] * len(cases)
  waiting = list(range(len(cases)))[::-1]
  pool = [_start(cases) for _ in range(workers)]
  while waiting or any(worker.index is not None for worker in pool):
    if time.monotonic() > end:
      waiting.clear()
    for worker in pool:
      if worker.index is None and waiting:
        worker.index = waiting.pop()
        worker.deadline = time.monotonic() + PATIENCE * cases[worker.index].seconds
        worker.used = _seconds(worker.process.pid)
        worker.pipe.send(worker.index)
    busy = [worker for worker in pool if worker.index is not None]
    ready = connection.wait([worker.pipe for worker in busy], timeout=0.2)
    for number, worker in enumerate(pool):
      if worker.index is None:
        continue
      outcome = None
      if worker.pipe in ready:
        try:
          results[worker.index] = worker.pipe.recv()
          show(cases[worker.index], *results[worker.index])
          worker.index = None
          continue
        except EOFError:
          outcome = ('traceback', 'the process died')
      elif (
        time.monotonic() > worker.deadline
        or _seconds(worker.process.pid) - worker.used > cases[worker.index].seconds
      ):
        outcome = ('hang', f'more than {cases[worker.index].seconds:.0f} s')
      elif _memory(worker.process.pid) > MEMORY:
        outcome = ('hang', f'more than {MEMORY / 2**30:.0f} GiB')
      if outcome is not None:
        results[worker.index] = outcome
        show(cases[worker.index], *outcome)
        worker.process.kill()
        worker.process.join()
        pool[number] = _start(cases)
  for worker in pool:
    worker.pipe.send(None)
    worker.process.join(5)
  return results


def _start(cases: Sequence[Case]) -> _Worker:
  """Forks a worker; nothing has used a device before, so that JAX has no threads yet."""
  context = multiprocessing.get_context('fork')
  ours, theirs = context.Pipe()
  process = context.Process(target=_work, args=(cases, theirs, ours), daemon=True)
  process.start()
  theirs.close()
  return _Worker(process, ours)


def _work(cases: Sequence[Case], pipe: Any, other_end: Any) -> None:
  """Is what a worker does: runs the cases whose numbers it gets, until its parent ends."""
  other_end.close()
  multiprocessing.current_process().daemon = False  # else it could not start reward workers
  null = os.open(os.devnull, os.O_RDONLY)
  os.dup2(null, 0)
  with contextlib.suppress(EOFError, OSError):  # the parent has ended
    for index in iter(pipe.recv, None):
      pipe.send(attempt(cases[index]))
  os._exit(0)


def attempt(case: Case) -> tuple[str, str]:
  """Runs one case in this process, and judges what the user would see."""
  from rlhf_jax.commands import failures

  folder = Path(tempfile.mkdtemp(prefix='break-'))
  home = os.getcwd()
  os.chdir(folder)
  said = folder / 'said.txt'
  input_folder = folder / 'input'
  input_folder.mkdir()
  code: Any = 'none'
  try:
    with _captured(said):
      code = failures.run(functools.partial(_call, case, input_folder), folder)
    text = said.read_text(encoding='utf-8', errors='replace')
    return _judge(case, code, text)
  finally:
    os.chdir(home)
    shutil.rmtree(folder, ignore_errors=True)


def _call(case: Case, folder: Path) -> int | None:
  """Runs a case; one that is a whole command returns its exit code."""
  returned = case.run(folder)
  return returned if isinstance(returned, int) else None


def _judge(case: Case, code: Any, text: str) -> tuple[str, str]:
  """Returns the verdict on an exit code and what was printed."""
  lines = [line for line in text.splitlines() if ': error: ' in line or 'this is a bug' in line]
  shown = lines[-1] if lines else text[-300:]
  if code == 0:
    return ('accepted' if case.refuse else 'read'), shown
  if code != 2 or 'Traceback' in text:
    return 'traceback', shown
  # Several mistakes have a line each.
  is_clear = bool(lines) and all(_names_place(case, line) for line in lines)
  return ('clear' if is_clear else 'vague'), shown


def _names_place(case: Case, line: str) -> bool:
  """Tells whether a line is short and names one of a case's places."""
  return len(line) < 1500 and any(place in line for place in case.place.split('|'))


@contextlib.contextmanager
def _captured(path: Path) -> Any:
  """Sends stdout and stderr, of libraries in C too, to a file."""
  sys.stdout.flush()
  sys.stderr.flush()
  saved = [os.dup(1), os.dup(2)]
  with open(path, 'wb', buffering=0) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
      yield
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      for number, descriptor in enumerate(saved, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _seconds(process: int) -> float:
  """Returns the CPU time of a process so far."""
  try:
    fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  except (OSError, ValueError):
    return 0.0


def _memory(process: int) -> int:
  """Returns the bytes that a process has in memory."""
  try:
    return int(Path(f'/proc/{process}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except (OSError, ValueError):
    return 0
