"""What people and the world give us, one JSON object a line: documents, demonstrations, preferences, rankings, prompts.

`id`, `source` and `license` may be left out of a file, or be null. `messages` alternate between user and assistant,
the user speaks last. An exercise, {question, answer, final}, does for a demonstration, and for a prompt with `meta.final`. The types say nothing of tokens.
"""

import dataclasses
import gzip
import json
import os
from pathlib import Path
import zlib

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text to pre-train on."""
  id: str
  source: str
  license: str
  text: str


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A conversation and how a person would answer."""
  id: str
  source: str
  license: str
  messages: list
  response: str


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two answers of which a person chose one; `confidence` is the probability that they chose right."""
  id: str
  source: str
  license: str
  domain: str
  messages: list
  chosen: str
  rejected: str
  confidence: float = 1.0


@dataclasses.dataclass(frozen=True)
class Ranking:
  """K answers in a person's order: `ranks` in the order of `responses`, 1 = best, equal = tie. `context` (may be
  empty) stands before the last message. `confidence` is the probability that any pair of them is in the right order. A
  single response is good at rank 1, else bad."""
  id: str
  source: str
  license: str
  domain: str
  context: str
  messages: list
  responses: list
  ranks: list
  confidence: float = 1.0


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation to answer; `meta` is whatever a reward or judge needs to know."""
  id: str
  source: str
  license: str
  messages: list
  meta: dict


TYPES = {'document': Document, 'demonstration': Demonstration, 'preference': Preference, 'ranking': Ranking,
         'prompt': Prompt}
_OPTIONAL = {'source': '', 'license': '', 'domain': '', 'context': '', 'meta': {}, 'confidence': 1.0}
_KINDS = {'messages': list, 'responses': list, 'ranks': list, 'meta': dict, 'confidence': float}


def parse(kind: str, fields: dict, where: str):
  """A record of a kind (a key of TYPES) from JSON fields; others are ignored.

  Args:
    where: what errors call the place, as 'file:line'.

  Raises:
    UserError: a field is missing or of another form.
  """
  if not isinstance(fields, dict):
    raise UserError(f'{where}: expected a JSON object, got {type(fields).__name__}')
  if isinstance(fields.get('question'), str) and 'messages' not in fields:
    fields = _exercise(fields)
  values = {}
  for field in dataclasses.fields(TYPES[kind]):
    value = fields.get(field.name)
    if value is None:
      value = where if field.name == 'id' else _OPTIONAL.get(field.name)
    if value is None:
      raise UserError(f'{where}: a {kind} needs the field "{field.name}"; found {", ".join(sorted(fields)) or "none"}')
    expected = _KINDS.get(field.name, str)
    if field.name in ('id', 'source', 'license', 'domain'):
      value = str(value)
    if expected is float and type(value) is int:
      value = float(value)
    if not isinstance(value, expected):
      raise UserError(f'{where}: field "{field.name}": expected {_said(expected)}, got {value!r:.60}')
    values[field.name] = value
  if 'messages' in values:
    _check_messages(values['messages'], where)
  if kind == 'ranking':
    _check_ranking(values, where)
  if not 0 <= values.get('confidence', 1.0) <= 1:
    raise UserError(f'{where}: field "confidence": expected a probability, got {values["confidence"]}')
  return TYPES[kind](**values)


def _exercise(fields):
  """An exercise with a known end, as GSM8K's {question, answer, final}, as the fields of a conversation."""
  return {**fields, 'messages': [dict(role='user', content=fields['question'])], 'response': fields.get('answer'),
          'meta': {name: fields[name] for name in ('final',) if name in fields}}


def _said(kind):
  return {str: 'a text', list: 'a list', dict: 'an object', float: 'a number'}[kind]


def _check_messages(messages, where):
  if not messages:
    raise UserError(f'{where}: field "messages": expected at least one message')
  for number, message in enumerate(messages):
    if not (isinstance(message, dict) and isinstance(message.get('content'), str) and 'role' in message):
      raise UserError(f'{where}: field "messages": message {number + 1} needs the texts "role" and "content"')
    role = ('user', 'assistant')[(len(messages) - 1 - number) % 2]
    if message['role'] != role:
      raise UserError(f'{where}: field "messages": message {number + 1}: expected the role {role!r}, got '
                      f'{message["role"]!r} (user and assistant alternate, the user speaks last)')


