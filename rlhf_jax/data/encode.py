"""Encodes records as token arrays with masks, one dict of numpy arrays for each example.

Everything is encoded once, when a stage begins, and kept in memory, but for
documents, which lie on disk. So lengths are known before anything compiles, records
that do not fit are counted and reported at once, and shuffling and resuming are
simple. Several processes divide the work, and exchange what they have encoded.

`overlong` decides what happens to a record with more than `max_length` tokens:

  drop           it is left out; the number of these records is printed
  truncate_left  the prompt's beginning is cut off, but its beginning-of-sequence token stays; the
                 response is never cut
  error          an error names its id
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import sys
from typing import Any, Protocol

import numpy as np

from rlhf_jax import text_table
from rlhf_jax.data import on_disk, records
from rlhf_jax.data.conversations import Message
from rlhf_jax.data.shapes import Response
from rlhf_jax.errors import UserError

OVERLONG_POLICIES = ('drop', 'truncate_left', 'error')

# Name → array. Each function below lists the names, shapes and dtypes of its examples.
Example = dict[str, np.ndarray]

# Computes a function of each item, in order, as `map` does. runtime.hosts.spread
# divides the items among the processes of a run.
Spread = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


# The assistant's messages that a demonstration teaches: the response alone, or all of them.
TARGETS = ('last', 'all')


class Tokenizer(Protocol):
  """The methods of a tokenizer that encoding uses; interop/tokenizer.py has them."""

  @property
  def pad_id(self) -> int:
    """The id that fills masked places."""

  @property
  def eos_id(self) -> int:
    """The id that ends a text."""

  @property
  def bos_id(self) -> int | None:
    """The id of the beginning-of-sequence token, or None."""

  def encode(self, text: str) -> list[int]:
    """Encodes a bare text."""

  def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
    """Encodes a conversation up to where the response begins."""

  def exchange(
    self, messages: Sequence[Message], response: Response, tools: Any = None
  ) -> tuple[list[int], list[int]]:
    """Encodes a conversation and a response to it, with the token that ends it."""

  def all_turns(
    self, messages: Sequence[Message], response: Response, tools: Any = None
  ) -> tuple[list[int], list[int]]:
    """Encodes the same as one list, with the number of the assistant's message of each token."""


def documents(
  rows: Sequence[records.Document],
  tokenizer: Tokenizer,
  max_length: int,
  spread: Spread = map,
) -> Sequence[Example]:
  """Encodes documents, each followed by the end token; what comes out lies on disk.

  A longer document is cut into windows; each begins with the last token of the
  one before it, so that every token except the document's first is a target
  exactly once. A document of one token gives no example.

  Args:
    rows: the documents.
    tokenizer: what turns text into tokens.
    max_length: tokens of an example at most.
    spread: applies the tokenizer to all documents.

  Returns:
    Examples {'tokens': [n] int32, 'targets': [n] float32}, n ≤ max_length.

  Raises:
    UserError: no document gives an example, or `max_length` leaves no target.
  """
  if max_length < 2:
    raise UserError(f'max_length: expected 2 tokens or more, got {max_length}')
  examples = on_disk.OnDisk(_pack_tokens, _unpack_window)
  encode_one = functools.partial(_encode_document, tokenizer=tokenizer)
  for tokens in spread(encode_one, rows):
    # A window's last token, a target here, is the context with which the next one begins.
    for begin in range(0, len(tokens) - 1, max_length - 1):
      examples.append(tokens[begin : begin + max_length])
  _check_any_fits(examples, 'document', max_length)
  return examples


