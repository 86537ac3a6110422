"""What a line of an input of `generate` and `score` says.

A line is {"text": …}, {"tokens": [ids]} or a conversation in any of the shapes
that stages read (data/shapes.py). What one of the commands wrote the other reads:
`responses` are what is scored, and `tokens` beside a text or a conversation are
an earlier result, which does not count.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

from rlhf_jax.data import row_files, shapes
from rlhf_jax.data.conversations import Message
from rlhf_jax.data.shapes import Response
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizer import Tokenizer

Row = dict[str, Any]  # the JSON object of a line

_FORMS = (
  '{"text": …}, {"messages": …}, {"prompt": …} with or without "response", or {"tokens": [ids]}'
)


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of an input; of `text`, `tokens` and `messages` it has one.

  Attributes:
    row: the whole line.
    place: 'FILE:NUMBER', for error messages.
    text: a text that is read as it stands.
    tokens: token ids that are read as they are.
    messages: a conversation before the response.
    tools: functions that the model may call.
    responses: what is scored behind it; token ids behind `tokens`.
    is_list: whether the line gives a list of responses, so that a list of results is added.
  """

  row: Row
  place: str
  text: str | None = None
  tokens: list[int] | None = None
  messages: list[Message] | None = None
  tools: list[Any] = dataclasses.field(default_factory=list)
  responses: list[Any] = dataclasses.field(default_factory=list)
  is_list: bool = False


def read_lines(path: Path, with_response: bool) -> list[Line]:
  """Reads the lines of a file; empty ones are skipped.

  Args:
    path: any file of rows.
    with_response: whether a conversation must have a response; otherwise one that it has does
      not count.

  Raises:
    UserError: the file cannot be read, a line has none of the forms, or there are no lines.
  """
  lines = [parse_line(row, place, with_response) for place, row in row_files.read_rows(path)]
  if not lines:
    raise UserError(f'{path}: no lines')
  return lines


def parse_line(row: Any, place: str, with_response: bool) -> Line:
  """Finds out what a line says.

  Args:
    row: the JSON value of the line.
    place: for error messages.
    with_response: as in `read_lines`.

  Raises:
    UserError: it has none of the forms, or two of them.
  """
  if not isinstance(row, dict):
    raise UserError(f'{place}: expected {_FORMS}')
  text = row.get('text')
  spoken = [field for field in shapes.list_asked_fields(row) if field != 'text']
  if text is not None and spoken:
    raise UserError(f'{place}: the line has both "text" and "{spoken[0]}"; remove one of them')
  responses = _list_of_responses(row, place) if with_response else None
  if text is not None:
    if not isinstance(text, str):
      raise UserError(f'{place}: text: expected a text, got {text!r:.60}')
    return Line(row, place, text=text, responses=responses or [], is_list=responses is not None)
  if not spoken and row.get('tokens') is not None:
    sampled = row.get('response_tokens') if with_response else None
    if not isinstance(sampled, (list, type(None))):
      raise UserError(f'{place}: response_tokens: expected a list of lists of ids')
    return Line(
      row, place, tokens=row['tokens'], responses=sampled or [], is_list=sampled is not None
    )
  parsed = shapes.parse_row(row, place, prompt_only=not with_response or responses is not None)
  if parsed.messages is None:
    raise UserError(f'{place}: expected {_FORMS}')
  if not parsed.messages:
    raise UserError(f'{place}: field "{spoken[0]}": expected a message before the response')
  messages = shapes.with_context(parsed.messages, parsed.context)
  is_list = responses is not None
  if with_response and responses is None:
    if parsed.answered is None:
      raise UserError(
        f'{place}: response: expected a text, or messages of which the last one is from the '
        'assistant'
      )
    responses = parsed.answered.responses
    is_list = len(responses) > 1
  return Line(
    row,
    place,
    messages=messages,
    tools=parsed.tools,
    responses=responses or [],
    is_list=is_list,
  )


def encode_line(line: Line, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
  """Returns the token ids of a line, once for each response; at least one list.

  Args:
    line: what the line says.
    tokenizer: of the model; None where it has none.
    vocab_size: of the model.

  Raises:
    UserError: a field is of another form, or needs a tokenizer where there is none. Names the
      line.
  """
  place = line.place
  if line.tokens is not None:
    tokens = _check_tokens(line.tokens, place, 'tokens', vocab_size)
    sampled = [_check_tokens(ids, place, 'response_tokens', vocab_size) for ids in line.responses]
    return [tokens + ids for ids in sampled] or [tokens]
  if tokenizer is None:
    raise UserError(f'{place}: the model has no tokenizer, expected {{"tokens": [ids]}}')
  if line.text is not None:
    return [tokenizer.text(line.text + response) for response in line.responses or ['']]
  assert line.messages is not None
  try:
    if not line.responses:
      return [tokenizer.prompt(line.messages, line.tools)]
    encoded = []
    for response in line.responses:
      exchange = tokenizer.exchange(line.messages, response, line.tools)
      encoded.append(exchange.prompt + exchange.response)
    return encoded
  except UserError as error:
    raise UserError(f'{place}: {error}') from None


def response_lengths(
  line: Line, tokenizer: Tokenizer | None, ids: Sequence[Sequence[int]]
) -> list[int]:
  """Returns how many of the ids of a line are its response's, for each of its responses.

  Args:
    line: what the line says.
    tokenizer: of the model; None where it has none.
    ids: from `encode_line`.

  Raises:
    UserError: the line does not say where a response begins. Names the line.
  """
  if line.text is not None or not line.responses:
    raise UserError(
      f'{line.place}: the score of this model depends on where the response begins: expected '
      'messages or tokens, with a response'
    )
  if line.tokens is not None:
    return [len(response) for response in line.responses]
  assert tokenizer is not None and line.messages is not None  # `encode_line` checked it
  lengths = []
  for response, encoded in zip(line.responses, ids, strict=True):
    exchange = tokenizer.exchange(line.messages, response, line.tools)
    lengths.append(len(encoded) - len(exchange.prompt))
  return lengths


def _list_of_responses(row: Row, place: str) -> list[Response] | None:
  """Returns the responses that `generate` added to a line; None where it did not."""
  responses = row.get('responses')
  if responses is None or row.get('ranks') is not None:  # a ranking has its own reader
    return None
  if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
    raise UserError(f'{place}: responses: expected a list of texts, got {responses!r:.60}')
  if not responses:
    raise UserError(f'{place}: responses: expected at least one text, got none')
  if row.get('response') is not None:
    raise UserError(f'{place}: the line has both "response" and "responses"; remove one of them')
  return responses


def _check_tokens(ids: Any, place: str, name: str, vocab_size: int) -> list[int]:
  """Returns a line's own token ids after checking that they are in the vocabulary."""
  # isinstance would accept true and false
  if isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids):
    return ids
  raise UserError(f'{place}: {name}: expected a list of ids from 0 to {vocab_size - 1}')
