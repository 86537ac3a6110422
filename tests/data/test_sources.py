import os
from pathlib import Path
import subprocess
import sys

import ml_collections
import pytest

from rlhf_jax import options as options_lib
from rlhf_jax.data import records, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError


def document(text):
  return records.Document(text, '', '', text)


def test_globs_splits_and_counts(tmp_path):
  records.write_records(tmp_path / 'a.train.jsonl', [document('1'), document('2')])
  records.write_records(tmp_path / 'b.train.jsonl.gz', [document('3')])
  records.write_records(tmp_path / 'a.validation.jsonl', [document('4')])

  def load(split, **more):
    options = DataOptions(source='jsonl', path=(f'{tmp_path}/*.{{split}}.jsonl*',), **more)
    return [row.text for row in sources.load_records(options, 'document', split)]

  assert load('train') == ['1', '2', '3']
  assert load('validation') == ['4']
  assert load('train', count=2) == ['1', '2']


def test_a_file_that_exists_is_no_glob(tmp_path):
  records.write_records(tmp_path / 'a[1].jsonl', [document('1')])
  options = DataOptions(source='jsonl', path=(f'{tmp_path}/a[1].jsonl',))
  assert len(sources.load_records(options, 'document', 'train')) == 1


def test_a_section_of_a_config_serves_as_options():
  defaults = options_lib.defaults(DataOptions)
  section = ml_collections.ConfigDict({**defaults, 'path': ['x'], 'fields': {'a': 'b'}})
  options = options_lib.from_section(DataOptions, section)
  assert options.fields == {'a': 'b'} and type(options.fields) is dict
  assert options.splits == {'train': 'train', 'validation': 'validation'}
  assert options_lib.from_section(DataOptions, defaults) == DataOptions()


def test_a_new_source_is_a_function_and_a_row(monkeypatch):
  def read_numbers(options, kind, split):
    return [document(f'{kind} {split} {options.seed + i}') for i in range(3)]

  monkeypatch.setitem(sources.SOURCES, 'numbers', read_numbers)
  rows = sources.load_records(DataOptions(source='numbers', seed=5, count=2), 'document', 'train')
  assert [row.text for row in rows] == ['document train 5', 'document train 6']


def test_rankings_and_preferences_share_a_data_set(tmp_path):
  asked = [{'role': 'user', 'content': 'Why?'}]
  records.write_records(
    tmp_path / 'x.jsonl',
    [
      records.Ranking('r', '', '', '', '', asked, ['a', 'b', 'c'], [2, 1, 1]),
      records.Preference('p', '', '', '', asked, 'good', 'bad'),
    ],
  )
  options = DataOptions(source='jsonl', path=(f'{tmp_path}/x.jsonl',))
  rows = sources.load_records(options, 'ranking', 'train')
  assert [(row.id, row.responses, row.ranks) for row in rows] == [
    ('r', ['a', 'b', 'c'], [2, 1, 1]),
    ('p', ['good', 'bad'], [1, 2]),
  ]


@pytest.mark.parametrize(
  'settings,message',
  [
    (dict(path=('x.jsonl',)), 'which data.source = "tinyworld" does not read; expected'),
    (dict(source='jsonl'), 'data.path: expected a file or a glob'),
    (dict(source='jsonl', path=('nowhere/*.jsonl',)), 'data.path: nowhere/*.jsonl: no such file'),
    (
      dict(source='web'),
      "data.source: expected one of jsonl, tfds, tinyworld, or 'module:function', got 'web'",
    ),
    (dict(source='tfds', path=()), 'data.path: expected one TFDS name or directory'),
    (dict(count=-1), 'data.count: expected a number from 0, got -1'),
    (dict(seed=-2), 'data.seed: expected a number from -1 and below 2.14748e+09, got -2'),
    (
      dict(path=('tfds:x',), fields=dict(contxt='passage')),
      "data.fields: no record has a field 'contxt'; expected",
    ),
    (dict(path=('tfds:no_such_data_set',)), "data.path: TFDS 'no_such_data_set'"),
  ],
)
def test_mistakes_are_named(settings, message):
  with pytest.raises(UserError) as error:
    sources.load_records(DataOptions(**settings), 'document', 'train')
  assert message in str(error.value) and '\n' not in str(error.value)


def test_an_empty_data_set_is_an_error(tmp_path):
  (tmp_path / 'x.jsonl').write_text('\n\n')
  with pytest.raises(UserError, match='holds no document for train'):
    options = DataOptions(source='jsonl', path=(f'{tmp_path}/x.jsonl',))
    sources.load_records(options, 'document', 'train')


def test_the_first_few_are_spread_over_all_sources():
  assert ''.join(sources.spread_evenly('aaaabbbbcc', 5)) == 'aabbc'
  assert sources.spread_evenly([1, 2], 5) == [1, 2]
  with pytest.raises(UserError, match='expected 1 or more, got 0'):
    sources.spread_evenly([1, 2], 0)


def test_tinyworld_is_the_default():
  rows = sources.load_records(DataOptions(count=5), 'demonstration', 'train')
  assert len(rows) == 5 and all(isinstance(row, records.Demonstration) for row in rows)


