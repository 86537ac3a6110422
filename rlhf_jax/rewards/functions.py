"""Rewards that are Python functions of texts, run on the host.

  def reward(
      prompts: list[list[dict]],
      responses: list[str],
      records: list[Prompt],
  ) -> list[float]

A reward function gets the conversations, the responses and the prompts' records
(with their `meta`), and returns a finite float for each response. A config names
it as 'module:function', or with keyword arguments as 'module:function(most=20)';
docs/rewards.md lists those that come with the package.

Responses are sent to worker processes in chunks, each with a time limit. A chunk
that fails is retried one response at a time, so that only the responses that
cause the failure are lost: they score `failed_score` and are counted. The first
error of each kind is logged.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
from concurrent.futures import process
import contextlib
import dataclasses
import logging
import multiprocessing
import time
from typing import Any
import weakref

import numpy as np
import pebble

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.named_functions import find_function
from rlhf_jax.options import Natural, Number, Positive
from rlhf_jax.rewards import builtin, worker

# score(conversations, responses, records) → ([N] float32, the number of failed responses)
Score = Callable[..., tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True)
class RewardFunctionOptions:
  """How reward functions are run."""

  workers: Natural = 2  # worker processes; 0 = run in this process, without a time limit
  # Time limit of a chunk of at most 16 responses, or of a single response
  seconds: Positive = 10.0
  failed_score: Number = 0.0  # of a response on which the function failed or took too long

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.workers else {'seconds': 'workers is 0'}


_STOP_SECONDS = 5  # for the worker processes to end
_STUCK_SECONDS = 120  # beyond its time, after which a chunk is not waited for
_CHUNK_SIZE = 16  # responses that a worker gets at once
_Columns = tuple[list, list, list]  # conversations, responses, records
_Outcome = list[float] | Exception  # the scores of a chunk, or the error of a single response


def build_reward_function(name: str, options: RewardFunctionOptions | None = None) -> Score:
  """Builds a function that scores texts by a reward function.

  Args:
    name: 'module:function' or 'module:function(option=value, …)'.
    options: how it is run; None for the defaults.

  Returns:
    score(conversations, responses, records) → (values [N] float32, the number of failed
    responses). It raises a UserError when the reward function returns anything other
    than a finite float for each response, or fails on every response.

  Raises:
    UserError: there is no such function.
  """
  if options is None:
    options = RewardFunctionOptions()
  # Raises here rather than in a worker if there is no such function.
  find_function(name, worker.ROLE, worker.ARGUMENTS)
  workers = _Workers(name, options.workers) if options.workers else None
  logged: set[str] = set()  # the kinds of errors already logged

  def score(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    rows = list(zip(conversations, responses, records, strict=True))
    outcomes = _score_rows(name, workers, options.seconds, rows)
    values: list[float] = []
    failures: list[tuple[int, Exception]] = []  # (index of the response, error)
    for outcome in outcomes:
      if isinstance(outcome, Exception):
        failures.append((len(values), outcome))
        values.append(options.failed_score)
      else:
        values.extend(outcome)
    for index, error in failures:
      _, response, record = rows[index]
      kind, message = _describe_error(name, error)
      if len(failures) == len(rows):
        raise UserError(f'{message}; it failed on every response')
      if kind not in logged:
        logged.add(kind)
        logging.warning(
          '%s; prompt %s, response %.60r; such responses score %g and are counted in reward/failed',
          message,
          record.id,
          response,
          options.failed_score,
        )
    return np.asarray(values, np.float32), len(failures)

  if workers is not None:
    weakref.finalize(score, workers.stop)  # at the end of this process at the latest
  return score


def check_prompts(name: str, prompts: Sequence[Any]) -> None:
  """Checks that prompts have what a reward function of this package reads of them.

  Other functions are not called, as they may do anything; nor are other rewards.

  Args:
    name: as in a config's `reward`.
    prompts: N records.Prompt.

  Raises:
    UserError: the `meta` of a prompt lacks a field, or has a wrong one.
  """
  if not prompts or not name.startswith(f'{builtin.__name__}.'):
    return
  conversations = [prompt.messages for prompt in prompts]
  with contextlib.suppress(worker.FunctionError):  # it may dislike this response
    try:
      worker.call_function(name, conversations, ['0'] * len(prompts), prompts)
    except UserError as error:
      raise UserError(f'{worker.ROLE} {name!r}: {error}') from None


class _Workers:
  """A pool of worker processes, made anew where it broke.

  The library cannot tell which task a process has killed if the process is dead
  before its acknowledgement is read, or had no task; it then gives up the pool.
  """

  def __init__(self, name: str, count: int):
    self._name = name
    self._count = count
    self._pool = self._start()

  def schedule(self, seconds: float, chunk: list[tuple]) -> concurrent.futures.Future:
    """Gives a chunk to the next free worker."""
    if not self._pool.active:
      self.stop()
      self._pool = self._start()
    return self._pool.schedule(
      worker.call_function, args=(self._name, *_columns(chunk)), timeout=seconds
    )

  def wait(self, future: concurrent.futures.Future, seconds: float) -> list[float]:
    """Returns the scores of a chunk.

    Raises:
      BrokenProcessPool: the pool broke, perhaps by another chunk.
      Exception: whatever the call raised; TimeoutError after `seconds`.
    """
    stuck = time.monotonic() + seconds + _STUCK_SECONDS
    while not future.done():
      concurrent.futures.wait([future], timeout=1)
      if time.monotonic() > stuck:  # a process that dies with a lock keeps others from work
        self._pool.stop()
      # A pool that breaks forgets what it had not given to a worker.
      if not self._pool.active and not future.done():
        raise process.BrokenProcessPool('the worker processes ended')
    return future.result()

  def stop(self) -> None:
    """Ends the worker processes, also those in which a function is stuck."""
    self._pool.stop()
    with contextlib.suppress(TimeoutError):  # a process that the system cannot end
      self._pool.join(_STOP_SECONDS)

  def _start(self) -> pebble.ProcessPool:
    return pebble.ProcessPool(
      self._count,
      initializer=worker.prepare,
      initargs=(self._name,),
      # A fork would copy locks that JAX's threads may hold, and so could deadlock.
      context=multiprocessing.get_context('spawn'),
    )


def _score_rows(
  name: str,
  workers: _Workers | None,
  seconds: float,
  rows: list[tuple],
) -> list[_Outcome]:
  """Scores rows in chunks, and the rows of a failed chunk one by one.

  Returns:
    The outcomes in the order of the rows: the scores of a whole chunk, or those or the
    error of a single row.
  """
  chunks = [rows[begin : begin + _CHUNK_SIZE] for begin in range(0, len(rows), _CHUNK_SIZE)]
  outcomes: list[_Outcome] = []
  first_tries = _run_chunks(name, workers, seconds, chunks)
  for chunk, outcome in zip(chunks, first_tries, strict=True):
    # A chunk of one response would only fail again.
    if isinstance(outcome, Exception) and len(chunk) > 1:
      singles = [[row] for row in chunk]
      outcomes.extend(_run_chunks(name, workers, seconds, singles))
    else:
      outcomes.append(outcome)
  return outcomes


def _run_chunks(
  name: str,
  workers: _Workers | None,
  seconds: float,
  chunks: list[list[tuple]],
) -> list[_Outcome]:
  """Runs the reward function on chunks, in parallel if there are worker processes."""
  if workers is None:
    return [_catch_error(worker.call_function, name, *_columns(chunk)) for chunk in chunks]
  futures = [workers.schedule(seconds, chunk) for chunk in chunks]
  outcomes = [_catch_error(workers.wait, future, seconds) for future in futures]
  for number, outcome in enumerate(outcomes):
    # Which chunk broke the pool is not known, so each of those that were lost runs alone.
    if isinstance(outcome, process.BrokenProcessPool):
      future = workers.schedule(seconds, chunks[number])
      outcomes[number] = _catch_error(workers.wait, future, seconds)
  return outcomes


def _columns(rows: list[tuple]) -> _Columns:
  """Returns conversations, responses and records as three lists."""
  conversations, responses, records = zip(*rows, strict=True)
  return list(conversations), list(responses), list(records)


def _catch_error(function: Callable[..., list[float]], *arguments: Any) -> _Outcome:
  """Returns the result of a call, or the exception that it raised.

  Raises:
    UserError: as the call does; it means that the reward function itself is wrong, not
      the response.
  """
  try:
    return function(*arguments)
  except UserError:
    raise
  except Exception as error:  # the user's function may raise anything
    return error


def _describe_error(name: str, error: Exception) -> tuple[str, str]:
  """Returns the kind of an error, and a message of one line."""
  kind, details = type(error).__name__, plain_text.one_line(str(error), 120)
  if isinstance(error, worker.FunctionError):
    kind, details = error.kind, error.details
  elif isinstance(error, concurrent.futures.TimeoutError):
    kind = 'no result in time'
  return kind, f'reward {name!r}: {kind}: {details}'
