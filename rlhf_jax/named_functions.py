"""Finds Python functions that a config names, such as 'my_rewards:polite(most=20)'.

Rewards and judges may be such functions. Worker processes import this module, so
it must not import anything that is slow to import, such as JAX.
"""

import ast
from collections.abc import Callable
import functools
import importlib
import os
import sys
from typing import Any

from rlhf_jax.errors import UserError


def is_function_name(name: str) -> bool:
  """Tells whether a name has the form 'module:function'.

  A web address has a colon too, so callers must check for addresses first.
  """
  return ':' in name


def find_function(name: str, role: str = 'function') -> Callable[..., Any]:
  """Returns the function that a name refers to, with its keyword arguments bound.

  The module may also be a file in the current directory.

  Args:
    name: 'module:function', or 'module:function(option=value, …)' with Python literals as
      values.
    role: what the function is used for, such as 'reward' or 'judge', for error messages.

  Raises:
    UserError: the name has another form, or there is no such function.
  """
  module_name, _, call = name.partition(':')
  function_name = call.partition('(')[0]
  options = _parse_options(name, call, role)
  if os.getcwd() not in sys.path:
    # `python -m` has it in sys.path already; an installed command and workers do not.
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty module name
    raise UserError(f'{role} {name!r}: {error}') from None
  if not callable(function):
    raise UserError(f'{role} {name!r}: expected a function, got {type(function).__name__}')
  if not options:
    return function  # not wrapped, so that it keeps its name
  return functools.partial(function, **options)


def _parse_options(name: str, call: str, role: str) -> dict[str, Any]:
  """Returns the keyword arguments in 'function(option=value, …)', or {} without parentheses."""
  if '(' not in call:
    return {}
  try:
    parsed = ast.parse(call, mode='eval').body
    if not isinstance(parsed, ast.Call):
      raise ValueError('not a call')
    if parsed.args:
      raise ValueError('options must be given by name')
    options = {}
    for keyword in parsed.keywords:
      if keyword.arg is None:  # **options
        raise ValueError('options must be given by name')
      options[keyword.arg] = ast.literal_eval(keyword.value)
  except (SyntaxError, ValueError) as error:
    expected = 'expected module:function(option=value, …)'
    raise UserError(f'{role} {name!r}: {expected}: {error}') from None
  return options
