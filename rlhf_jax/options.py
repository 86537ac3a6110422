"""Converts between the sections of a config and typed options, which are frozen dataclasses.

Every part of the package declares its settings as a frozen dataclass, with a default and a comment
for each field:

  @dataclasses.dataclass(frozen=True)
  class SamplingOptions:
    temperature: float = 1.0  # 0 = greedy

The defaults of the class are the defaults of the config. A stage converts its
section into options once; the code that it calls sees only options. A field may
hold other options, or be an open table (a `dict` whose keys the user chooses).

The annotation of a number says its range: `steps: Count = 1000`. NaN and infinity are in no range.
A class can say which of its settings are not read, by a method `unread`:

  def unread(self) -> dict[str, str]:  # setting → when it has no effect
    return {'kl_horizon': 'kl_target is 0'} if not self.kl_target else {}
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import types
from typing import Annotated, Any, get_args, get_origin, get_type_hints, TypeVar

from rlhf_jax.errors import UserError

Options = TypeVar('Options')


@dataclasses.dataclass(frozen=True)
class Range:
  """The values that a number may have; None = no bound on that side."""

  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None

  def holds(self, value: Any) -> bool:
    """Says whether a number is in the range; NaN and infinity never are."""
    return (
      math.isfinite(value)
      and (self.least is None or value >= self.least)
      and (self.most is None or value <= self.most)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
    )

  def __str__(self) -> str:
    bounds = {
      'from': self.least,
      'above': self.above,
      'at most': self.most,
      'below': self.below,
    }
    parts = [f'{word} {bound:g}' for word, bound in bounds.items() if bound is not None]
    return 'a number ' + ' and '.join(parts) if parts else 'a finite number'


# The ranges of most settings, to annotate fields with.
Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, below=2**31)]
Number = Annotated[float, Range()]
NonNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
PositiveShare = Annotated[float, Range(above=0, most=1)]
ShareBelowOne = Annotated[float, Range(least=0, below=1)]
ShareBelowHalf = Annotated[float, Range(least=0, below=0.5)]
AxisSize = Annotated[int, Range(least=-1)]  # -1 = what is left
OwnSeed = Annotated[int, Range(least=-1, below=2**31)]  # -1 = the seed of the run
Numbers = Annotated[tuple, Range()]
Weights = Annotated[tuple, Range(least=0)]
Shares = Annotated[tuple, Range(least=0, most=1)]


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

  Keys that are not fields of the class are skipped, as other classes may read
  them (the section of a stage also has its `kind`). Unknown keys were refused
  when the config was loaded.

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


def find_mistakes(options: Any, usual: Any, where: str) -> list[str]:
  """Finds numbers out of their ranges, and settings that are given but not read.

  Args:
    options: typed options, from `from_section`.
    usual: the options with their default values, of the same class.
    where: the name of the section, for the messages.

  Returns:
    A message for each mistake.
  """
  mistakes = []
  unread = options.unread() if hasattr(options, 'unread') else {}
  hints = get_type_hints(type(options), include_extras=True)
  for field in dataclasses.fields(options):
    name = f'{where}.{field.name}'
    value = getattr(options, field.name)
    default = getattr(usual, field.name)
    if not field.metadata.get('in_config', True):
      continue
    if field.name in unread and _differs(value, default):
      mistakes.append(f'{name}: it has no effect, as {unread[field.name]}; leave it out')
    elif dataclasses.is_dataclass(value) and type(value) is type(default):
      mistakes += find_mistakes(value, default, name)
    else:
      mistakes += _check_elements(value, hints[field.name], name)
      mistakes += _check_range(value, hints[field.name], name)
  return mistakes


def check_ranges(options: Any, where: str) -> None:
  """Refuses typed options of which a number is not in its range.

  Args:
    options: of any origin, such as flags; the numbers of a config have been checked.
    where: the name of the section, for the message.

  Raises:
    UserError: it names the first such number.
  """
  for mistake in find_out_of_range(options):
    raise UserError(f'{where}.{mistake}')


def find_out_of_range(options: Any) -> Iterator[str]:
  """Yields a message that begins with the field for each number of typed options out of range."""
  hints = get_type_hints(type(options), include_extras=True)
  for field in dataclasses.fields(options):
    yield from _check_range(getattr(options, field.name), hints[field.name], field.name)


def _check_elements(value: Any, hint: Any, name: str) -> Iterator[str]:
  """Yields a message for each element of a list or open table that is not of its type."""
  table = _is_table(value)
  if not table and not isinstance(value, tuple):
    return
  expected = _element_type(hint)
  if expected is None:
    return
  places = value.items() if table else enumerate(value)
  for place, element in places:
    # An int may stand where a float does; type() rather than isinstance, as True is an int.
    if type(element) is not expected and (expected, type(element)) != (float, int):
      yield (
        f'{name}: expected {expected.__name__} for each element, got '
        f'{type(element).__name__} {element!r} {"as" if table else "at"} {place!r}'
      )


def _element_type(hint: Any) -> type | None:
  """Returns the type of the elements of a tuple or open table; None where it may be any."""
  arguments = get_args(hint)
  if get_origin(hint) is Annotated:  # Numbers and the like, which have a range
    return float if arguments[0] is tuple else _element_type(arguments[0])
  if get_origin(hint) is tuple:
    element = arguments[0]
  elif get_origin(hint) is dict:
    element = arguments[1]
  else:
    return None
  return element if element in (str, int, float, bool) else None


def _check_range(value: Any, hint: Any, name: str) -> Iterator[str]:
  """Yields a message for each number of a field that is not in the field's range."""
  numbers = value if isinstance(value, tuple) else (value,)
  allowed = next((part for part in get_args(hint) if isinstance(part, Range)), Range())
  for number in numbers:
    # type() rather than isinstance, as True is an int.
    if type(number) in (int, float) and not allowed.holds(number):
      yield f'{name}: expected {allowed}, got {number}'


def _differs(value: Any, default: Any) -> bool:
  """Says whether a setting was changed; a section, whether any of its settings was."""
  if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(default):
    return as_dict(value) != as_dict(default)
  return value != default


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
