"""Typed options: what a section of a config becomes before anything below a stage reads it.

A room declares what can be set as a frozen dataclass, with a default and a comment per
field:

  @dataclasses.dataclass(frozen=True)
  class SamplingOptions:
    temperature: float = 1.0  # 0 = greedy

Its defaults are the defaults of the config, and a section is turned into it once.
Options may hold other options; a field that is an open table (name → value) is a
`dict`.
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints, TypeVar

Options = TypeVar('Options')


def defaults(options_class: type) -> dict[str, Any]:
  """Returns the defaults of an options class as nested dicts, as a config holds them."""
  return as_dict(options_class())


def as_dict(options: Any) -> dict[str, Any]:
  """Returns options as nested dicts; open tables are copied."""
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
  """Makes typed options from a section of a config.

  Keys that the class does not have are skipped, as other classes read them: the section
  of a stage also holds its `kind`. Unknown keys were refused when the config was
  loaded.

  Args:
    options_class: a dataclass, whose fields may be dataclasses too.
    section: a nested mapping such as a ConfigDict. Fields it lacks keep their defaults.
  """
  hints = get_type_hints(options_class)  # annotations may be strings
  values = {}
  for field in dataclasses.fields(options_class):  # type: ignore[arg-type]
    if field.name not in section:
      continue
    value = section[field.name]
    nested = _find_options_class(hints[field.name])
    if nested is not None and _is_table(value):
      value = from_section(nested, value)
    elif _is_table(value):
      value = _to_plain(value)
    values[field.name] = value
  return options_class(**values)


def _to_plain(value: Any) -> Any:
  """Returns a table as nested dicts, whatever kinds of mappings it is made of."""
  if _is_table(value):
    return {name: _to_plain(item) for name, item in value.items()}
  return value


def _is_table(value: Any) -> bool:
  """Returns whether a value is a nested section; a ConfigDict is one, though it is no Mapping."""
  return hasattr(value, 'items')


def _find_options_class(hint: Any) -> type | None:
  """Returns the options class in a field's annotation X or X | None; None where it has none."""
  candidates = (hint,)
  if get_origin(hint) is types.UnionType:
    candidates = get_args(hint)
  for candidate in candidates:
    if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
      return candidate
  return None
