"""Rewards that are programs: a function on texts, run on the host between rollout and update.

  def reward(prompts: list[list[dict]], responses: list[str], records: list[Prompt]) -> list[float]

It gets the conversations, the answers and the prompts' records (with their `meta`), and gives a float for each. A
config names it as 'module:function', with options as 'module:function(most=20)'; docs/rewards.md has those that ship.

Answers go to worker processes in parts, a part under a time limit. A part that fails is taken again answer by answer,
so that a bad answer costs only itself: it gets `failed_score`, is counted, and the first of each kind of error is said.
"""

import concurrent.futures
import logging
import multiprocessing

import numpy as np
import pebble

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import calls

DEFAULTS = dict(
    workers=2,  # processes that run a program; 0 = this one, without a time limit
    seconds=10.0,  # for an answer, or for a part of at most 16 of them
    failed_score=0.0,  # of an answer on which the program failed or took longer
)
_PART = 16


def is_function_name(name: str) -> bool:
  """Whether a reward of this name is a function rather than a model."""
  return ':' in name


def build_reward_function(name: str, config=None):
  """A program as a function of texts.

  Args:
    name: 'module:function', or with options.
    config: like DEFAULTS.

  Returns:
    values(prompts, responses, records) → ([N] float32, how many answers failed).

  Raises:
    UserError: no such function; and, when called, it gave something else than floats, or failed on every answer.
  """
  config = {**DEFAULTS, **(config or {})}
  calls.find_function(name)
  said = set()
  pool = pebble.ProcessPool(config['workers'], initializer=calls.find_function, initargs=(name,),
                            context=multiprocessing.get_context('spawn')) if config['workers'] else None

  def attempt(parts):
    """For each part its floats, or the error."""
    if pool is None:
      return [_outcome(lambda: calls.call_function(name, *part)) for part in parts]
    futures = [pool.schedule(calls.call_function, args=(name, *part), timeout=config['seconds']) for part in parts]
    return [_outcome(future.result) for future in futures]

  def values(prompts, responses, records):
    rows = list(zip(prompts, responses, records))
    parts = [rows[begin:begin + _PART] for begin in range(0, len(rows), _PART)]
    columns = lambda part: tuple(map(list, zip(*part)))
    outcomes = []
    for part, outcome in zip(parts, attempt([columns(part) for part in parts])):
      alone = isinstance(outcome, Exception) and len(part) > 1
      outcomes += attempt([columns([row]) for row in part]) if alone else [outcome]
    result, errors = [], []
    for outcome in outcomes:
      if isinstance(outcome, Exception):
        errors.append((len(result), outcome))
        outcome = [config['failed_score']]
      result += outcome
    for place, error in errors:
      kind = 'no answer in time' if isinstance(error, concurrent.futures.TimeoutError) else type(error).__name__
      where = f'reward {name!r}: {kind}: {" ".join(str(error).split())[:120]}'
      if len(errors) == len(rows):
        raise UserError(f'{where}; it failed on every answer')
      if kind not in said:
        said.add(kind)
        logging.warning('%s; prompt %s, answer %.60r; such answers score %g and are counted in reward/failed', where,
                        records[place].id, responses[place], config['failed_score'])
    return np.asarray(result, np.float32), len(errors)

  return values


def _outcome(result):
  try:
    return result()
  except UserError:
    raise
  except Exception as error:  # whatever a program does
    return error
