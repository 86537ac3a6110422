"""Finding a program by its name and calling it. Worker processes import this: nothing heavy here."""

import ast
import functools
import importlib
import math
import os
import sys

from rlhf_jax.errors import UserError


def find_function(name: str):
  """The function 'module:function' names, with its options where it says some: 'module:function(most=20)'.

  Modules are found from the current directory too.

  Raises:
    UserError: no such function, or options that are not plain values by name.
  """
  module, _, said = name.partition(':')
  function, open_bracket, _ = said.partition('(')
  options = {}
  if open_bracket:
    try:
      call = ast.parse(said, mode='eval').body
      if call.args or not all(keyword.arg for keyword in call.keywords):
        raise ValueError('options are given by name')
      options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (AttributeError, SyntaxError, ValueError) as error:
      raise UserError(f'reward {name!r}: expected module:function(option=value, …): {error}') from None
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise UserError(f'reward {name!r}: {error}') from None
  return functools.partial(found, **options) if options else found


def call_function(name: str, prompts, responses, rows) -> list[float]:
  """What the program gives for each response.

  Raises:
    UserError: something else than a finite float for each.
  """
  given = find_function(name)(prompts, responses, rows)
  try:
    values = [float(value) for value in given]
  except (TypeError, ValueError):
    values = []
  if len(values) != len(responses) or not all(map(math.isfinite, values)):
    said = ' '.join(repr(given).split())[:80]
    raise UserError(f'reward {name!r}: expected {len(responses)} finite floats, got {said}')
  return values
