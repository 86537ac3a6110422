"""Records, the raw data of every stage, and their files in JSON Lines (one object on each line).

A record is a document, a demonstration, a preference, a ranking or a prompt. Records hold text
only; tokens come later (data/encode.py).

A file may leave out `id`, `source` and `license`, or hold null there. The `messages` of a
conversation alternate between user and assistant, and the user speaks last. An exercise
{question, answer, final}, the form of GSM8K, can stand for a demonstration, and for a prompt
whose `meta` then holds `final`.
"""

from collections.abc import Iterable
import dataclasses
import json
import os
from typing import Any, TypeVar
import zlib

from rlhf_jax import files
from rlhf_jax.errors import UserError

Message = dict[str, str]  # {'role': 'user' or 'assistant', 'content': its text}


@dataclasses.dataclass(frozen=True)
class Document:
  """A text to pre-train on."""

  id: str
  source: str
  license: str
  text: str


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A conversation and the response a person would give."""

  id: str
  source: str
  license: str
  messages: list[Message]
  response: str


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two responses, of which a person chose one."""

  id: str
  source: str
  license: str
  domain: str
  messages: list[Message]
  chosen: str
  rejected: str
  confidence: float = 1.0  # the probability that the choice is right


@dataclasses.dataclass(frozen=True)
class Ranking:
  """K responses and how a person ordered them.

  A ranking of a single response says whether that response is good (rank 1) or bad (rank 2).
  """

  id: str
  source: str
  license: str
  domain: str
  context: str  # stands before the last message; may be empty
  messages: list[Message]
  responses: list[str]  # [K]
  ranks: list[int]  # [K], in the order of `responses`; 1 = best, equal = tie
  confidence: float = 1.0  # the probability that any pair of them is ordered rightly


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation that waits for a response."""

  id: str
  source: str
  license: str
  messages: list[Message]
  meta: dict[str, Any]  # whatever a reward or a judge needs to know


Record = Document | Demonstration | Preference | Ranking | Prompt

# Kind of record, as stages and sources name it → its class.
RECORD_TYPES: dict[str, type] = {
  'document': Document,
  'demonstration': Demonstration,
  'preference': Preference,
  'ranking': Ranking,
  'prompt': Prompt,
}

# What a field that a file leaves out is taken to be; `id` becomes the record's place instead.
_OPTIONAL = {
  'source': '',
  'license': '',
  'domain': '',
  'context': '',
  'meta': {},
  'confidence': 1.0,
}

# The types of the fields that are not texts.
_FIELD_TYPES = {
  'messages': list,
  'responses': list,
  'ranks': list,
  'meta': dict,
  'confidence': float,
}

# Labels, which may also be numbers in a file.
_LABELS = ('id', 'source', 'license', 'domain')

# What error messages call a type.
_TYPE_NAMES = {
  str: 'a text',
  list: 'a list',
  dict: 'an object',
  float: 'a number',
}

_AnyRecord = TypeVar('_AnyRecord', bound=Record)


def read_records(path: str | os.PathLike, kind: str) -> list[Any]:
  """Reads the records of a JSON Lines file; one whose name ends in `.gz` is decompressed.

  A file of rankings may hold preferences and rated single responses too (`parse_ranking`).
  A file of demonstrations may hold rankings, of which the best response counts.

  Args:
    path: the file.
    kind: a key of RECORD_TYPES.

  Returns:
    The records in the order of the file; empty lines are skipped.

  Raises:
    UserError: the file cannot be read, or a line holds no such record. Names file and line.
  """
  rows = []
  number = 0
  try:
    with files.open_bytes(path) as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          rows.append(_parse_line(line, kind, f'{path}:{number}'))
  except (OSError, EOFError, zlib.error) as error:
    # A damaged archive shows only when its bytes are read, in the middle of the file.
    raise UserError(f'{path}:{number + 1}: cannot read: {error}') from None
  return rows


def write_records(path: str | os.PathLike, rows: Iterable[Any]) -> None:
  """Writes records as JSON Lines, whole or not at all; `.gz` at the end of the name compresses.

  Args:
    path: the file; its folder is made where it is missing.
    rows: records of any kind, or dicts.
  """
  # Half a surrogate pair, which UTF-8 cannot hold, is written as its JSON escape (files.open_text).
  with files.replacing(path) as temporary, files.open_text(temporary, 'wt') as file:
    for row in rows:
      fields = row if isinstance(row, dict) else dataclasses.asdict(row)
      file.write(json.dumps(fields, ensure_ascii=False) + '\n')


def parse_record(kind: str, fields: Any, where: str) -> Any:
  """Makes a record of JSON fields; fields that the kind does not have are ignored.

  Args:
    kind: a key of RECORD_TYPES.
    fields: what the line holds; anything but an object is refused.
    where: what error messages call the place, such as 'file:line'.

  Returns:
    A record of the class RECORD_TYPES[kind].

  Raises:
    UserError: a field is missing or of another form.
  """
  return _parse_as(RECORD_TYPES[kind], fields, where)


def parse_ranking(fields: Any, where: str) -> Ranking:
  """Makes a ranking of JSON fields that are a ranking, a preference or a rated response.

  A preference (`chosen`, `rejected`) becomes a ranking of two. A single `response` that is
  `desirable`, true or false, becomes a ranking of one, with rank 1 or 2.

  Args:
    fields: what the line holds.
    where: what error messages call the place.

  Raises:
    UserError: as `parse_record`.
  """
  if not isinstance(fields, dict):
    return _parse_as(Ranking, fields, where)
  if 'chosen' in fields:
    return preference_to_ranking(_parse_as(Preference, fields, where))
  if 'desirable' in fields and 'responses' not in fields:
    return _rated_response(fields, where)
  return _parse_as(Ranking, fields, where)


def preference_to_ranking(preference: Preference) -> Ranking:
  """Gives a preference as a ranking of two responses, the chosen one first."""
  return Ranking(
    id=preference.id,
    source=preference.source,
    license=preference.license,
    domain=preference.domain,
    context='',
    messages=preference.messages,
    responses=[preference.chosen, preference.rejected],
    ranks=[1, 2],
    confidence=preference.confidence,
  )


def ranking_to_demonstration(ranking: Ranking) -> Demonstration:
  """Gives the best response of a ranking, the first of equals, as a demonstration."""
  best = ranking.ranks.index(min(ranking.ranks))
  return Demonstration(
    id=ranking.id,
    source=ranking.source,
    license=ranking.license,
    messages=conversation(ranking),
    response=ranking.responses[best],
  )


def conversation(record: Any) -> list[Message]:
  """Returns the messages of a record as every stage sees them.

  The context of a ranking, where it has one, stands before its last message.
  """
  context = getattr(record, 'context', '')
  if not context:
    return record.messages
  *earlier, last = record.messages
  content = f'{context}\n\n{last["content"]}'
  return [*earlier, {**last, 'content': content}]


def _parse_line(line: bytes, kind: str, where: str) -> Any:
  """Makes a record of one line of a file, in all forms that `read_records` accepts."""
  try:
    fields = json.loads(line.decode('utf-8-sig'))  # a byte order mark is no text
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where}: not JSON: {error}') from None
  if kind == 'ranking':
    return parse_ranking(fields, where)
  if kind == 'demonstration' and isinstance(fields, dict):
    if 'responses' in fields:
      return ranking_to_demonstration(_parse_as(Ranking, fields, where))
    if fields.get('desirable') is False:
      raise UserError(
        f'{where}: expected a demonstration, got a response that is rated bad (desirable: false)'
      )
  return parse_record(kind, fields, where)


def _parse_as(record_class: type[_AnyRecord], fields: Any, where: str) -> _AnyRecord:
  """Makes a record of a class of JSON fields, and checks what types alone cannot say."""
  if not isinstance(fields, dict):
    raise UserError(f'{where}: expected a JSON object, got {type(fields).__name__}')
  if isinstance(fields.get('question'), str) and 'messages' not in fields:
    fields = _exercise_fields(fields)
  values = {}
  for field in dataclasses.fields(record_class):
    values[field.name] = _field_value(field.name, record_class, fields, where)
  if 'messages' in values:
    _check_messages(values['messages'], where)
  if record_class is Ranking:
    _check_ranks(values['responses'], values['ranks'], where)
  confidence = values.get('confidence', 1.0)
  if not 0 <= confidence <= 1:
    raise UserError(f'{where}: field "confidence": expected a probability, got {confidence}')
  return record_class(**values)


def _exercise_fields(fields: dict[str, Any]) -> dict[str, Any]:
  """Gives an exercise {question, answer, final} (GSM8K) the fields of a conversation."""
  message = {'role': 'user', 'content': fields['question']}
  meta = {}
  if 'final' in fields:
    meta['final'] = fields['final']
  return {**fields, 'messages': [message], 'response': fields.get('answer'), 'meta': meta}


def _field_value(name: str, record_class: type, fields: dict[str, Any], where: str) -> Any:
  """Returns the value of one field, checked; null is as good as absent."""
  value = fields.get(name)
  if value is None:
    value = where if name == 'id' else _OPTIONAL.get(name)
  if value is None:
    kind = record_class.__name__.lower()
    present = ', '.join(sorted(fields)) or 'none'
    raise UserError(f'{where}: a {kind} needs the field "{name}"; got the fields {present}')
  if name in _LABELS:
    return str(value)
  expected = _FIELD_TYPES.get(name, str)
  if expected is float and type(value) is int:  # isinstance would let true pass for 1
    return float(value)
  if not isinstance(value, expected):
    type_name = _TYPE_NAMES[expected]
    raise UserError(f'{where}: field "{name}": expected {type_name}, got {value!r:.60}')
  return value


def _check_messages(messages: list, where: str) -> None:
  """Refuses messages that do not alternate, or where the user does not speak last."""
  place = f'{where}: field "messages"'
  if not messages:
    raise UserError(f'{place}: expected at least one message, got none')
  for number, message in enumerate(messages):
    if not _is_message(message):
      raise UserError(f'{place}: message {number + 1} needs the texts "role" and "content"')
    remaining = len(messages) - 1 - number
    role = 'user' if remaining % 2 == 0 else 'assistant'
    if message['role'] != role:
      raise UserError(
        f'{place}: message {number + 1}: expected the role {role!r}, got {message["role"]!r} '
        '(user and assistant alternate, the user speaks last)'
      )


def _is_message(message: Any) -> bool:
  """Says whether a value has the form of a message, whatever its role."""
  if not isinstance(message, dict) or 'role' not in message:
    return False
  return isinstance(message.get('content'), str)


def _check_ranks(responses: list, ranks: list, where: str) -> None:
  """Refuses a ranking of fewer than two texts, and ranks that do not fit them."""
  are_texts = all(isinstance(response, str) for response in responses)
  if len(responses) < 2 or not are_texts:
    raise UserError(f'{where}: field "responses": expected two or more texts')
  are_ranks = all(type(rank) is int and rank >= 1 for rank in ranks)  # true is no rank
  if len(ranks) != len(responses) or not are_ranks:
    raise UserError(
      f'{where}: field "ranks": expected {len(responses)} whole numbers from 1 (best), '
      f'got {ranks!r:.60}'
    )


def _rated_response(fields: dict[str, Any], where: str) -> Ranking:
  """Makes a ranking of one of a response that is `desirable` or not (the data of KTO)."""
  desirable = fields['desirable']
  if not isinstance(desirable, bool):
    raise UserError(f'{where}: field "desirable": expected true or false, got {desirable!r:.60}')
  rated = _parse_as(Demonstration, fields, where)
  return Ranking(
    id=rated.id,
    source=rated.source,
    license=rated.license,
    domain='',
    context='',
    messages=rated.messages,
    responses=[rated.response],
    ranks=[1 if desirable else 2],
  )
