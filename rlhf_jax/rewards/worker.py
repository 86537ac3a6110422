"""Calls of a reward function in a worker process.

Every worker process imports this module, so it must not import anything that is
slow to import, such as JAX.
"""

from collections.abc import Sequence
import contextlib
import math
import multiprocessing
import reprlib
import signal
import sys
from typing import Any

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.named_functions import find_function

ROLE = 'reward'  # how error messages call these functions
ARGUMENTS = ('prompts', 'responses', 'records')  # what they are called with


class FunctionError(Exception):
  """What a reward function raised, in plain words: its own error may be of any kind and size."""

  def __init__(self, kind: str, details: str):
    super().__init__(kind, details)  # both, so that it can be sent from a worker
    self.kind = kind
    self.details = details


def prepare(name: str) -> None:
  """Imports a reward function's module; runs once when a worker process starts."""
  if multiprocessing.parent_process() is not None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
    sys.stdout = sys.stderr  # what a function prints is no output of the command
  with contextlib.suppress(UserError):  # the first call raises it again, to whoever waits for it
    find_function(name, ROLE, ARGUMENTS)


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
    FunctionError: it raised an error, or wanted to end the process.
  """
  function = find_function(name, ROLE, ARGUMENTS)
  try:
    returned = function(prompts, responses, records)
  except BaseException as error:  # SystemExit and the like are errors of the function too
    is_ours = multiprocessing.parent_process() is None and isinstance(error, KeyboardInterrupt)
    if is_ours or isinstance(error, UserError):
      raise
    raise FunctionError(type(error).__name__, _details(error)) from None
  try:  # arrays, tuples and generators are accepted too
    values = [float(value) for value in returned]
  except (TypeError, ValueError, OverflowError):
    values = []
  expected = len(responses)
  if len(values) != expected or not all(map(math.isfinite, values)):
    shown = plain_text.one_line(reprlib.repr(returned))[:80]
    raise UserError(f'{ROLE} {name!r}: expected {expected} finite floats, got {shown}')
  return values


def _details(error: BaseException) -> str:
  """Returns the text of an error, as far as it has one."""
  try:
    return plain_text.one_line(str(error)[:10_000], 120)
  except Exception:  # of the error's own code
    return ''
