"""Converts between the sections of a config and typed options, which are frozen dataclasses.

Every part of the package declares its settings as a frozen dataclass, with a default and a comment
for each field:

  @dataclasses.dataclass(frozen=True)
  class SamplingOptions:
    temperature: float = 1.0  # 0 = greedy

The defaults of the class are the defaults of the config. A stage converts its section into options
once; the code that it calls sees only options. A field may hold other options, or be an open table
(a `dict` whose keys the user chooses).
"""

from collections.abc import Mapping
import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints, TypeVar

Options = TypeVar('Options')


def defaults(options_class: type) -> dict[str, Any]:
  """Returns the defaults of an options class as nested dicts, from which a config can be made."""
  return as_dict(options_class())


def as_dict(options: Any) -> dict[str, Any]:
  """Returns options as nested dicts; open tables are copied."""
  values = {}
  for field in dataclasses.fields(options):
    if not field.metadata.get('in_config', True):
      continue  # set by the stage, not by a config
    value = getattr(options, field.name)
    if dataclasses.is_dataclass(value):
      value = as_dict(value)
    elif isinstance(value, Mapping):
      value = dict(value)
    values[field.name] = value
  return values


def from_section(options_class: type[Options], section: Mapping[str, Any]) -> Options:
  """Makes typed options from a section of a config.

  Keys that are not fields of the class are skipped, as other classes may read them (the
  section of a stage also has its `kind`). Unknown keys were refused when the config was
  loaded.

  Args:
    options_class: a dataclass, whose fields may be dataclasses too.
    section: a nested mapping such as a ConfigDict. Fields that it does not have keep
      their defaults.
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
  """Converts nested mappings of any type into nested dicts."""
  if _is_table(value):
    return {name: _to_plain(item) for name, item in value.items()}
  return value


def _is_table(value: Any) -> bool:
  """Tells whether a value is a mapping; a ConfigDict counts, though it is not a Mapping."""
  return hasattr(value, 'items')


def _find_options_class(hint: Any) -> type | None:
  """Returns the options class X of a field annotated X or X | None; None for other annotations."""
  candidates = (hint,)
  if get_origin(hint) is types.UnionType:
    candidates = get_args(hint)
  for candidate in candidates:
    if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
      return candidate
  return None