def _check_ranking(values, where):
  responses, ranks = values['responses'], values['ranks']
  if len(responses) < 2 or not all(isinstance(response, str) for response in responses):
    raise UserError(f'{where}: field "responses": expected two or more texts')
  if len(ranks) != len(responses) or not all(type(rank) is int and rank >= 1 for rank in ranks):
    raise UserError(f'{where}: field "ranks": expected {len(responses)} whole numbers from 1 (best), got {ranks!r:.60}')


def ranking(preference: Preference) -> Ranking:
  """A preference as a ranking of two."""
  return Ranking(preference.id, preference.source, preference.license, preference.domain, '', preference.messages,
                 [preference.chosen, preference.rejected], [1, 2], preference.confidence)


def parse_ranking(fields: dict, where: str) -> Ranking:
  """A ranking; a preference as a ranking of two; a single response with `desirable`, true or false, as one of rank 1 or 2.

  Raises:
    UserError: as `parse`.
  """
  if isinstance(fields, dict) and 'chosen' in fields:
    return ranking(parse('preference', fields, where))
  if isinstance(fields, dict) and 'desirable' in fields and 'responses' not in fields:
    if not isinstance(fields['desirable'], bool):
      raise UserError(f'{where}: field "desirable": expected true or false, got {fields["desirable"]!r:.60}')
    one = parse('demonstration', fields, where)
    return Ranking(one.id, one.source, one.license, '', '', one.messages, [one.response], [2 - fields['desirable']])
  return parse('ranking', fields, where)


def best(ranking: Ranking) -> Demonstration:
  """The response that stands first, as a demonstration."""
  return Demonstration(ranking.id, ranking.source, ranking.license, conversation(ranking),
                       ranking.responses[ranking.ranks.index(min(ranking.ranks))])


def conversation(record) -> list:
  """The messages of a record as every stage sees them: a ranking's context stands before its last message."""
  if not getattr(record, 'context', ''):
    return record.messages
  last = record.messages[-1]
  return [*record.messages[:-1], {**last, 'content': f'{record.context}\n\n{last["content"]}'}]


def read(path, kind: str) -> list:
  """The records of a JSONL file (.gz by its name). A file of rankings may hold preferences and single responses
  too (`parse_ranking`), a file of demonstrations rankings, of which the best response counts.

  Raises:
    UserError: names file and line.
  """
  rows, number = [], 0
  try:
    with (gzip.open if str(path).endswith('.gz') else open)(path, 'rb') as file:
      for number, line in enumerate(file, start=1):
        if not line.strip():
          continue
        where = f'{path}:{number}'
        try:
          fields = json.loads(line.decode('utf-8-sig'))
        except (ValueError, RecursionError) as error:
          raise UserError(f'{where}: not JSON: {error}') from None
        if kind == 'ranking':
          rows.append(parse_ranking(fields, where))
        elif kind == 'demonstration' and isinstance(fields, dict) and 'responses' in fields:
          rows.append(best(parse('ranking', fields, where)))
        elif kind == 'demonstration' and isinstance(fields, dict) and fields.get('desirable') is False:
          raise UserError(f'{where}: a response that somebody called bad (desirable: false) is no demonstration')
        else:
          rows.append(parse(kind, fields, where))
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'{path}:{number + 1}: cannot read: {error}') from None
  return rows


def write(path, rows) -> None:
  """Writes records as JSONL (.gz by the name), whole or not at all."""
  part = Path(f'{path}.part')
  part.parent.mkdir(parents=True, exist_ok=True)
  # half a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape
  with (gzip.open if str(path).endswith('.gz') else open)(
      part, 'wt', encoding='utf-8', errors='backslashreplace') as file:
    for row in rows:
      file.write(json.dumps(dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row, ensure_ascii=False) + '\n')
  os.replace(part, path)
