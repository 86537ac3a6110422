"""Calls of a reward function in a worker process.

Every worker process imports this module, so it must not import anything that is slow to import,
such as JAX.
"""

from collections.abc import Sequence
import math
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.named_functions import find_function

ROLE = 'reward'  # how error messages call these functions


def prepare(name: str) -> None:
  """Imports a reward function's module; runs once when a worker process starts.

  Raises:
    UserError: there is no such function.
  """
  find_function(name, ROLE)


def call_function(
  name: str,
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
) -> list[float]:
  """Calls a reward function and checks what it returns.

  Args:
    name: 'module:function' or 'module:function(option=value, …)'.
    prompts: N conversations.
    responses: N texts.
    records: N records.Prompt, which hold the `meta` of each prompt.

  Returns:
    N finite floats.

  Raises:
    UserError: the function did not return a finite float for each response.
  """
  returned = find_function(name, ROLE)(prompts, responses, records)
  try:  # arrays, tuples and generators are accepted too
    values = [float(value) for value in returned]
  except (TypeError, ValueError):
    values = []
  expected = len(responses)
  if len(values) != expected or not all(map(math.isfinite, values)):
    shown = ' '.join(repr(returned).split())[:80]
    raise UserError(f'{ROLE} {name!r}: expected {expected} finite floats, got {shown}')
  return values
