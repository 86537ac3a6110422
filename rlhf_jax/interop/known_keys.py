"""Which keys of other people's files are known here, and the refusal of those that are not.

Each format, and each family within `config.json`, has one `KnownKeys` table; `check_keys` is the
only function that compares a file with it. A key that changes what a model computes must stand
in a table: either it is read, or its only accepted values are listed.
"""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class KnownKeys:
  """The keys of one format or family.

  Attributes:
    read: keys whose values are used.
    only: key → the values that mean what is computed here, the usual one first. Every other value
      is refused; an absent key is accepted.
    ignored: keys that do not change what a model computes.
    refuse_others: whether a key in none of these tables is refused. Where it is False, the
      format carries many keys (about training, generation, bookkeeping) that are passed over.
    advice: ends the message about an unknown key, from '; ' on.
  """

  read: Collection[str] = ()
  only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  ignored: Collection[str] = ()
  refuse_others: bool = False
  advice: str = ''

  def __contains__(self, key: str) -> bool:
    return key in self.read or key in self.only or key in self.ignored


def check_keys(values: Mapping[str, Any], known: KnownKeys, where: str, prefix: str = '') -> None:
  """Refuses, by name, a value that is not computed here and a key that is not known.

  Args:
    values: the parsed file.
    known: the table of its format.
    where: what errors call the file.
    prefix: what stands before each key in the file, for errors.

  Raises:
    UserError: the first key that is refused, its value and what was expected.
  """
  for key, accepted in known.only.items():
    if values.get(key, accepted[0]) not in accepted:
      raise UserError(f'{where}: {prefix}{key} is {values[key]!r}, expected {accepted[0]!r}')
  if not known.refuse_others:
    return
  for key, value in values.items():
    if key not in known:
      raise UserError(f'{where}: {prefix}{key} is {value!r}, expected no such key{known.advice}')
