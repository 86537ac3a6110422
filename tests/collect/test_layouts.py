"""Other tools' files: what is written can be read again, and what is none is refused by place."""

import json

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


def test_the_order_is_that_of_each_tool():
  (studio,) = layouts.write_rows([ROW], 'label_studio')
  order = studio['annotations'][0]['result'][0]['value']['ranker']['rank']
  assert order == ['response-2', 'response-1', 'response-3']  # the best first; it has no ties
  (argilla,) = layouts.write_rows([ROW], 'argilla')
  value = argilla['responses'][0]['values']['ranking']['value']
  assert [each['rank'] for each in value] == [2, 1, 2]


@pytest.mark.parametrize('text', ['{"data": 1}', '{}', 'no json', '[1]', '{"data": {"text": "q"}'])
def test_files_that_are_none(tmp_path, text):
  path = tmp_path / 'file.json'
  path.write_text(text)
  with pytest.raises(UserError, match='file.json'):
    layouts.read_items(path, 'label_studio')
