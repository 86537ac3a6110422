"""Finds Python functions that a config names, such as 'my_rewards:polite(most=20)'.

Rewards and judges may be such functions. Worker processes import this module, so
nothing heavy may be imported here.
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

  Web addresses have a colon too: whoever knows them too asks for them first.
  """
  return ':' in name


def find_function(name: str, role: str = 'function') -> Callable[..., Any]:
  """Returns the function that a name refers to, with its options bound.

  Modules are looked up from the current directory too.

  Args:
    name: 'module:function', or 'module:function(option=value, …)' with plain
      Python values.
    role: what the function is used as, 'reward' or 'judge', for error messages.

  Raises:
    UserError: the name does not have this form, or refers to no function.
  """
  module_name, _, call = name.partition(':')
  function_name = call.partition('(')[0]
  options = _parse_options(name, call, role)
  if os.getcwd() not in sys.path:
    # `python -m rlhf_jax` puts it there, the installed command and workers do not.
    sys.path.insert(0, os.getcwd())
  try:
    function = getattr(importlib.import_module(module_name), function_name)
  except (
    ImportError,
    AttributeError,
    ValueError,
  ) as error:  # ValueError: no module name
    raise UserError(f'{role} {name!r}: {error}') from None
  if not callable(function):
    raise UserError(f'{role} {name!r}: expected a function, got {type(function).__name__}')
  if not options:
    return function  # itself, so that its name shows in tracebacks
  return functools.partial(function, **options)


def _parse_options(name: str, call: str, role: str) -> dict[str, Any]:
  """Returns the options in 'function(option=value, …)'; none without brackets."""
  if '(' not in call:
    return {}
  try:
    parsed = ast.parse(call, mode='eval').body
    if not isinstance(parsed, ast.Call):
      raise ValueError('not a call')
    if parsed.args:
      raise ValueError('options are given by name')
    options = {}
    for keyword in parsed.keywords:
      if keyword.arg is None:  # **options
        raise ValueError('options are given by name')
      options[keyword.arg] = ast.literal_eval(keyword.value)
  except (SyntaxError, ValueError) as error:
    expected = 'expected module:function(option=value, …)'
    raise UserError(f'{role} {name!r}: {expected}: {error}') from None
  return options
