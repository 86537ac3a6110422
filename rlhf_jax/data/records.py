"""Records, the raw data of every stage, and their files.

A record is a document, a demonstration, a preference, a ranking or a prompt.
Records hold text only; data/encode.py makes tokens of them. The rows of a file
may have any of the shapes of data/shapes.py; fields that are not needed may be
missing or null.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
import os
from typing import Any

from rlhf_jax import json_lines
from rlhf_jax.data import conversations, on_disk, row_files, shapes
from rlhf_jax.data.conversations import Message
from rlhf_jax.data.shapes import Response
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text to pre-train on."""

  id: str
  source: str
  license: str
  text: str
  place: str = dataclasses.field(default='', compare=False, repr=False)  # 'file:line'


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A conversation and a good response to it, as a person would write it."""

  id: str
  source: str
  license: str
  messages: list[Message]
  response: Response
  tools: list[Any] = dataclasses.field(default_factory=list)  # functions that may be called
  place: str = dataclasses.field(default='', compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two responses, of which a person chose one."""

  id: str
  source: str
  license: str
  domain: str
  messages: list[Message]
  chosen: Response
  rejected: Response
  confidence: float = 1.0  # the probability that the choice is right
  tools: list[Any] = dataclasses.field(default_factory=list)
  place: str = dataclasses.field(default='', compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Ranking:
  """K responses and how a person ordered them.

  A ranking of a single response says whether that response is good (rank 1) or bad (rank 2).
  """

  id: str
  source: str
  license: str
  domain: str
  context: str  # a text put before the last message; may be empty
  messages: list[Message]
  responses: Sequence[Response]  # [K]
  ranks: list[int]  # [K], in the order of `responses`; 1 = best, equal = tie
  confidence: float = 1.0  # the probability that the order of a pair is right, for every pair
  tools: list[Any] = dataclasses.field(default_factory=list)
  place: str = dataclasses.field(default='', compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A conversation that waits for a response."""

  id: str
  source: str
  license: str
  messages: list[Message]
  meta: dict[str, Any]  # other fields of the row, for rewards and judges
  tools: list[Any] = dataclasses.field(default_factory=list)
  place: str = dataclasses.field(default='', compare=False, repr=False)


Record = Document | Demonstration | Preference | Ranking | Prompt

# Kind of record, as stages and sources name it → its class.
RECORD_TYPES: dict[str, type] = {
  'document': Document,
  'demonstration': Demonstration,
  'preference': Preference,
  'ranking': Ranking,
  'prompt': Prompt,
}

# Our field names, which `data.fields` may map to a file's names.
FIELD_NAMES = frozenset(
  [
    *(field.name for kind in RECORD_TYPES.values() for field in dataclasses.fields(kind)),
    *(name for prompt_form in shapes.PROMPT_FORMS for name in prompt_form.fields),
    *(name for answer_form in shapes.ANSWER_FORMS for name in answer_form.fields),
    *shapes.COMMON_FIELDS,
  ]
) - {'place'}


def read_records(
  path: str | os.PathLike,
  kind: str,
  fields: Mapping[str, str] | None = None,
  names: Counter[str] | None = None,
) -> list[Any]:
  """Reads the records of a file, in any form that row_files.py and shapes.py know.

  Args:
    path: the file.
    kind: a key of RECORD_TYPES; `parse_record` says which other records are converted to it.
    fields: our name of a field → the file's, where the names differ.
    names: a counter that gets the number of rows of each shape, by the shape's name.

  Returns:
    The records in the order of the file.

  Raises:
    UserError: the file cannot be read, or a row holds no such record. Names file and line.
  """
  return list(iterate_records(path, kind, fields, names))


def iterate_records(
  path: str | os.PathLike,
  kind: str,
  fields: Mapping[str, str] | None = None,
  names: Counter[str] | None = None,
) -> Iterator[Any]:
  """Yields the records of a file one by one; arguments and errors are those of `read_records`."""
  for place, row in row_files.read_rows(path):
    record, name = parse_named(kind, rename_fields(row, fields or {}, place), place)
    if names is not None:
      names[name] += 1
    yield record


def collection(kind: str) -> Any:
  """Returns an empty collection of records: a list, or on disk where they may be very many."""
  return on_disk.OnDisk(_pack_document, _unpack_document) if kind == 'document' else []


def _pack_document(document: Document) -> bytes:
  return json.dumps(dataclasses.astuple(document)).encode()


def _unpack_document(data: bytes) -> Document:
  return Document(*json.loads(data))


def rename_fields(row: Any, fields: Mapping[str, str], place: str) -> Any:
  """Returns a row with some of its fields under our names too.

  Args:
    row: the row as it was read.
    fields: our name → the row's name; a dot leads into an object.
    place: for error messages.

  Raises:
    UserError: the row has no such field.
  """
  if not fields or not isinstance(row, dict):
    return row
  renamed = dict(row)
  for ours, theirs in fields.items():
    value = row.get(theirs)
    if theirs not in row:
      value = row
      for part in theirs.split('.'):
        if not isinstance(value, dict) or part not in value:
          present = ', '.join(sorted(row))
          raise UserError(f'data.fields: {place} has no field {theirs!r}; got the fields {present}')
        value = value[part]
    renamed[ours] = value
  return renamed


def write_records(path: str | os.PathLike, rows: Iterable[Any]) -> None:
  """Writes records as JSON Lines, atomically; a name that ends with `.gz` compresses them.

  Args:
    path: the file; its folder is made where it is missing.
    rows: records of any kind, or dicts.
  """
  json_lines.write_values(path, (row if isinstance(row, dict) else _as_fields(row) for row in rows))


def parse_record(kind: str, row: Any, place: str) -> Any:
  """Makes a record of the fields of a row.

  A pair or a rated single response also makes a ranking, and a ranking makes a
  demonstration of its best response. Any row that asks something makes a prompt;
  its `meta` is the row's field `meta` or, if it has none, all other fields.

  Args:
    kind: a key of RECORD_TYPES.
    row: a row of the file, which must be an object.
    place: the row's place for error messages, such as 'file:line'.

  Returns:
    A record of the class RECORD_TYPES[kind].

  Raises:
    UserError: a field is missing or has the wrong form.
  """
  return parse_named(kind, row, place)[0]


def parse_named(kind: str, row: Any, place: str) -> tuple[Any, str]:
  """Makes a record as `parse_record` does, and names the shape of the row for the log."""
  if not isinstance(row, dict):
    raise UserError(f'{place}: expected a JSON object, got {type(row).__name__}')
  labels: dict[str, Any] = {
    name: '' if row.get(name) is None else str(row[name]) for name in _LABELS
  }
  labels['id'] = labels['id'] or place
  domain = labels.pop('domain')
  if kind == 'document':
    return Document(**labels, text=_document_text(row, place), place=place), 'documents'
  parsed = shapes.parse_row(row, place, prompt_only=kind == 'prompt')
  if parsed.messages is None:
    raise _missing(kind, 'messages', row, place)
  labels |= {'messages': parsed.messages, 'tools': parsed.tools, 'place': place}
  _check_messages(parsed.messages, place)
  if kind != 'ranking':  # which keeps its context apart
    labels['messages'] = shapes.with_context(parsed.messages, parsed.context)
  if kind == 'prompt':
    return Prompt(**labels, meta=_meta(row, parsed, place)), parsed.name
  if kind == 'demonstration':
    return Demonstration(**labels, response=_best_response(kind, row, parsed, place)), parsed.name
  ranking = Ranking(
    **labels,
    domain=domain,
    context=parsed.context,
    confidence=_confidence(row, place),
    **_ranked_responses(kind, row, parsed, place),
  )
  if kind == 'preference':
    return _ranking_to_preference(ranking, place), parsed.name
  return ranking, parsed.name


def preference_to_ranking(preference: Preference) -> Ranking:
  """Converts a preference to a ranking of two responses, the chosen one first."""
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
    tools=preference.tools,
    place=preference.place,
  )


def ranking_to_demonstration(ranking: Ranking) -> Demonstration:
  """Makes a demonstration of a ranking's best response, the first of several that are best."""
  best = ranking.ranks.index(min(ranking.ranks))
  return Demonstration(
    id=ranking.id,
    source=ranking.source,
    license=ranking.license,
    messages=conversation(ranking),
    response=ranking.responses[best],
    tools=ranking.tools,
    place=ranking.place,
  )


def conversation(record: Any) -> list[Message]:
  """Returns the messages of a record as every stage sees them.

  A ranking's context is put before the text of the last message.
  """
  return shapes.with_context(record.messages, getattr(record, 'context', ''))


def response_text(response: Response) -> str:
  """Returns a response as people and judges read it; function calls are written as JSON."""
  return conversations.message_text(response)


# Parts of a record.

_LABELS = ('id', 'source', 'license', 'domain')  # texts, or numbers in some files


def _as_fields(record: Any) -> dict[str, Any]:
  """Returns the fields of a record that are written: all but its place and an empty `tools`."""
  fields = dataclasses.asdict(record)
  fields.pop('place', None)
  if not fields.get('tools'):
    fields.pop('tools', None)
  return fields


def _document_text(row: dict[str, Any], place: str) -> str:
  """Returns the text of a document."""
  for name in ('text', 'content'):
    value = row.get(name)
    if isinstance(value, str):
      return value
    if value is not None:
      raise UserError(f'{place}: field "{name}": expected a text, got {value!r:.60}')
  raise _missing('document', 'text', row, place)


def _meta(row: dict[str, Any], parsed: shapes.Parsed, place: str) -> dict[str, Any]:
  """Returns what rewards and judges get of a prompt's row beside its messages."""
  meta = row.get('meta')
  if meta is None:
    last = parsed.answered and {'response': response_text(parsed.answered.responses[0])}
    return {**(last or {}), **parsed.rest}
  if not isinstance(meta, dict):
    raise UserError(f'{place}: field "meta": expected an object, got {meta!r:.60}')
  return meta


def _best_response(kind: str, row: dict[str, Any], parsed: shapes.Parsed, place: str) -> Response:
  """Returns the response of a demonstration: the only one, or the best."""
  answered = parsed.answered
  if answered is None:
    raise _missing(kind, 'response', row, place)
  if answered.desirable is False:
    raise UserError(f'{place}: expected a demonstration, got a response that is rated bad')
  if answered.ranks is None:
    return answered.responses[0]
  _check_ranks(answered.responses, answered.ranks, place)
  return answered.responses[answered.ranks.index(min(answered.ranks))]


def _ranked_responses(
  kind: str, row: dict[str, Any], parsed: shapes.Parsed, place: str
) -> dict[str, Any]:
  """Returns the responses of a ranking and their ranks."""
  answered = parsed.answered
  if answered is None or (answered.ranks is None and answered.desirable is None):
    raise _missing(kind, 'chosen' if kind == 'preference' else 'responses', row, place)
  if answered.ranks is None:
    return {'responses': answered.responses, 'ranks': [1 if answered.desirable else 2]}
  _check_ranks(answered.responses, answered.ranks, place)
  return {'responses': answered.responses, 'ranks': answered.ranks}


def _ranking_to_preference(ranking: Ranking, place: str) -> Preference:
  """Converts a ranking of two responses with different ranks to a preference."""
  if sorted(ranking.ranks) != [1, 2]:
    raise UserError(
      f'{place}: expected a chosen and a rejected response, got ranks {ranking.ranks}'
    )
  order = sorted(range(2), key=ranking.ranks.__getitem__)
  chosen, rejected = (ranking.responses[place] for place in order)
  return Preference(
    id=ranking.id,
    source=ranking.source,
    license=ranking.license,
    domain=ranking.domain,
    messages=conversation(ranking),
    chosen=chosen,
    rejected=rejected,
    confidence=ranking.confidence,
    tools=ranking.tools,
    place=ranking.place,
  )


def _confidence(row: dict[str, Any], place: str) -> float:
  """Returns the probability that the order is right."""
  value = row.get('confidence')
  if value is None:
    return 1.0
  if type(value) not in (int, float):  # isinstance would let true pass for 1
    raise UserError(f'{place}: field "confidence": expected a number, got {value!r:.60}')
  if not 0 <= value <= 1:
    raise UserError(f'{place}: field "confidence": expected a probability, got {value}')
  return float(value)


def _missing(kind: str, name: str, row: dict[str, Any], place: str) -> UserError:
  """Returns the error about a row that has no shape of this kind of record."""
  present = ', '.join(sorted(map(str, row))) or 'none'
  return UserError(
    f'{place}: a {kind} needs the field "{name}"; got the fields {present} '
    '(docs/data.md lists what is read)'
  )


def _check_messages(messages: list[Message], place: str) -> None:
  """Refuses a conversation that is empty or ends with a response."""
  if not messages:
    raise UserError(f'{place}: field "messages": expected at least one message, got none')
  if messages[-1]['role'] == 'assistant':
    raise UserError(
      f'{place}: field "messages": message {len(messages)}: expected the user or a tool to speak '
      'last, before the response'
    )


def _check_ranks(responses: list, ranks: list, place: str) -> None:
  """Refuses a ranking of fewer than two responses, and ranks that do not fit them."""
  are_responses = all(isinstance(response, (str, dict)) for response in responses)
  if len(responses) < 2 or not are_responses:
    raise UserError(f'{place}: field "responses": expected two or more texts')
  are_ranks = all(type(rank) is int and rank >= 1 for rank in ranks)  # true is no rank
  if len(ranks) != len(responses) or not are_ranks:
    raise UserError(
      f'{place}: field "ranks": expected {len(responses)} whole numbers from 1 (best), '
      f'got {ranks!r:.60}'
    )