# In a process of its own: TFDS is slow to import, and what it imports is what the test is about.
TFDS = """
import functools
import sys
import numpy as np
import tensorflow_datasets as tfds
from rlhf_jax.data import records, sources
from rlhf_jax.errors import UserError

class Pairs(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    text = tfds.features.Text()
    turns = tfds.features.Sequence({'role': text, 'content': text})
    features = tfds.features.FeaturesDict({'turns': turns, 'better': text, 'rejected': text})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, manager):
    return {'train': self._generate_examples(3), 'test': self._generate_examples(1)}
  def _generate_examples(self, count):
    for i in range(count):
      turns = [{'role': 'user', 'content': f'Why {i}? \\u00fc'}]
      yield i, {'turns': turns, 'better': 'because', 'rejected': 'no'}

class Dialogues(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({'chosen': text, 'rejected': text})
    return tfds.core.DatasetInfo(builder=self, features=features)
  def _split_generators(self, manager):
    return {'train': self._generate_examples()}
  def _generate_examples(self):
    start = '\\n\\nHuman: Hi\\n\\nAssistant: Hello\\n\\nHuman: Why?\\n\\nAssistant:'
    yield 0, {'chosen': start + ' because', 'rejected': start + ' no'}

def load(builder, **settings):
  builder = builder(data_dir=sys.argv[1], file_format='array_record')
  builder.download_and_prepare()
  options = sources.DataOptions(path=('tfds:' + str(builder.data_path),), **settings)
  return functools.partial(sources.load_records, options, 'ranking')

fields = dict(messages='turns', chosen='better')
read = load(Pairs, fields=fields, splits=dict(train='train', validation='test'))
rows = list(read('train'))
texts = sorted(row.messages[0]['content'] for row in rows)
assert texts == [f'Why {i}? \\u00fc' for i in range(3)], rows
assert rows[0].responses == ['because', 'no'] and rows[0].ranks == [1, 2]
assert len(read('validation')) == 1
lazy = read('train')
assert lazy[-1] == rows[2] and lazy[1:] == rows[1:]
[row] = load(Dialogues)('train')
assert [turn['content'] for turn in row.messages] == ['Hi', 'Hello', 'Why?']
assert row.responses == ['because', 'no']
[preference] = sources.load_records(
    sources.DataOptions(path=('tfds:' + sys.argv[1] + '/dialogues/1.0.0',)), 'preference', 'train')
assert (preference.chosen, preference.rejected) == ('because', 'no')

def refused(message, name, chosen, rejected, **settings):
  def generate(self):
    yield 0, {'chosen': chosen, 'rejected': rejected}
  try:
    builder = type(name, (Dialogues,), {'_generate_examples': generate})
    list(load(builder, **settings)('train'))
  except UserError as error:
    assert message in str(error) and '\\n' not in str(error), error
  else:
    raise AssertionError('no error')

asked = '\\n\\nHuman: Hi\\n\\nAssistant: Hello'
refused('[0]: field "chosen": a pair without "messages" or "prompt"', 'Bare', 'Hi', 'Hello')
another = '\\n\\nHuman: Ho\\n\\nAssistant: Hello'
refused('differ in the last response only', 'Asked', asked, another)
refused('differ in the last response only', 'Unanswered', asked, asked + '\\n\\nHuman: Why?')
refused('[0]: not UTF-8', 'Latin', b'\\xe9', asked)
fields = dict(context='passage')
absent = "has no field 'passage'; got the fields chosen, rejected"
refused(absent, 'Typed', asked, asked, fields=fields)
assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules
"""


def test_tfds_without_tensorflow(tmp_path):
  (tmp_path / 'write_and_read.py').write_text(TFDS)
  done = subprocess.run(
    [sys.executable, str(tmp_path / 'write_and_read.py'), str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, 'PYTHONPATH': str(Path(__file__).resolve().parents[2])},
  )
  assert done.returncode == 0, done.stderr[-2000:]


def test_the_halves_of_the_training_records(tmp_path):
  path = tmp_path / 'all.jsonl'
  records.write_records(path, [document(str(number)) for number in range(5)])

  def load(half, split='train'):
    options = DataOptions(source='jsonl', path=(str(path),), half=half, count=4)
    return [int(row.text) for row in sources.load_records(options, 'document', split)]

  assert (load('even'), load('odd')) == ([0, 2], [1, 3])
  assert load('odd', 'validation') == [0, 1, 2, 3]  # held out from both
  with pytest.raises(UserError, match='data.half: expected even, odd'):
    load('third')


def test_a_share_of_a_file_without_splits_is_held_out(tmp_path):
  path = tmp_path / 'all.jsonl'
  records.write_records(path, [document(str(number)) for number in range(40)])

  def load(split, **more):
    options = DataOptions(source='jsonl', path=(str(path),), hold_out=0.1, **more)
    return [int(row.text) for row in sources.load_records(options, 'document', split)]

  train, held_out = load('train', seed=3), load('validation', seed=3)
  assert len(held_out) == 4 and sorted(train + held_out) == list(range(40))
  assert train == sorted(train) and held_out == sorted(held_out)
  assert load('validation', seed=3) == held_out != load('validation', seed=4)
  with pytest.raises(UserError, match='data.hold_out: it makes the splits train and validation'):
    load('test')
