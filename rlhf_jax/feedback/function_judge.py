"""Judges that are Python functions.

  def judge(comparisons: list[Comparison]) -> list[float]

The function gets the comparisons (see judging.py) and returns, for each of
them, the probability that the first response is better; NaN means no verdict. A
config names it as 'module:function', or with keyword arguments as
'module:function(option=value)'.
"""

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging
from rlhf_jax.named_functions import find_function


def build_function_judge(name: str) -> judging.Judge:
  """Builds a judge that is a Python function.

  Args:
    name: 'module:function' or 'module:function(option=value, …)'.

  Returns:
    The judge. It raises a UserError when the function fails, or when it returns
    anything other than a probability or NaN for each comparison.

  Raises:
    UserError: there is no such function.
  """
  function = find_function(name, 'judge', ('comparisons',))
  return functools.partial(_judge, name, function)


def _judge(
  name: str, function: Any, comparisons: Sequence[judging.Comparison]
) -> judging.Judgements:
  """Calls the function and checks what it returns."""
  count = len(comparisons)
  try:
    returned = function(list(comparisons))
  except Exception as error:  # the user's function may raise anything
    details = ' '.join(str(error).split())[:120]
    raise UserError(f'judge {name!r}: {type(error).__name__}: {details}') from error
  probabilities = _as_probabilities(returned, count)
  if probabilities is None:
    shown = ' '.join(repr(returned).split())[:80]
    expected = f'expected {count} probabilities from 0 to 1, or NaN for no verdict'
    raise UserError(f'judge {name!r}: {expected}, got {shown}')
  return judging.Judgements(probabilities, [''] * count)


def _as_probabilities(returned: Any, count: int) -> np.ndarray | None:
  """Returns the probabilities, [N] float64; None where they are not N probabilities or NaN."""
  try:
    values = np.array([float(value) for value in returned], np.float64)
  except (TypeError, ValueError):
    return None
  is_probability = (values >= 0) & (values <= 1)
  if len(values) != count or not (is_probability | np.isnan(values)).all():
    return None
  return values