def _encode_document(row: records.Document, tokenizer: Tokenizer) -> list[int]:
  """Encodes a text between the tokens that begin and end it."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  return start + tokenizer.encode(row.text) + [tokenizer.eos_id]


def _pack_tokens(tokens: list[int]) -> bytes:
  return np.array(tokens, np.int32).tobytes()


def _unpack_window(data: bytes) -> Example:
  tokens = np.frombuffer(data, np.int32)
  return _sequence(tokens, num_context=1)  # nothing comes before the first token


def demonstrations(
  rows: Sequence[records.Demonstration],
  tokenizer: Tokenizer,
  max_length: int,
  overlong: str = 'drop',
  targets: str = 'last',
  spread: Spread = map,
) -> list[Example]:
  """Encodes demonstrations; the targets are the response and the token that ends it.

  Args:
    rows: the demonstrations.
    tokenizer: what turns text into tokens.
    max_length: tokens of prompt and response together at most.
    overlong: one of OVERLONG_POLICIES.
    targets: one of TARGETS.
    spread: applies the tokenizer to all demonstrations.

  Returns:
    Examples {'tokens': [n] int32, 'targets': [n] float32}, n ≤ max_length.

  Raises:
    UserError: nothing fits, `overlong` is 'error' and a record does not, or the chat template
      refuses a record.
  """
  if targets not in TARGETS:
    names = ', '.join(TARGETS)
    raise UserError(f'targets: expected one of {names}, got {targets!r}')
  examples = []
  encode_one = functools.partial(_encode_turns, tokenizer=tokenizer, targets=targets)
  for row, (prompt, response, is_target) in zip(rows, spread(encode_one, rows), strict=True):
    fitted = _fit_prompt(
      prompt,
      response_length=len(response),
      max_length=max_length,
      overlong=overlong,
      bos_id=tokenizer.bos_id,
      name=f'demonstration {row.id}',
    )
    if fitted is None:
      continue
    example = _sequence(fitted + response, num_context=1)
    # The prompt may have been cut at its beginning, so the marks are aligned at the end.
    kept = np.array(is_target[len(is_target) - len(example['tokens']) :], np.float32)
    example['targets'] *= kept
    examples.append(example)
  _report_dropped(examples, 'demonstration', max_length, len(rows))
  return examples


def rankings(
  rows: Sequence[records.Ranking],
  tokenizer: Tokenizer,
  max_length: int,
  overlong: str = 'drop',
  spread: Spread = map,
) -> list[Example]:
  """Encodes rankings; each of the K responses stands after a copy of the prompt.

  Args:
    rows: the rankings.
    tokenizer: what turns text into tokens.
    max_length: tokens of the prompt and the longest response together at most.
    overlong: one of OVERLONG_POLICIES.
    spread: applies the tokenizer to all rankings.

  Returns:
    Examples {'tokens': [K, max_length] int32, 'begins': [K] int32, 'ranks': [K] int32,
    'index': [K] int32, 'lengths': [K] int32, 'confidence': [K] float32}. A row of tokens is the
    prompt and a response with the token that ends it, `lengths` tokens together, then padding;
    the response begins at `begins`. `index` is the index of the record in `rows`.

  Raises:
    UserError: nothing fits, `overlong` is 'error' and a record does not, or the chat template
      refuses a record.
  """
  examples = []
  encode_one = functools.partial(_encode_responses, tokenizer=tokenizer)
  for index, exchanges in enumerate(spread(encode_one, rows)):
    row = rows[index]
    longest = max(len(response) for _, response in exchanges)
    num_responses = len(exchanges)  # K
    tokens = np.full((num_responses, max_length), tokenizer.pad_id, np.int32)
    begins = np.zeros(num_responses, np.int32)
    lengths = np.zeros(num_responses, np.int32)
    for number, (prompt, response) in enumerate(exchanges):
      # Mostly the prompts are equal, but some templates make the prompt depend on the response.
      fitted = _fit_prompt(
        prompt,
        response_length=longest,
        max_length=max_length,
        overlong=overlong,
        bos_id=tokenizer.bos_id,
        name=f'ranking {row.id}',
      )
      if fitted is None:
        break
      begins[number] = len(fitted)
      lengths[number] = len(fitted) + len(response)
      tokens[number, : lengths[number]] = fitted + response
    else:
      example = {
        'tokens': tokens,
        'begins': begins,
        'ranks': np.array(row.ranks, np.int32),
        'index': np.full(num_responses, index, np.int32),
        'lengths': lengths,
        'confidence': np.full(num_responses, row.confidence, np.float32),
      }
      examples.append(example)
  _report_dropped(examples, 'ranking', max_length, len(rows))
  _report_empty_comparisons(examples)
  return examples


def prompts(
  rows: Sequence[records.Prompt],
  tokenizer: Tokenizer,
  max_length: int,
  overlong: str = 'drop',
  spread: Spread = map,
) -> list[Example]:
  """Encodes prompts, padded on the left, so that all responses begin at the same place.

  Args:
    rows: the prompts.
    tokenizer: what turns text into tokens.
    max_length: tokens of a prompt at most.
    overlong: one of OVERLONG_POLICIES.
    spread: applies the tokenizer to all prompts.

  Returns:
    Examples {'tokens': [max_length] int32, 'mask': [max_length] bool, 'index': [] int32}; see
    `left_padded`.

  Raises:
    UserError: nothing fits, or `overlong` is 'error' and a record does not.
  """
  examples = []
  encode_one = functools.partial(_encode_prompt, tokenizer=tokenizer)
  for index, tokens in enumerate(spread(encode_one, rows)):
    prompt = _fit_prompt(
      tokens,
      response_length=0,  # the limit is of the prompt alone
      max_length=max_length,
      overlong=overlong,
      bos_id=tokenizer.bos_id,
      name=f'prompt {rows[index].id}',
    )
    if prompt is not None:
      examples.append(left_padded(prompt, max_length, tokenizer.pad_id, index))
  _report_dropped(examples, 'prompt', max_length, len(rows))
  return examples


def left_padded(tokens: Sequence[int], length: int, pad_id: int, index: int) -> dict[str, Any]:
  """Pads the tokens of one prompt on the left.

  Args:
    tokens: at most `length` tokens.
    length: tokens of the row.
    pad_id: the id that fills the places before the prompt.
    index: the index of the record in its data set.

  Returns:
    {'tokens': [length] int32, 'mask': [length] bool, 'index': [] int32}; the mask is True at the
    prompt's tokens.
  """
  begin = length - len(tokens)  # of the prompt in its row
  padded = np.full(length, pad_id, np.int32)
  padded[begin:] = tokens
  mask = np.zeros(length, bool)
  mask[begin:] = True
  return {'tokens': padded, 'mask': mask, 'index': np.int32(index)}


def _encode_prompt(row: records.Prompt, tokenizer: Tokenizer) -> list[int]:
  """Encodes a prompt; an error names the record's place."""
  try:
    return tokenizer.prompt(records.conversation(row), row.tools)
  except UserError as error:
    raise _located(error, row) from None


