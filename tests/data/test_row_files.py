"""Files and folders in which data sets come."""

import gzip
import json

import pyarrow as pa
from pyarrow import parquet
import pytest

from rlhf_jax.data import records, row_files, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError

MESSAGES = [{'role': 'user', 'content': 'Where?'}, {'role': 'assistant', 'content': 'There.'}]
ROWS = [{'messages': MESSAGES, 'more': number} for number in range(3)]


def lines(rows):
  return ''.join(json.dumps(row) + '\n' for row in rows)


def write(path, rows=ROWS):
  """Writes rows in the form that the name says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pa.Table.from_pylist(rows)
  if path.suffix == '.parquet':
    parquet.write_table(table, path)
  elif path.suffix == '.arrow':  # a stream, as `datasets` writes them
    with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
      writer.write_table(table)
  else:
    path.write_text(lines(rows))
  return path


def rows_of(path):
  return [row for _, row in row_files.read_rows(path)]


@pytest.mark.parametrize('name', ['x.jsonl', 'x.parquet', 'x.arrow'])
def test_rows_are_the_same_in_every_form(tmp_path, name):
  path = write(tmp_path / name)
  assert rows_of(path) == ROWS
  last, _ = list(row_files.read_rows(path))[-1]
  assert last == (f'{path}:3' if name == 'x.jsonl' else f'{path}, row 3')


def test_an_arrow_file_that_is_no_stream(tmp_path):
  table = pa.Table.from_pylist(ROWS)
  path = tmp_path / 'x.feather'
  with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_file(file, table.schema) as writer:
    writer.write_table(table)
  assert rows_of(path) == ROWS


@pytest.mark.parametrize(
  'text, rows',
  [
    (json.dumps(ROWS), ROWS),
    (json.dumps(ROWS, indent=2), ROWS),
    ('\ufeff' + json.dumps(ROWS, indent=1), ROWS),
    (json.dumps({'version': 1, 'data': ROWS}, indent=2), ROWS),
    (json.dumps(ROWS[0], indent=2), ROWS[:1]),
    (json.dumps(ROWS[0]), ROWS[:1]),
    ('[]', []),
    ('', []),
    ('\n\n' + lines(ROWS), ROWS),
  ],
)
@pytest.mark.parametrize('compress', [False, True])
def test_json_of_one_value(tmp_path, text, rows, compress):
  path = tmp_path / 'x.json'
  data = text.encode()
  path.write_bytes(gzip.compress(data) if compress else data)
  assert rows_of(path) == rows


def test_values_that_json_has_not_become_ones_that_it_has(tmp_path):
  import datetime
  import decimal

  day = datetime.datetime(2024, 7, 26)
  path = write(tmp_path / 'x.parquet', [{'a': day, 'b': decimal.Decimal('1.5'), 'c': b'x'}])
  assert rows_of(path) == [{'a': '2024-07-26T00:00:00', 'b': 1.5, 'c': 'x'}]


@pytest.mark.parametrize(
  'name, data, message',
  [
    ('x.json', b'[{"a": 1},\n {"a": }]', 'x.json: not JSON: '),
    ('x.jsonl', b'{"a": \n{"a": 1}\n', 'x.jsonl:1: not JSON: '),
    ('x.parquet', b'PAR1 and no more', 'x.parquet: cannot read: '),
    ('x.arrow', b'ARROW1 and no more', 'x.arrow: cannot read: '),
    ('x.arrow', b'nothing', 'x.arrow: cannot read: '),
  ],
)
def test_damaged_files_are_named(tmp_path, name, data, message):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError) as error:
    rows_of(tmp_path / name)
  assert message in str(error.value) and '\n' not in str(error.value)


def load(path, split='train', **more):
  options = DataOptions(source='jsonl', path=(str(path),), **more)
  return len(sources.load_records(options, 'demonstration', split))


def test_a_mistake_in_a_row_names_it(tmp_path):
  path = write(tmp_path / 'x.parquet', [{'prompt': 'a', 'completion': 'b'}, {'prompt': 'c'}])
  with pytest.raises(UserError, match='x.parquet, row 2: a demonstration needs the field'):
    records.read_records(path, 'demonstration')


def test_what_save_to_disk_leaves(tmp_path):
  for split, count in (('train', 3), ('test', 1)):
    write(tmp_path / split / 'data-00000-of-00001.arrow', ROWS[:count])
    state = {'_data_files': [{'filename': 'data-00000-of-00001.arrow'}]}
    (tmp_path / split / 'state.json').write_text(json.dumps(state))
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  assert load(tmp_path) == load(tmp_path / 'train') == 3
  splits = dict(train='train', validation='test')
  assert load(tmp_path, 'validation', splits=splits) == 1
  with pytest.raises(
    UserError, match="no files of the split 'validation', got test, train; set data"
  ):
    load(tmp_path, 'validation')


def test_a_copy_of_a_data_set_of_the_hub(tmp_path):
  write(tmp_path / 'data' / 'train-00000-of-00002.parquet')
  write(tmp_path / 'data' / 'train-00001-of-00002.parquet')
  write(tmp_path / 'data' / 'test-00000-of-00001.parquet', ROWS[:1])
  write(tmp_path / '.cache' / 'train.jsonl')
  assert load(tmp_path) == 6
  assert load(tmp_path, 'validation', splits=dict(train='train', validation='test')) == 1
  (tmp_path / 'README.md').write_text(
    '---\nconfigs:\n- config_name: default\n  data_files:\n'
    '  - split: train\n    path: data/train-00000*\n---\n# A data set\n'
  )
  assert load(tmp_path) == 3
  text = (tmp_path / 'README.md').read_text()
  other = '- config_name: other\n  data_files:\n  - split: train\n    path: x\n---'
  (tmp_path / 'README.md').write_text(
    text.replace('default', 'one').replace('---\n#', other + '\n#')
  )
  with pytest.raises(UserError, match=r'got several \(one, other\)'):
    load(tmp_path)


def test_a_folder_of_files_without_splits_is_to_train_on(tmp_path):
  write(tmp_path / 'a.jsonl')
  write(tmp_path / 'b.parquet')
  assert load(tmp_path) == 6
  with pytest.raises(UserError, match="no files of the split 'validation', got files without"):
    load(tmp_path, 'validation')


def test_fields_are_renamed_in_every_source(tmp_path):
  path = write(tmp_path / 'x.jsonl', [{'ask': {'text': 'Where?'}, 'say': 'There.'}])
  options = DataOptions(
    source='jsonl', path=(str(path),), fields={'prompt': 'ask.text', 'completion': 'say'}
  )
  [row] = sources.load_records(options, 'demonstration', 'train')
  assert (row.messages, row.response) == (MESSAGES[:1], 'There.')


def test_the_shapes_are_said(tmp_path, capsys):
  write(tmp_path / 'x.jsonl', [*ROWS, {'prompt': 'a', 'completion': 'b'}])
  load(tmp_path / 'x.jsonl')
  assert capsys.readouterr().err.splitlines() == [
    f'{tmp_path}/x.jsonl: read as conversations that end with the response: 3',
    f'{tmp_path}/x.jsonl: read as prompts with the field completion: 1',
  ]


def test_a_source_may_be_a_function(tmp_path, monkeypatch):
  (tmp_path / 'my_source.py').write_text(
    'def rows(split, count=2):\n'
    '  for number in range(count):\n'
    "    yield {'prompt': f'{split} {number}', 'completion': 'b'}\n"
    'def text(split):\n'
    "  return 'no rows'\n"
  )
  monkeypatch.syspath_prepend(tmp_path)

  def read(source, **more):
    return sources.load_records(DataOptions(source=source, **more), 'demonstration', 'validation')

  rows = read('my_source:rows(count=3)')
  assert [row.messages[0]['content'] for row in rows] == [f'validation {i}' for i in range(3)]
  assert rows[2].place == 'my_source:rows(count=3), row 3'
  assert len(read('my_source:rows', fields={'response': 'prompt'})) == 2
  with pytest.raises(UserError, match='my_source:text: expected an iterable of dicts, got str'):
    read('my_source:text')
  with pytest.raises(UserError, match="data.source 'my_source:absent'"):
    read('my_source:absent')
