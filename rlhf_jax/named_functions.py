"""Finds Python functions that a config names, such as 'my_rewards:polite(most=20)'.

Rewards and judges may be such functions. Worker processes import this module, so
it must not import anything that is slow to import, such as JAX.
"""

import ast
from collections.abc import Callable, Sequence
import functools
import importlib
import inspect
import os
import sys
import traceback
import types
from typing import Any

from rlhf_jax import plain_text
from rlhf_jax.errors import UserError


def is_function_name(name: str) -> bool:
  """Tells whether a name has the form 'module:function'.

  A web address has a colon too, so callers must check for addresses first.
  """
  return ':' in name


def find_function(name: str, role: str, arguments: Sequence[str]) -> Callable[..., Any]:
  """Returns the function that a name refers to, with its keyword arguments bound.

  The module may also be a file in the current directory.

  Args:
    name: 'module:function', or 'module:function(option=value, …)' with Python literals as
      values.
    role: what the function is used for, such as 'reward' or 'judge', for error messages.
    arguments: what it is called with, in this order, for the error message.

  Raises:
    UserError: the name has another form, there is no such function, or it cannot be called
      with these arguments and options.
  """
  module_name, _, call = name.partition(':')
  function_name = call.partition('(')[0]
  options = _parse_options(name, call, role)
  if os.getcwd() not in sys.path:
    # `python -m` has it in sys.path already; an installed command and workers do not.
    sys.path.insert(0, os.getcwd())
  where = f'{role} {name!r}'
  module = _import_module(module_name, where)
  function = getattr(module, function_name, None)
  if not callable(function):
    got = f'{function_name!r} is {function!r:.40}' if hasattr(module, function_name) else 'none'
    raise UserError(f'{where}: expected a function of the module {module_name!r}, got {got}')
  _check_call(function, arguments, options, where)
  if not options:
    return function  # not wrapped, so that it keeps its name
  return functools.partial(function, **options)


def _import_module(name: str, where: str) -> types.ModuleType:
  """Imports a user's module, which may fail in any way."""
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise UserError(f'{where}: {error}; looked in {os.getcwd()} too') from None
  except (Exception, SystemExit) as error:
    # The last line of a traceback is the place; of a syntax error the message has it.
    frames = traceback.extract_tb(error.__traceback__)
    file, line = frames[-1].filename, frames[-1].lineno
    place = '' if 'importlib' in file else f'{file}:{line}: '
    raise UserError(f'{where}: {place}{plain_text.describe_error(error)}') from None


def _check_call(
  function: Callable[..., Any], arguments: Sequence[str], options: dict[str, Any], where: str
) -> None:
  """Raises UserError unless a function takes these arguments and options."""
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return  # written in C, which does not always say what it takes
  try:
    signature.bind(*arguments, **options)
  except TypeError as error:
    call = ', '.join([*arguments, *(f'{key}={value!r}' for key, value in options.items())])
    raise UserError(
      f'{where}: expected a function that can be called with ({call}), got one of '
      f'({", ".join(signature.parameters)}): {error}'
    ) from None


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
