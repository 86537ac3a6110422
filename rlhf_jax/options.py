"""Typed options: what a section of a config becomes before anything below a stage reads it.

A room declares what can be set as a frozen dataclass, a default and a comment for each field:

  @dataclasses.dataclass(frozen=True)
  class SamplingOptions:
    temperature: float = 1.0  # 0 = greedy

Its defaults are the defaults of the config, and a section is made into it once. Options may hold
other options; a field that is an open table (name → value) is a `dict`.
"""

import dataclasses
import types
from typing import Any, Mapping, TypeVar, get_args, get_origin, get_type_hints

Options = TypeVar('Options')


def defaults(options_class: type) -> dict[str, Any]:
  """Gives the defaults of an options class as nested dicts, as a config holds them."""
  return as_dict(options_class())


def as_dict(options: Any) -> dict[str, Any]:
  """Gives options as nested dicts; open tables are copied."""
  values = {}
  for field in dataclasses.fields(options):
    if not field.metadata.get('in_config', True):
      continue  # made by the stage, not given by a config
    value = getattr(options, field.name)
    if dataclasses.is_dataclass(value):
      value = as_dict(value)
    elif isinstance(value, Mapping):
      value = dict(value)
    values[field.name] = value
  return values


def from_section(options_class: type[Options], section: Mapping[str, Any]) -> Options:
  """Makes typed options of a section, a nested mapping such as a ConfigDict.

  Keys that the class does not have are left to whoever does: the section of a stage also holds
  its `kind`. Unknown keys were refused when the config was loaded.
  """
  hints = get_type_hints(options_class)
  values = {}
  for field in dataclasses.fields(options_class):
    if field.name not in section:
      continue
    value = section[field.name]
    nested = _options_class(hints[field.name])
    if nested is not None and _is_table(value):
      value = from_section(nested, value)
    elif _is_table(value):
      value = dict(value.items())
    values[field.name] = value
  return options_class(**values)


def _is_table(value: Any) -> bool:
  """Whether a value is a nested section; a ConfigDict is one, though it is no Mapping."""
  return hasattr(value, 'items')


def _options_class(hint: Any) -> type | None:
  """Gives the options class that a field's annotation names, X or X | None; None for others."""
  if get_origin(hint) is types.UnionType:
    candidates = [argument for argument in get_args(hint) if argument is not types.NoneType]
  else:
    candidates = [hint]
  classes = [candidate for candidate in candidates if dataclasses.is_dataclass(candidate)]
  return classes[0] if classes else None