def _encode_exchange(
  row: records.Demonstration | records.Ranking, response: Response, tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
  """Encodes prompt and response; an error names the record's place."""
  try:
    return tokenizer.exchange(records.conversation(row), response, row.tools)
  except UserError as error:
    raise _located(error, row) from None


def _encode_responses(
  row: records.Ranking, tokenizer: Tokenizer
) -> list[tuple[list[int], list[int]]]:
  """Encodes prompt and response for each response of a ranking."""
  return [_encode_exchange(row, response, tokenizer) for response in row.responses]


def _encode_turns(
  row: records.Demonstration, tokenizer: Tokenizer, targets: str
) -> tuple[list[int], list[int], list[bool]]:
  """Encodes a demonstration as `_encode_all_turns` does; `targets` is one of TARGETS."""
  if targets == 'all':
    return _encode_all_turns(row, tokenizer)
  prompt, response = _encode_exchange(row, row.response, tokenizer)
  return prompt, response, [False] * len(prompt) + [True] * len(response)


def _encode_all_turns(
  row: records.Demonstration, tokenizer: Tokenizer
) -> tuple[list[int], list[int], list[bool]]:
  """Encodes a demonstration in which every message of the assistant is a target.

  Returns:
    (the ids before the last response [P], the ids of that response [R], whether each of these
    tokens is a target [P + R]). A message with `weight` 0, as OpenAI's files mark it, is none.
  """
  messages = records.conversation(row)
  try:
    tokens, owners = tokenizer.all_turns(messages, row.response, row.tools)
  except UserError as error:
    raise _located(error, row) from None
  spoken = [message for message in messages if message['role'] == 'assistant']
  spoken.append(row.response if isinstance(row.response, dict) else {})
  is_target = [owner > 0 and spoken[owner - 1].get('weight') != 0 for owner in owners]
  begin = owners.index(len(spoken))  # of the last response
  return tokens[:begin], tokens[begin:], is_target


def _located(error: UserError, row: Any) -> UserError:
  """Returns an error with the place of the record before it."""
  return UserError(f'{row.place or row.id}: {error}')


def _sequence(tokens: Sequence[int] | np.ndarray, num_context: int) -> Example:
  """Makes an example of which all tokens after the first `num_context` are targets."""
  targets = np.ones(len(tokens), np.float32)  # a mask, float32 as losses multiply by it
  targets[:num_context] = 0
  return {'tokens': np.array(tokens, np.int32), 'targets': targets}


def _fit_prompt(
  prompt: list[int],
  *,
  response_length: int,
  max_length: int,
  overlong: str,
  bos_id: int | None,
  name: str,
) -> list[int] | None:
  """Returns the prompt, cut if `overlong` asks for it, or None if the record is left out."""
  if overlong not in OVERLONG_POLICIES:
    names = ', '.join(OVERLONG_POLICIES)
    raise UserError(f'overlong: expected one of {names}, got {overlong!r}')
  # Tokens for the prompt; below 0 if the response alone is too long.
  room = max_length - response_length
  if len(prompt) <= room:
    return prompt
  if overlong == 'error':
    raise UserError(
      f'{name}: {len(prompt) + response_length} tokens do not fit the limit of {max_length} '
      '(max_length); raise it, or set overlong to "drop" or "truncate_left"'
    )
  start = prompt[:1] if prompt[:1] == [bos_id] else []
  # Nothing of the prompt would be left but its beginning-of-sequence token.
  if overlong == 'drop' or room <= len(start):
    return None
  num_kept = room - len(start)
  return start + prompt[len(prompt) - num_kept :]


def _report_dropped(examples: list, kind: str, max_length: int, num_records: int) -> None:
  """Prints how many records were left out, and refuses to go on without any."""
  num_dropped = num_records - len(examples)
  if num_dropped:
    message = f'{num_dropped} of {num_records} {kind}s are longer than {max_length} tokens'
    # On stderr, as stdout may be the output of a command.
    message += ' and were left out'
    print(text_table.fit_terminal(message, sys.stderr), file=sys.stderr)
  _check_any_fits(examples, kind, max_length)


def _report_empty_comparisons(examples: list[Example]) -> None:
  """Prints how many rankings teach nothing, as all their responses or all their ranks are equal."""
  several = [example for example in examples if len(example['ranks']) > 1]
  num_equal = sum(_are_equal(example['tokens']) for example in several)
  num_tied = sum(_are_equal(example['ranks']) for example in several)
  for number, reason in ((num_equal, 'compare equal tokens'), (num_tied, 'are ties')):
    if number:
      message = f'{number} of {len(examples)} rankings {reason} and teach no order'
      print(text_table.fit_terminal(message, sys.stderr), file=sys.stderr)


def _are_equal(rows: np.ndarray) -> bool:
  """Says whether all rows of an array are the same."""
  return bool((rows == rows[:1]).all())


def _check_any_fits(examples: Sequence, kind: str, max_length: int) -> None:
  """Refuses to go on without any example."""
  if not examples:
    raise UserError(f'no {kind} fits {max_length} tokens; raise max_length')
