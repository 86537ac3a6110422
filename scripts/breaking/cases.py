"""A case: one malformed or damaged input, and what is to happen with it."""

from collections.abc import Callable, Iterator
import dataclasses
import json
from pathlib import Path
import random
from typing import Any

WRONG = (None, -1, 0, 2.5, 10**40, float('nan'), True, '', 'x', [], ['x'], {}, {'x': 1})


@dataclasses.dataclass(frozen=True)
class Case:
  """One input.

  Attributes:
    group: the row of the table.
    name: what is wrong with it.
    run: gets an empty folder, makes the input there and reads it as a user's command would.
    place: what the error must name, such as a file or a key.
    refuse: whether it must be refused; otherwise it may also be read, if it is read rightly.
    seconds: the limit of CPU time.
  """

  group: str
  name: str
  run: Callable[[Path], Any]
  place: str = ''
  refuse: bool = True
  seconds: float = 20.0


def truncations(data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
  """Yields beginnings of a file: none of it, and parts at even distances."""
  for number in range(count):
    size = len(data) * number // count
    yield f'first {size} of {len(data)} bytes', data[:size]


def flips(data: bytes, count: int, until: int = 0, seed: int = 0) -> Iterator[tuple[str, bytes]]:
  """Yields copies of a file in which one byte is another, among the first `until` bytes."""
  rng = random.Random(seed)
  for _ in range(count):
    place = rng.randrange(min(until or len(data), len(data)))
    value = data[place] ^ rng.randrange(1, 256)
    yield f'byte {place} is {value}', data[:place] + bytes([value]) + data[place + 1 :]


def odd_files() -> Iterator[tuple[str, bytes]]:
  """Yields contents that are no JSON object, whatever is expected."""
  yield 'empty', b''
  yield 'blank', b' \n\n'
  yield 'zeros', bytes(300)
  yield 'not UTF-8', b'{"a": "\xff\xfe"}'
  yield 'UTF-16', '{"a": 1}'.encode('utf-16')
  yield 'a list', b'[1, 2]'
  yield 'a number', b'7'
  yield 'a text', b'"x"'
  yield 'null', b'null'
  yield 'deep', b'{"a":' * 100_000
  yield 'deep lists', b'[' * 100_000
  yield 'a huge number', b'{"a": ' + b'9' * 10_000 + b'}'
  yield 'gzip, cut', b'\x1f\x8b\x08\x00abc'
  yield 'an escape sequence', b'\x1b[31m{'
  yield 'a page', b'<html><body>404</body></html>'


def changed_values(values: dict, prefix: str = '') -> Iterator[tuple[str, Any, dict]]:
  """Yields (key, new value or Ellipsis where it is left out, the object with that change)."""
  for key, value in values.items():
    name = f'{prefix}{key}'
    for wrong in WRONG:
      if json.dumps(wrong) != json.dumps(value):
        yield name, wrong, {**values, key: wrong}
    yield name, ..., {other: item for other, item in values.items() if other != key}
    if isinstance(value, dict):
      for inner, wrong, changed in changed_values(value, f'{name}.'):
        yield inner, wrong, {**values, key: changed}


def is_other_type(value: Any, wrong: Any) -> bool:
  """Tells whether a value is of a type that can never stand for another value's."""
  containers = (list, dict)
  if wrong is None or wrong is ...:
    return False
  return isinstance(value, containers) != isinstance(wrong, containers)


def find_value(values: dict, name: str) -> Any:
  """Returns the value of a dotted key."""
  for key in name.split('.'):
    values = values[key]
  return values
