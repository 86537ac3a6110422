"""Tables of the keys that files of other libraries may have, and the check of a file's keys.

Each format, and each family within `config.json`, has one `KnownKeys` table.
`check_keys` is the only function that compares a file with a table. A known key
is of one of three kinds: it is read, and its value must satisfy an `Allowed`; or
only certain values of it are supported; or it is ignored, because it does not
change what a model computes. Any other key is refused, unless its value is null.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import functools
import math
from typing import Any

from rlhf_jax.errors import UserError

SHOWN = 80  # characters of a value that an error shows


@dataclasses.dataclass(frozen=True)
class Allowed:
  """The values that a key may have."""

  description: str  # the words after 'expected' in an error
  accepts: Callable[[Any], bool]


def whole_number(least: int, most: int = 2**31 - 1) -> Allowed:
  """Allows whole numbers from `least` to `most`; true and false are not numbers."""
  return Allowed(f'a whole number from {least}', functools.partial(_is_whole, least, most))


def one_of(*choices: str) -> Allowed:
  """Allows these texts only."""
  return Allowed('one of ' + ', '.join(choices), functools.partial(_is_choice, choices))


def or_null(allowed: Allowed) -> Allowed:
  """Allows null in addition to other values."""
  return Allowed(f'{allowed.description} or null', functools.partial(_is_null_or, allowed))


def list_of(allowed: Allowed) -> Allowed:
  """Allows lists of allowed values."""
  return Allowed(f'a list of {allowed.description}', functools.partial(_is_list_of, allowed))


def _is_whole(least: int, most: int, value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
  """Tells whether a value is a finite number; Python's JSON reader accepts NaN and Infinity."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _is_positive(value: Any) -> bool:
  return _is_number(value) and value > 0


def _is_fraction(value: Any) -> bool:
  return _is_positive(value) and value <= 1


def _is_switch(value: Any) -> bool:
  return isinstance(value, bool)


def _is_text(value: Any) -> bool:
  return isinstance(value, str)


def _is_table(value: Any) -> bool:
  return isinstance(value, Mapping)


def _is_choice(choices: tuple[str, ...], value: Any) -> bool:
  return isinstance(value, str) and value in choices


def _is_null_or(allowed: Allowed, value: Any) -> bool:
  return value is None or allowed.accepts(value)


def _is_list_of(allowed: Allowed, value: Any) -> bool:
  return isinstance(value, list) and all(map(allowed.accepts, value))


COUNT = whole_number(1)
NUMBER = Allowed('a finite number', _is_number)
POSITIVE = Allowed('a number above 0', _is_positive)
FRACTION = Allowed('a number above 0 and at most 1', _is_fraction)
SWITCH = Allowed('true or false', _is_switch)
TEXT = Allowed('a text', _is_text)
TABLE = Allowed('a table', _is_table)


@dataclasses.dataclass(frozen=True)
class KnownKeys:
  """The keys of one format or family.

  Attributes:
    read: the keys whose values are used: key → the values that it may have.
    only: the keys of which only some values are supported: key → these values, the usual one
      first. Any other value is refused; an absent key is accepted.
    ignored: the keys that do not change what a model computes.
    refuse_others: whether a key that is in none of these tables is refused,
      unless its value is null. False for formats in which such keys contain
      descriptions and statistics.
    advice: the end of the message about an unknown key, such as '; remove it'.
  """

  read: Mapping[str, Allowed] = dataclasses.field(default_factory=dict)
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  ignored: Collection[str] = ()
  refuse_others: bool = True
  advice: str = ''

  def __contains__(self, key: str) -> bool:
    return key in self.read or key in self.only or key in self.ignored


def check_keys(values: Mapping[str, Any], known: KnownKeys, where: str, prefix: str = '') -> None:
  """Checks the keys and values of a file against the table of its format.

  Args:
    values: the parsed file.
    known: the table of its format.
    where: the name of the file in error messages.
    prefix: the beginning of each key in the file, for error messages.

  Raises:
    UserError: a key is unknown, or a value is not supported. The message names the first such
      key, its value and what was expected.
  """
  for key, value in values.items():
    name = f'{where}: {prefix}{key}'
    if key in known.only:
      if not _is_among(value, known.only[key]):
        raise UserError(f'{name} is {show(value)}, expected {known.only[key][0]!r}')
    elif key in known.read:
      allowed = known.read[key]
      if not allowed.accepts(value):
        raise UserError(f'{name} is {show(value)}, expected {allowed.description}')
    elif known.refuse_others and key not in known.ignored and value is not None:
      raise UserError(f'{name} is {show(value)}, expected no such key{known.advice}')


def _is_among(value: Any, accepted: tuple[Any, ...]) -> bool:
  """Tells whether a value is among the accepted ones, where true is not 1 and false is not 0."""
  return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted)


def show(value: Any) -> str:
  """Formats a value for an error message, and cuts off a long one."""
  text = repr(value)
  return text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'
