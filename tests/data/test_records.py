import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.data import records
from rlhf_jax.errors import UserError

SHARED = Path(__file__).resolve().parents[2] / '..' / 'shared' / 'data'
ASKED = [{'role': 'user', 'content': 'Why?'}]


def test_what_is_written_is_read(tmp_path):
  rows = [records.Ranking('1', 's', 'l', 'd', '', ASKED, ['a', 'b', 'ü'], [2, 1, 2])]
  for name in ('x.jsonl', 'x.jsonl.gz'):
    records.write_records(tmp_path / name, rows)
    assert records.read_records(tmp_path / name, 'ranking') == rows
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.jsonl', 'x.jsonl.gz']


def test_optional_fields_may_be_left_out_and_others_are_ignored(tmp_path):
  (tmp_path / 'x.jsonl').write_text('\n{"text": "a", "more": 1}\n')
  [row] = records.read_records(tmp_path / 'x.jsonl', 'document')
  assert row == records.Document(f'{tmp_path}/x.jsonl:2', '', '', 'a')


def test_a_single_response_is_good_or_bad():
  rated = dict(messages=ASKED, response='a', desirable=False)
  expected = records.Ranking('f:1', '', '', '', '', ASKED, ['a'], [2])
  assert records.parse_record('ranking', rated, 'f:1') == expected
  assert records.parse_record('ranking', {**rated, 'desirable': True}, 'f:1').ranks == [1]
  with pytest.raises(UserError, match='f:1: field "desirable": expected true or false, got 2'):
    records.parse_record('ranking', {**rated, 'desirable': 2}, 'f:1')


def test_null_is_as_good_as_absent():
  row = records.parse_record(
    'ranking', {**GOOD, 'id': None, 'source': None, 'context': None}, 'f:1'
  )
  assert (row.id, row.source, row.context) == ('f:1', '', '')
  with pytest.raises(UserError, match='a document needs the field "text"'):
    records.parse_record('document', {'text': None}, 'f:1')


def test_a_lone_surrogate_survives_and_a_byte_order_mark_is_dropped(tmp_path):
  (tmp_path / 'x.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "a\\ud83d"}\r\n')
  rows = records.read_records(tmp_path / 'x.jsonl', 'document')
  records.write_records(tmp_path / 'y.jsonl.gz', rows)
  again = records.read_records(tmp_path / 'y.jsonl.gz', 'document')
  assert [row.text for row in rows] == ['a\ud83d']
  assert [row.text for row in again] == ['a\ud83d']


def test_preferences_are_rankings_of_two(tmp_path):
  fields = {'messages': ASKED, 'chosen': 'good', 'rejected': 'bad'}
  (tmp_path / 'x.jsonl').write_text(json.dumps(fields) + '\n')
  [row] = records.read_records(tmp_path / 'x.jsonl', 'ranking')
  assert (row.responses, row.ranks) == (['good', 'bad'], [1, 2])


def test_a_ranking_serves_as_a_demonstration_of_its_best_response(tmp_path):
  ranking = records.Ranking('1', 's', 'l', 'd', 'Read.', ASKED, ['a', 'b', 'c'], [3, 1, 1])
  records.write_records(tmp_path / 'x.jsonl', [ranking])
  messages = [{'role': 'user', 'content': 'Read.\n\nWhy?'}]
  [row] = records.read_records(tmp_path / 'x.jsonl', 'demonstration')
  assert row == records.Demonstration('1', 's', 'l', messages, 'b')


def test_an_exercise_serves_as_demonstration_and_as_prompt():
  line = {'id': '1', 'question': 'Why?', 'answer': 'So: 1 + 1 = 2 #### 2', 'final': '2'}
  expected = records.Demonstration('1', '', '', ASKED, line['answer'])
  assert records.parse_record('demonstration', line, 'f:1') == expected
  meta = {'answer': line['answer'], 'final': '2'}  # whatever a reward may want
  expected = records.Prompt('1', '', '', ASKED, meta)
  assert records.parse_record('prompt', line, 'f:1') == expected
  assert records.parse_record('prompt', {'question': 'Why?'}, 'f:1').meta == {}


def test_context_stands_before_the_last_message():
  turns = [{'role': 'assistant', 'content': 'Hi'}, {'role': 'user', 'content': 'Who?'}]
  row = records.Ranking('', '', '', '', 'Ann is here.', turns, ['a', 'b'], [1, 2])
  last = {'role': 'user', 'content': 'Ann is here.\n\nWho?'}
  assert records.conversation(row) == [turns[0], last]


def test_labels_may_be_numbers_and_a_confidence_a_whole_number():
  row = records.parse_record('ranking', {**GOOD, 'id': 7, 'domain': 3, 'confidence': 1}, 'f:1')
  assert (row.id, row.domain, row.confidence) == ('7', '3', 1.0)
  assert type(row.confidence) is float


def test_dicts_are_written_too_and_the_folder_is_made(tmp_path):
  path = tmp_path / 'new' / 'x.jsonl'
  records.write_records(path, [{'text': 'ü'}])
  assert path.read_bytes() == '{"text": "ü"}\n'.encode()


def test_nothing_is_left_of_a_file_that_could_not_be_written_whole(tmp_path):
  records.write_records(tmp_path / 'x.jsonl', [{'text': 'before'}])
  with pytest.raises(TypeError):
    records.write_records(tmp_path / 'x.jsonl', [{'text': 'after'}, {'text': object()}])
  assert [path.name for path in tmp_path.iterdir()] == ['x.jsonl']
  assert [row.text for row in records.read_records(tmp_path / 'x.jsonl', 'document')] == ['before']


