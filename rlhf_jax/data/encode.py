"""Records → token arrays and masks, one dict of numpy arrays an example.

Everything is encoded once, when a stage begins, and kept in memory: lengths are then known before anything compiles,
what does not fit is counted and said at once, and shuffling and resuming are plain. Left out: corpora larger than a
host's memory.

What does not fit, `overlong`: 'drop' (and say how many), 'truncate_left' (the prompt loses its beginning but for the
beginning-of-sequence token, the response is never cut), 'error' (names the record).
"""

import sys

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.errors import UserError

POLICIES = ('drop', 'truncate_left', 'error')


def documents(rows, tokenizer, length: int) -> list[dict]:
  """Documents → {'tokens' [n] int32, 'targets' [n] float32}, n ≤ length.

  A document ends with the end token. A longer one is cut into windows that share one token, so that every token but
  the document's first is a target exactly once. A document of one token gives nothing.
  """
  if length < 2:
    raise UserError(f'length: expected 2 tokens or more, got {length}')
  examples, start = [], [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  for row in rows:
    tokens = start + tokenizer.encode(row.text) + [tokenizer.eos_id]
    for begin in range(0, len(tokens) - 1, length - 1):
      window = tokens[begin:begin + length]
      examples.append(_example(window, 1))
  return _some(examples, 'document', length)


def demonstrations(rows, tokenizer, length: int, overlong: str = 'drop') -> list[dict]:
  """Demonstrations → {'tokens' [n] int32, 'targets' [n] float32}: the response and its end token are the targets."""
  examples = []
  for row in rows:
    prompt, response = tokenizer.prompt(records.conversation(row)), tokenizer.response(row.response)
    prompt = _fit(prompt, length - len(response), overlong, row, 'demonstration', length, tokenizer.bos_id)
    if prompt is not None:
      examples.append(_example(prompt + response, len(prompt)))
  return _some(examples, 'demonstration', length, len(rows))


def rankings(rows, tokenizer, length: int, overlong: str = 'drop') -> list[dict]:
  """Rankings of k responses → {'tokens' [k, length], 'begins', 'lengths', 'ranks', 'index' [k] int32,
  'confidence' [k] float32}.

  Each row of tokens is the prompt, one response, which `begins` somewhere, and its end token, then padding. `index` is
  the record's place in rows.
  """
  examples = []
  for index, row in enumerate(rows):
    prompt = tokenizer.prompt(records.conversation(row))
    responses = [tokenizer.response(response) for response in row.responses]
    prompt = _fit(prompt, length - max(map(len, responses)), overlong, row, 'ranking', length, tokenizer.bos_id)
    if prompt is None:
      continue
    tokens = np.full((len(responses), length), tokenizer.pad_id, np.int32)
    for place, response in zip(tokens, responses):
      place[:len(prompt) + len(response)] = prompt + response
    whole = lambda value, dtype=np.int32: np.full(len(responses), value, dtype)
    examples.append({
        'tokens': tokens, 'begins': whole(len(prompt)), 'ranks': np.array(row.ranks, np.int32), 'index': whole(index),
        'lengths': np.array([len(prompt) + len(response) for response in responses], np.int32),
        'confidence': whole(row.confidence, np.float32)})
  return _some(examples, 'ranking', length, len(rows))


def prompts(rows, tokenizer, length: int, overlong: str = 'drop') -> list[dict]:
  """Prompts → {'tokens' [length] int32, 'mask' [length] bool, 'index' [] int32}, left-padded."""
  examples = []
  for index, row in enumerate(rows):
    prompt = tokenizer.prompt(records.conversation(row))
    prompt = _fit(prompt, length, overlong, row, 'prompt', length, tokenizer.bos_id)
    if prompt is not None:
      examples.append(left_padded(prompt, length, tokenizer.pad_id, index))
  return _some(examples, 'prompt', length, len(rows))


def left_padded(tokens, length: int, pad_id: int, index: int) -> dict:
  """One prompt of at most `length` tokens, as `prompts` gives them."""
  padded, mask = np.full(length, pad_id, np.int32), np.zeros(length, bool)
  padded[length - len(tokens):], mask[length - len(tokens):] = tokens, True
  return {'tokens': padded, 'mask': mask, 'index': np.int32(index)}


def _example(tokens, first_target):
  targets = np.ones(len(tokens), np.float32)
  targets[:first_target] = 0
  return {'tokens': np.array(tokens, np.int32), 'targets': targets}


def _fit(prompt, room, overlong, row, kind, length, bos_id):
  """The prompt, cut if the policy says so; None = leave the record out."""
  if overlong not in POLICIES:
    raise UserError(f'overlong: expected one of {", ".join(POLICIES)}, got {overlong!r}')
  if len(prompt) <= room:
    return prompt
  if overlong == 'error':
    raise UserError(f'{kind} {row.id}: {len(prompt) + length - room} tokens do not fit the limit of {length} '
                    '(length); raise it, or set overlong to "drop" or "truncate_left"')
  start = [bos_id] if prompt[0] == bos_id else []
  if overlong == 'drop' or room <= len(start):
    return None
  return start + prompt[len(prompt) - room + len(start):]


def _some(examples, kind, length, count=None):
  if count and len(examples) < count:
    print(f'{count - len(examples)} of {count} {kind}s are longer than {length} tokens and were left out',
          file=sys.stderr)
  if not examples:
    raise UserError(f'no {kind} fits {length} tokens; raise the length')
  return examples
