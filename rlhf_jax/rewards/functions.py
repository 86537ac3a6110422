"""Rewards that are Python functions on texts, run on the host.

  def reward(
      prompts: list[list[dict]],
      responses: list[str],
      records: list[Prompt],
  ) -> list[float]

A reward function gets the conversations, the responses and the prompts' records
(with their `meta`), and returns a finite float for each response. A config names
it as 'module:function', or with options as 'module:function(most=20)';
docs/rewards.md lists those that ship.

Responses go to worker processes in parts, each under a time limit. A part that
fails is tried again response by response, so that a bad response costs only
itself: it scores `failed_score` and is counted, and the first error of each kind
is logged.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import dataclasses
import logging
import multiprocessing
from typing import Any

import numpy as np
import pebble

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import worker

# score(conversations, responses, records) → ([N] float32, how many responses failed)
Score = Callable[..., tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True)
class RewardFunctionOptions:
  """How reward functions are run."""

  workers: int = 2  # processes that run a function; 0 = this one, without a time limit
  seconds: float = 10.0  # time limit of a part of at most 16 responses, or of one response
  failed_score: float = 0.0  # of a response on which the function failed or took too long


_PART_SIZE = 16  # responses that a worker gets at once
_Part = tuple[list, list, list]  # conversations, responses, records
_Outcome = list[float] | Exception


def build_reward_function(name: str, options: RewardFunctionOptions | None = None) -> Score:
  """Builds the score of texts by a reward function.

  Args:
    name: 'module:function', with options or without.
    options: how it is run; None for the defaults.

  Returns:
    score(conversations, responses, records) → (values [N] float32, how many
    responses failed).

  Raises:
    UserError: there is no such function; or, when called, the function returned
      something else than floats, or failed on every response.
  """
  if options is None:
    options = RewardFunctionOptions()
  worker.prepare(name)  # fails early, in this process
  pool = _start_workers(name, options.workers)
  logged: set[str] = set()  # kinds of errors

  def score(
    conversations: Sequence[list[dict]],
    responses: Sequence[str],
    records: Sequence[Any],
  ) -> tuple[np.ndarray, int]:
    rows = list(zip(conversations, responses, records, strict=True))
    outcomes = _score_rows(name, pool, options.seconds, rows)
    values: list[float] = []
    failures: list[tuple[int, Exception]] = []  # (place of the response, error)
    for outcome in outcomes:
      if isinstance(outcome, Exception):
        failures.append((len(values), outcome))
        values.append(options.failed_score)
      else:
        values.extend(outcome)
    for place, error in failures:
      _, response, record = rows[place]
      kind, message = _error_message(name, error)
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

  return score


def _start_workers(name: str, count: int) -> pebble.ProcessPool | None:
  """Starts worker processes; None where functions run in this process."""
  if not count:
    return None
  return pebble.ProcessPool(
    count,
    initializer=worker.prepare,
    initargs=(name,),
    # A fork would copy the locks of JAX's threads, which may be held.
    context=multiprocessing.get_context('spawn'),
  )


def _score_rows(
  name: str,
  pool: pebble.ProcessPool | None,
  seconds: float,
  rows: list[tuple],
) -> list[_Outcome]:
  """Scores rows in parts, and those of a failed part one by one.

  Returns:
    Outcomes in the order of the rows: the floats of a part, or the error of a
    single row.
  """
  parts = [rows[begin : begin + _PART_SIZE] for begin in range(0, len(rows), _PART_SIZE)]
  outcomes: list[_Outcome] = []
  first_tries = _run_parts(name, pool, seconds, parts)
  for part, outcome in zip(parts, first_tries, strict=True):
    # A part of one response that failed would fail again.
    if isinstance(outcome, Exception) and len(part) > 1:
      singles = [[row] for row in part]
      outcomes.extend(_run_parts(name, pool, seconds, singles))
    else:
      outcomes.append(outcome)
  return outcomes


def _run_parts(
  name: str,
  pool: pebble.ProcessPool | None,
  seconds: float,
  parts: list[list[tuple]],
) -> list[_Outcome]:
  """Runs the function on parts, side by side in the workers if there are any."""
  if pool is None:
    return [_outcome(worker.call_function, name, *_columns(part)) for part in parts]
  futures = []
  for part in parts:
    arguments = (name, *_columns(part))
    futures.append(pool.schedule(worker.call_function, args=arguments, timeout=seconds))
  return [_outcome(future.result) for future in futures]


def _columns(rows: list[tuple]) -> _Part:
  """Returns conversations, responses and records as three lists."""
  conversations, responses, records = zip(*rows, strict=True)
  return list(conversations), list(responses), list(records)


def _outcome(function: Callable[..., list[float]], *arguments: Any) -> _Outcome:
  """Returns the result of a call, or the error that it raised.

  A UserError is raised on: the function itself is wrong, not the response.
  """
  try:
    return function(*arguments)
  except UserError:
    raise
  except Exception as error:  # a user's function may raise anything
    return error


def _error_message(name: str, error: Exception) -> tuple[str, str]:
  """Returns the kind of an error, and a line about it."""
  kind = type(error).__name__
  if isinstance(error, concurrent.futures.TimeoutError):
    kind = 'no result in time'
  details = ' '.join(str(error).split())[:120]
  return kind, f'reward {name!r}: {kind}: {details}'