GOOD = {'messages': ASKED, 'responses': ['a', 'b'], 'ranks': [1, 2]}


@pytest.mark.parametrize(
  'kind,line,message',
  [
    ('document', '{"text": ', 'x.jsonl:1: not JSON'),
    ('document', '["text"]', 'x.jsonl:1: expected a JSON object, got list'),
    (
      'document',
      '{"body": "a"}',
      'x.jsonl:1: a document needs the field "text"; got the fields body',
    ),
    ('document', '{"text": 3}', 'x.jsonl:1: field "text": expected a text, got 3'),
    ('prompt', '{"messages": "Why?"}', 'field "messages": expected a list'),
    ('prompt', '{"messages": []}', 'expected at least one message'),
    (
      'prompt',
      '{"messages": [{"role": "user"}]}',
      'message 1 needs the texts "role" and "content"',
    ),
    (
      'ranking',
      json.dumps({**GOOD, 'messages': [*ASKED, {'role': 'assistant', 'content': 'So.'}]}),
      'message 2: expected the user or a tool to speak last',
    ),
    (
      'prompt',
      json.dumps({'messages': [{'role': 'narrator', 'content': 'It rained.'}, *ASKED]}),
      "message 1: expected a role among system, developer, user, assistant, tool, got 'narrator'",
    ),
    (
      'ranking',
      json.dumps({**GOOD, 'ranks': [1]}),
      'field "ranks": expected 2 whole numbers from 1 (best), got [1]',
    ),
    ('ranking', json.dumps({**GOOD, 'ranks': [0, 1.5]}), 'field "ranks"'),
    ('ranking', json.dumps({**GOOD, 'ranks': [True, 2]}), 'field "ranks"'),
    ('ranking', '[1]', 'x.jsonl:1: expected a JSON object, got list'),
    ('ranking', json.dumps({**GOOD, 'confidence': 1.5}), 'expected a probability, got 1.5'),
    ('ranking', json.dumps({**GOOD, 'confidence': 'high'}), "expected a number, got 'high'"),
    ('ranking', json.dumps({**GOOD, 'confidence': True}), 'expected a number, got True'),
    ('demonstration', '["text"]', 'x.jsonl:1: expected a JSON object, got list'),
    ('demonstration', '{}', 'a demonstration needs the field "messages"; got the fields none'),
    (
      'demonstration',
      json.dumps({'messages': ASKED, 'response': 'a', 'desirable': False}),
      'x.jsonl:1: expected a demonstration, got a response that is rated bad',
    ),
    ('prompt', '{"messages": ["Why?"]}', 'message 1 needs the texts "role" and "content"'),
    ('prompt', json.dumps({'messages': ASKED, 'meta': [1]}), 'expected an object, got [1]'),
    (
      'ranking',
      json.dumps({**GOOD, 'responses': ['a']}),
      'field "responses": expected two or more texts',
    ),
  ],
)
def test_mistakes_name_file_line_and_field(tmp_path, kind, line, message):
  (tmp_path / 'x.jsonl').write_text(line + '\n')
  with pytest.raises(UserError) as error:
    records.read_records(tmp_path / 'x.jsonl', kind)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_line_that_is_not_utf8_is_named_by_its_number(tmp_path):
  (tmp_path / 'x.jsonl').write_bytes(
    b'{"text": "a"}\n' * 3 + b'{"text": "\xe9"}\n' + b'{"text": "a"}\n'
  )
  with pytest.raises(UserError, match="x.jsonl:4: not JSON: 'utf-8' codec"):
    records.read_records(tmp_path / 'x.jsonl', 'document')


def test_bytes_damaged_in_the_middle_of_a_gz_are_an_error_of_one_line(tmp_path):
  text = ''.join(json.dumps({'text': f'{i * 7919 % 10007}'}) + '\n' for i in range(500))
  whole = gzip.compress(text.encode())
  for seed in range(20):  # some break the compression, some only the text
    rng = np.random.default_rng(seed)
    start = int(rng.integers(20, len(whole) - 90))
    (tmp_path / 'x.jsonl.gz').write_bytes(whole[:start] + rng.bytes(64) + whole[start + 64 :])
    with pytest.raises(UserError, match='^[^\n]*x.jsonl.gz:[0-9]+: [^\n]*$'):
      records.read_records(tmp_path / 'x.jsonl.gz', 'document')


def test_files_that_cannot_be_read_are_named(tmp_path):
  whole = gzip.compress(b'{"text": "a"}\n' * 1000)
  (tmp_path / 'x.jsonl.gz').write_bytes(whole[: len(whole) // 2])
  for name in ('x.jsonl.gz', 'absent.jsonl'):
    with pytest.raises(UserError, match=f'{name}:.* cannot read'):
      records.read_records(tmp_path / name, 'document')


@pytest.mark.skipif(not SHARED.is_dir(), reason='the shared data are not here')
@pytest.mark.parametrize(
  'name,kind,train,validation',
  [
    ('pretrain', 'document', 2214, 249),
    ('sft', 'demonstration', 2831, 211),
    ('preferences', 'preference', 7639, 973),
    ('preferences', 'ranking', 7639, 973),
    ('rankings', 'ranking', 698, 91),
    ('prompts', 'prompt', 1421, 214),
  ],
)
def test_shared_data_are_read_whole(name, kind, train, validation):
  counts = [
    len(records.read_records(SHARED / f'{name}.{split}.jsonl.gz', kind))
    for split in ('train', 'validation')
  ]
  assert counts == [train, validation]
