"""Conversion from and to the file layouts of other annotation tools.

Items are read from these layouts, and rankings are written in them:

label_studio: a JSON list of tasks {data, annotations}. A ranking uses the
  Ranker tag, whose `rank` lists the ids of the items, the best first. The tag
  has no ties: responses of equal rank are listed one after the other. An
  annotation has no `completed_by`, because Label Studio imports no names but
  those of its own users; the person is in `meta`.
argilla: a JSON list of records {fields, responses, metadata}, as
  `Dataset.records.to_json` of Argilla 2 writes it. A ranking is the answer to a
  ranking question, whose value is a list of {value, rank}. The ids of users are
  UUIDs, which are computed from the pseudonyms.
potato: JSON Lines, or a JSON list, of instances {id, text}. A ranking is what
  the JSONL export of Potato 2 has: {instance_id, user_id, labels}, where the
  scheme `ranking` stores one text, the names of the responses with commas
  between them, the best first. It has no ties either.
"""

import json
from pathlib import Path
from typing import Any
import uuid

from rlhf_jax import files, json_lines
from rlhf_jax.errors import UserError

Fields = dict[str, Any]

_USERS = uuid.uuid5(uuid.NAMESPACE_URL, 'rlhf_jax.collect')  # namespace of Argilla's user ids

LAYOUTS = ('jsonl', 'label_studio', 'argilla', 'potato')


def read_items(path: Path, layout: str) -> list[Fields]:
  """Reads a file and returns the fields of each item, as `items.item_from_fields` takes them.

  Args:
    path: the file.
    layout: one of LAYOUTS.

  Raises:
    UserError: the file cannot be read, or does not follow the layout.
  """
  rows = _read_rows(path)
  if layout == 'jsonl':
    return rows
  read = {'label_studio': _from_label_studio, 'argilla': _from_argilla, 'potato': _from_potato}
  converted = []
  for number, row in enumerate(rows, start=1):
    try:
      converted.append(read[layout](row))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
      raise UserError(
        f'{path}:{number}: not an item in the layout {layout}: {type(error).__name__}: {error}'
      ) from None
  return converted


def write_rows(rows: list[Fields], layout: str) -> list[Fields]:
  """Converts exported rankings to the layout of another tool.

  Args:
    rows: the rankings, from `export.export_rankings`.
    layout: one of LAYOUTS other than jsonl.

  Raises:
    UserError: a row is not a ranking.
  """
  write = {'label_studio': _to_label_studio, 'argilla': _to_argilla, 'potato': _to_potato}
  for number, row in enumerate(rows, start=1):
    if 'ranks' not in row:
      raise UserError(f'--format: record {number} is not a ranking; {layout} needs --kind=rankings')
  converted = [write[layout](row) for row in rows]
  if layout == 'label_studio':
    for number, task in enumerate(converted, start=1):
      task['id'] = number  # Label Studio's ids are whole numbers
  return converted


def _read_rows(path: Path) -> list[Fields]:
  """Reads a JSON list of objects, or JSON Lines with one object a line."""
  try:
    with files.open_bytes(path) as file:
      text = file.read().decode('utf-8-sig')
    if text.lstrip().startswith('['):
      rows = json.loads(text)
    else:  # not splitlines(): it also splits at U+2028 and others, which JSON strings may hold
      rows = [json.loads(line) for line in text.split('\n') if line.strip()]
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path}: cannot read: {error}') from None
  for number, row in enumerate(rows, start=1):
    if not isinstance(row, dict):
      raise UserError(f'{path}:{number}: expected a JSON object, got {type(row).__name__}')
    json_lines.check_depth(row, f'{path}:{number}')
  return rows


def _as_messages(value: Any) -> list[Fields]:
  """Returns a list of messages: the value itself, or a text as one message of the user."""
  if isinstance(value, str):
    return [{'role': 'user', 'content': value}]
  return value


def _from_label_studio(row: Fields) -> Fields:
  """Converts a task of Label Studio to the fields of an item."""
  data = row['data']
  prompt = data.get('messages') or data.get('prompt') or data['text']
  responses = data.get('responses')
  if responses is None:
    responses = [item.get('body') or item.get('html') for item in data.get('items', [])]
  identifier = (row.get('meta') or {}).get('id', row.get('id'))
  return _item(identifier, prompt, responses)


def _from_argilla(row: Fields) -> Fields:
  """Converts a record of Argilla to the fields of an item.

  Its responses are the fields whose names begin with 'response' or
  'completion'.
  """
  fields = row['fields']
  names = [name for name in fields if name.startswith(('response', 'completion'))]
  prompt = fields.get('messages') or fields.get('prompt') or fields['instruction']
  return _item(row.get('id'), prompt, [fields[name] for name in names])


def _from_potato(row: Fields) -> Fields:
  """Converts an instance of Potato to the fields of an item.

  A list in `text` holds the responses where there is also a prompt.
  """
  text = row['text']
  prompt = row.get('messages') or row.get('prompt')
  if isinstance(text, list) and prompt:
    return _item(row['id'], prompt, text)
  return _item(row['id'], prompt or text, row.get('responses') or [])


def _item(identifier: Any, prompt: Any, responses: list[str]) -> Fields:
  """Returns the fields of an item; leaves out an absent id and an empty list of responses."""
  fields: Fields = {'messages': _as_messages(prompt)}
  if identifier is not None:
    fields['id'] = str(identifier)
  if responses:
    fields['responses'] = responses
  return fields


def _to_label_studio(row: Fields) -> Fields:
  """Writes a ranking as a task of Label Studio with one annotation."""
  entries = []
  for number, text in enumerate(row['responses'], start=1):
    entries.append({'id': f'response-{number}', 'title': f'{number}', 'body': text})
  result = {
    'id': 'ranking',
    'from_name': 'rank',
    'to_name': 'items',
    'type': 'ranker',
    'value': {'ranker': {'rank': _names_in_order(row)}},
  }
  return {
    'data': {'messages': row['messages'], 'items': entries, 'ranks': row['ranks']},
    'annotations': [{'result': [result]}],
    'meta': {'id': row['id'], 'source': row['source'], 'confidence': row['confidence']},
  }


def _to_argilla(row: Fields) -> Fields:
  """Writes a ranking as a record of Argilla with one response."""
  fields: Fields = {'messages': row['messages']}
  value = []
  for number, text in enumerate(row['responses'], start=1):
    fields[f'response-{number}'] = text
    value.append({'value': f'response-{number}', 'rank': row['ranks'][number - 1]})
  user = str(uuid.uuid5(_USERS, row['source']))
  return {
    'id': row['id'],
    'fields': fields,
    'responses': {'ranking': [{'value': value, 'user_id': user, 'status': 'submitted'}]},
    'suggestions': {},
    'metadata': {'source': row['source'], 'confidence': row['confidence']},
  }


def _to_potato(row: Fields) -> Fields:
  """Writes a ranking as an instance of Potato together with its annotation."""
  return {
    'id': row['id'],
    'messages': row['messages'],
    'text': row['responses'],
    'ranks': row['ranks'],
    'instance_id': row['id'],
    'user_id': row['source'],
    'labels': {'ranking': {'rank_order': ','.join(_names_in_order(row))}},
  }


def _names_in_order(row: Fields) -> list[str]:
  """Returns the names response-1, response-2 … of a ranking's responses, the best first."""
  order = sorted(range(len(row['ranks'])), key=row['ranks'].__getitem__)
  return [f'response-{number + 1}' for number in order]
