"""One reader and one writer of JSON Lines: whatever the writer writes, the reader reads."""

import gzip
import json
import tracemalloc

import pytest

from rlhf_jax import json_lines
from rlhf_jax.errors import UserError

# Line separators of Unicode and of ASCII, half a surrogate pair, what JSON itself escapes.
ODD = 'a\u2028b\u2029c\u0085d\x0be\x1cf\rg\nh\ud83di"\\\x00ü💡'


def read(path):
  return list(json_lines.read_values(path))


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.gz'])
def test_what_is_written_is_read(tmp_path, name):
  values = [{'text': ODD, ODD: [ODD, 1.5, None]}, {}, {'text': ''}]
  json_lines.write_values(tmp_path / name, values)
  assert [value for _, value in read(tmp_path / name)] == values


def test_what_is_written_has_one_line_for_every_reader():
  line = json_lines.format_value({'text': ODD})
  assert len(line.splitlines()) == 1
  assert 'ü💡' in line and json.loads(line.encode('utf-8')) == {'text': ODD}


def test_lines_of_other_writers(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(
    b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "x\xe2\x80\xa8y\xc2\x85z"}\n{"a": "\\ud83d"}'
  )
  assert read(path) == [
    (f'{path}:1', {'a': 1}),
    (f'{path}:4', {'a': 'x\u2028y\x85z'}),
    (f'{path}:5', {'a': '\ud83d'}),
  ]


def test_gzip_is_known_by_its_contents(tmp_path):
  (tmp_path / 'packed.jsonl').write_bytes(gzip.compress(b'{"a": 1}\n'))
  (tmp_path / 'plain.jsonl.gz').write_bytes(b'{"a": 1}\n')
  for name in ('packed.jsonl', 'plain.jsonl.gz'):
    assert [value for _, value in read(tmp_path / name)] == [{'a': 1}]


@pytest.mark.parametrize(
  'data, message',
  [
    (b'{"a": 1}\n{"a": \n', ':2: not JSON: '),
    (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not JSON: 'utf-8' codec"),
    (b'{"a": 1}\n\x00\x00\x00', ':2: not JSON: '),
    (b'{"a": 1}\n' + b'[' * 100_000, ':2: not JSON: '),
    (b'{"a": 1}\n' + b'[' * 500 + b']' * 500, ':2: expected at most 100 objects and lists'),
    (b'{"a": 1' + b'0' * 5000 + b'}', ':1: not JSON: '),
    # Without the time, so that all processes that run tests name them alike.
    (gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], 'cannot read: '),
    (gzip.compress(b'{"a": 1}\n', mtime=0)[:-1] + b'x', 'cannot read: '),
    (b'\xff\xfe{\x00}\x00', ': expected JSON Lines, got a file that is text in UTF-16'),
    (b'\x28\xb5\x2f\xfd' + b'x' * 9, 'is compressed by zstd'),
    (b'PK\x03\x04' + b'x' * 9, 'is a ZIP archive'),
  ],
)
def test_damage_is_named_in_a_line(tmp_path, data, message):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(data)
  with pytest.raises(UserError) as error:
    read(path)
  assert str(error.value).startswith(str(path)) and message in str(error.value)
  assert '\n' not in str(error.value) and len(str(error.value)) < 300


def test_a_file_that_is_not_there_is_named(tmp_path):
  for path in (tmp_path / 'absent.jsonl', tmp_path):
    with pytest.raises(UserError, match=f'^{path}: cannot read: '):
      read(path)


def test_an_archive_that_explodes_is_refused_before_it_fills_the_memory(tmp_path):
  """A line of 300 MiB, in 300 KB."""
  path = tmp_path / 'x.jsonl'
  path.write_bytes(gzip.compress(bytes(2**20)) * 300)  # gzip's members follow one another
  tracemalloc.start()
  with pytest.raises(UserError, match=rf'^{path}: cannot read: it expands more than 250 times'):
    read(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 2**28
