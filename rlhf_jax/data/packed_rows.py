"""Rows that pack what they say in a way of their own, turned into rows of ordinary fields.

Some data sets write lists as JSON in a text, or put the fields into an object.
Each line of PACKINGS is one such data set; shapes.py reads the ordinary fields
that come out. Data sets whose rows are no records by themselves are refused here
by name.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
from typing import Any

from rlhf_jax.errors import UserError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Packing:
  """A way in which rows pack what they say.

  Attributes:
    fields: of the row, all of which must be there with a value.
    types: of the values of these fields, by which the packing is told from an ordinary row.
    unpack: (row, place) → the row in ordinary fields.
  """

  fields: tuple[str, ...]
  types: tuple[type | tuple[type, ...], ...]
  unpack: Callable[[Row, str], Row]


def unpack_row(row: Row, place: str) -> Row:
  """Returns a row in ordinary fields; one that is not packed is returned as it is.

  Args:
    row: the fields of a row.
    place: what error messages call the place, such as 'file:line'.

  Raises:
    UserError: a packed field is damaged, or the rows of this data set are no records.
  """
  for packing in PACKINGS:
    values = [row.get(field) for field in packing.fields]
    if all(map(isinstance, values, packing.types)):
      return packing.unpack(row, place)
  return row


def _unpack_input(row: Row, place: str) -> Row:
  """Takes the fields out of the object `input` (OpenAI's preference fine-tuning)."""
  del place
  return {**row, **row['input'], 'input': None}


def _unpack_battle(row: Row, place: str) -> Row:
  """Unpacks a battle of the Chatbot Arena whose turns are lists in JSON (55k, at Kaggle).

  The prompts and each model's responses are lists of texts, one a turn; which
  model won is said by three numbers, of which one is 1.
  """
  prompts = _parse_texts(row, 'prompt', place)
  conversations = {}
  for side in ('a', 'b'):
    field = f'response_{side}'
    responses = _parse_texts(row, field, place)
    if len(responses) != len(prompts):
      raise UserError(f'{place}: fields "prompt" and "{field}": expected lists of one length')
    conversations[f'conversation_{side}'] = [
      {'role': role, 'content': content}
      for turn in zip(prompts, responses)
      for role, content in zip(('user', 'assistant'), turn)
    ]
  winners = {'model_a': 'winner_model_a', 'model_b': 'winner_model_b', 'tie': 'winner_tie'}
  chosen = [name for name, field in winners.items() if row[field] == 1]
  if len(chosen) != 1 or any(row[field] not in (0, 1) for field in winners.values()):
    names = ', '.join(f'"{field}"' for field in winners.values())
    raise UserError(f'{place}: fields {names}: expected 1 in one of them and 0 in the others')
  packed = ('prompt', 'response_a', 'response_b', *winners.values())
  rest = {key: value for key, value in row.items() if key not in packed}
  return {**rest, **conversations, 'winner': chosen[0]}


def _unpack_calls(row: Row, place: str) -> Row:
  """Unpacks a question that is answered by calls of functions, in JSON (xLAM)."""
  calls = _parse_list(row, 'answers', place)
  for call in calls:
    if not isinstance(call, dict) or not isinstance(call.get('name'), str):
      raise UserError(f'{place}: field "answers": expected calls with a "name", got {call!r:.60}')
  message = {
    'role': 'assistant',
    'content': None,
    'tool_calls': [{'type': 'function', 'function': call} for call in calls],
  }
  tools = _parse_list(row, 'tools', place) if isinstance(row['tools'], str) else row['tools']
  # The form of OpenAI, which chat templates read; here only the function stands.
  tools = [tool if 'function' in tool else {'type': 'function', 'function': tool} for tool in tools]
  return {**row, 'answers': None, 'tools': tools, 'response': message}


def _refuse_tree(row: Row, place: str) -> Row:
  """Refuses single messages of a tree of conversations (OpenAssistant)."""
  del row
  raise UserError(
    f'{place}: a row is one message of a tree ("message_id", "parent_id"); expected a whole '
    'conversation a row: join them in a function of yours, source="module:function"'
  )


def _refuse_transcript(row: Row, place: str) -> Row:
  """Refuses transcripts with calls that are not JSON (Glaive)."""
  del row
  raise UserError(
    f'{place}: field "chat": a transcript of "USER:" and "ASSISTANT:" turns is not read; expected '
    '"messages": convert it in a function of yours, source="module:function"'
  )


PACKINGS = (
  Packing(('input',), (dict,), _unpack_input),
  Packing(
    ('prompt', 'response_a', 'response_b', 'winner_model_a', 'winner_model_b', 'winner_tie'),
    (str, str, str, int, int, int),
    _unpack_battle,
  ),
  Packing(('query', 'answers', 'tools'), (str, str, (str, list)), _unpack_calls),
  Packing(('message_id', 'message_tree_id', 'text', 'role'), (str,) * 4, _refuse_tree),
  Packing(('chat', 'system'), (str, str), _refuse_transcript),
)


def _parse_list(row: Row, field: str, place: str) -> list[Any]:
  """Returns the list that a field holds as JSON."""
  try:
    items = json.loads(row[field])
  except ValueError as error:
    raise UserError(f'{place}: field "{field}": not JSON: {error}') from None
  if not isinstance(items, list) or not items:
    raise UserError(f'{place}: field "{field}": expected a list in JSON, got {row[field]!r:.60}')
  return items


def _parse_texts(row: Row, field: str, place: str) -> list[str]:
  """Returns the texts that a field holds as JSON."""
  items = _parse_list(row, field, place)
  for item in items:
    if not isinstance(item, str):
      raise UserError(f'{place}: field "{field}": expected texts, got {item!r:.60}')
  return items
