"""What a worker process runs: one call of a reward function.

Every worker process imports this module, so nothing heavy may be imported here.
"""

from collections.abc import Sequence
import math
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.named_functions import find_function

ROLE = 'reward'  # how error messages call these functions


def prepare(name: str) -> None:
  """Imports a reward function's module; run once when a worker process starts."""
  find_function(name, ROLE)


def call_function(
  name: str,
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
) -> list[float]:
  """Returns what a reward function gives for each response.

  Args:
    name: 'module:function', with options or without.
    prompts: N conversations.
    responses: N texts.
    records: N records.Prompt, which hold the `meta` of each prompt.

  Raises:
    UserError: the function did not return a finite float for each response.
  """
  returned = find_function(name, ROLE)(prompts, responses, records)
  try:  # arrays, tuples and generators are as good as lists
    values = [float(value) for value in returned]
  except (TypeError, ValueError):
    values = []
  expected = len(responses)
  if len(values) != expected or not all(map(math.isfinite, values)):
    shown = ' '.join(repr(returned).split())[:80]
    raise UserError(f'{ROLE} {name!r}: expected {expected} finite floats, got {shown}')
  return values
