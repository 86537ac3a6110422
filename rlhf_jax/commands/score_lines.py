"""Implements the command `score`: log-probabilities or scores of the lines of a file.

Shape letters: B rows of a batch, T their padded length, D width of the model.
"""

import argparse
from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.commands import inputs, lines
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import compilation
from rlhf_jax.stages import reward
from rlhf_jax.types import Params


def score_lines(options: argparse.Namespace) -> None:
  """Writes --output: the lines of --input with log-probabilities or scores.

  Raises:
    UserError: whatever is wrong with options, model, input or output.
  """
  compilation.cache_compilations()
  compilation.request_exact_products()
  # the input before the model, so that a mistake in it is reported at once
  lines.fix_date(options.output)
  read = inputs.read_lines(options.input, with_response=True)
  opened = lines.open_model(options)
  ids = lines.encode_lines(read, opened)
  texts = [text for line in ids for text in line]
  lengths = [len(text) for text in texts]  # of the responses, where they count
  if opened.model.config.likelihood_head:
    lengths = []
    for line, encoded in zip(read, ids, strict=True):
      lengths += inputs.response_lengths(line, opened.tokenizer, encoded)
  # compiled once for each padded length
  evaluate = jax.jit(functools.partial(read_tokens, opened.model))
  compute = functools.partial(score_batch, opened, evaluate, options.batch_size, texts, lengths)
  lines.fill_output(
    options,
    dict(command='score'),
    read,
    ids,
    compute,
    merge_results,
    lines.max_padded_length(opened.model.config),
  )


def merge_results(results: list[lines.Row]) -> lines.Row:
  """Returns what is added to a line with a list of responses: a list of their results."""
  if 'score' in results[0]:
    return {'scores': [result['score'] for result in results]}
  return {'sequences': results}


def read_tokens(
  model: Model,
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  response: jax.Array,
) -> jax.Array:
  """Computes the scores or the log-probabilities of right-padded rows.

  Args:
    model: the definition of the model.
    params: its parameters.
    tokens: [B, T] int32.
    mask: [B, T] bool, True = a token of the row.
    response: [B, T] bool, True = a token of the response.

  Returns:
    For a reward model the scores, [B] float32. For a language model the
    log-probabilities of all tokens but the first, [B, T - 1] float32, in nats.
  """
  positions = jnp.where(mask, jnp.arange(tokens.shape[1]), 0)
  segment_ids = mask.astype(jnp.int32)
  if model.config.head:
    return reward.last_scores(model, params, tokens, positions, segment_ids, response)
  hidden, _ = model.apply(params, tokens, positions, segment_ids)  # [B, T, D]
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])
  return logprobs


def score_batch(
  opened: lines.OpenedModel,
  read: Callable[..., jax.Array],
  batch_size: int,
  ids: Sequence[Sequence[int]],
  lengths: Sequence[int],
  numbers: Sequence[int],
  length: int,
  key: jax.Array,
) -> list[lines.Row]:
  """Scores a batch of rows.

  Args:
    opened: the model.
    read: the compiled `read_tokens` of this model.
    batch_size: B.
    ids: the token ids of every row of the file.
    lengths: how many of them are the response's.
    numbers: which rows are computed, at most B.
    length: T.
    key: not used, as nothing is random.

  Returns:
    The fields that are added to each of these rows.
  """
  del key
  # always B rows, as another number of rows would compile another program
  tokens = np.zeros((batch_size, length), np.int32)
  mask = np.zeros((batch_size, length), bool)
  response = np.zeros((batch_size, length), bool)
  for row, number in enumerate(numbers):
    count = len(ids[number])
    tokens[row, :count] = ids[number]
    mask[row, :count] = True
    response[row, count - lengths[number] : count] = True
  placed = opened.layout.place((tokens, mask, response))
  values = jax.device_get(read(opened.params, *placed))  # [B] or [B, T - 1]
  rows: list[lines.Row] = []
  for row, number in enumerate(numbers):
    if opened.model.config.head:
      rows.append(dict(score=lines.round_float32(values[row])))
    else:
      # one for each token but the first, as nothing precedes it
      logprobs = values[row][: len(ids[number]) - 1]
      rows.append(
        dict(
          tokens=ids[number],
          logprobs=list(map(lines.round_float32, logprobs)),
        )
      )
  return rows
