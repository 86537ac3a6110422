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
import contextlib
import dataclasses
import logging
import multiprocessing
from typing import Any
import weakref

import numpy as np
import pebble

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.options import Natural, Number, Positive
from rlhf_jax.rewards import worker

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
  worker.prepare(name)  # raises here rather than in a worker if there is no such function
  pool = _start_workers(name, options.workers)
  logged: set[str] = set()  # the kinds of errors already logged

  def score(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    rows = list(zip(conversations, responses, records, strict=True))
    outcomes = _score_rows(name, pool, options.seconds, rows)
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

  if pool is not None:
    weakref.finalize(score, _stop_workers, pool)  # at the end of this process at the latest
  return score


def _stop_workers(pool: pebble.ProcessPool) -> None:
  """Ends the worker processes, also those in which a function is stuck."""
  pool.stop()
  with contextlib.suppress(TimeoutError):  # a process that the system cannot end
    pool.join(_STOP_SECONDS)


def _start_workers(name: str, count: int) -> pebble.ProcessPool | None:
  """Starts a pool of worker processes; returns None where functions run in this process."""
  if not count:
    return None
  return pebble.ProcessPool(
    count,
    initializer=worker.prepare,
    initargs=(name,),
    # A fork would copy locks that JAX's threads may hold, and so could deadlock.
    context=multiprocessing.get_context('spawn'),
  )


def _score_rows(
  name: str,
  pool: pebble.ProcessPool | None,
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
  first_tries = _run_chunks(name, pool, seconds, chunks)
  for chunk, outcome in zip(chunks, first_tries, strict=True):
    # A chunk of one response would only fail again.
    if isinstance(outcome, Exception) and len(chunk) > 1:
      singles = [[row] for row in chunk]
      outcomes.extend(_run_chunks(name, pool, seconds, singles))
    else:
      outcomes.append(outcome)
  return outcomes


def _run_chunks(
  name: str,
  pool: pebble.ProcessPool | None,
  seconds: float,
  chunks: list[list[tuple]],
) -> list[_Outcome]:
  """Runs the reward function on chunks, in parallel if there are worker processes."""
  if pool is None:
    return [_catch_error(worker.call_function, name, *_columns(chunk)) for chunk in chunks]
  futures = []
  for chunk in chunks:
    arguments = (name, *_columns(chunk))
    futures.append(pool.schedule(worker.call_function, args=arguments, timeout=seconds))
  return [_catch_error(future.result) for future in futures]


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
