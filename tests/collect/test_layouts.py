"""Other tools' files: what is written can be read again, and what is none is refused by place."""

import json
import uuid

from people_client import ranking
import pytest

from rlhf_jax.collect import items, layouts
from rlhf_jax.errors import UserError

ROW = ranking(1, ['a', 'b', 'c'], ranks=[2, 1, 2], source='p-1', confidence=0.9)


@pytest.mark.parametrize('layout', ['label_studio', 'argilla', 'potato'])
def test_a_ranking_comes_back_as_an_item(tmp_path, layout):
  path = tmp_path / 'file.json'
  written = layouts.write_rows([ROW], layout)
  path.write_text(json.dumps(written))
  (fields,) = layouts.read_items(path, layout)
  item = items.item_from_fields(fields, 'file:1', '', 'items')
  assert [response['text'] for response in item.responses] == ['a', 'b', 'c']
  assert item.messages == ROW['messages'] and item.task == 'rank'
  assert item.record['id'] == 'q1'


def test_a_ranking_is_what_each_tool_stores():
  # as label_studio_sdk 2.1.2, argilla 2.8.0 and potato-annotation 2.12.1 read and write it
  (studio,) = layouts.write_rows([ROW], 'label_studio')
  (annotation,) = studio['annotations']
  assert studio['id'] == 1 and 'completed_by' not in annotation
  order = annotation['result'][0]['value']['ranker']['rank']
  assert order == ['response-2', 'response-1', 'response-3']  # the best first; it has no ties
  (argilla,) = layouts.write_rows([ROW], 'argilla')
  (response,) = argilla['responses']['ranking']
  assert [each['rank'] for each in response['value']] == [2, 1, 2]
  assert str(uuid.UUID(response['user_id'])) == response['user_id']
  (potato,) = layouts.write_rows([ROW], 'potato')
  assert potato['labels'] == {'ranking': {'rank_order': 'response-2,response-1,response-3'}}


@pytest.mark.parametrize('text', ['{"data": 1}', '{}', 'no json', '[1]', '{"data": {"text": "q"}'])
def test_files_that_are_none(tmp_path, text):
  path = tmp_path / 'file.json'
  path.write_text(text)
  with pytest.raises(UserError, match='file.json'):
    layouts.read_items(path, 'label_studio')
