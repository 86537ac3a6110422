"""The work of the command `score`: logprobs or scores of the lines of a file.

Letters: B rows of a batch, T their padded length.
"""

import argparse
from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.commands import lines
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import compilation
from rlhf_jax.stages import reward
from rlhf_jax.types import Params


def score_lines(options: argparse.Namespace) -> None:
  """Writes --output: the lines of --input with logprobs or scores.

  Raises:
    UserError: whatever is wrong with options, model, input or output.
  """
  compilation.cache_compilations()
  compilation.request_exact_products()
  # the input before the model: a mistake in it is told at once
  inputs = lines.read_lines(options.input)
  opened = lines.open_model(options)
  ids = lines.encode_lines(inputs, opened, with_response=True)
  # compiled once for each padded length
  read = jax.jit(functools.partial(read_tokens, opened.model))
  compute = functools.partial(score_batch, opened, read, options.batch_size, ids)
  lines.fill_output(
    options,
    dict(command='score'),
    inputs.rows,
    ids,
    compute,
    lines.max_padded_length(opened.model.config),
  )


def read_tokens(model: Model, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Computes what a model says of right-padded rows.

  Args:
    model: its definition.
    params: its parameters.
    tokens: [B, T] int32.
    mask: [B, T] bool, True = a token of the row.

  Returns:
    Of a reward model the scores, [B] float32; of a language model the logprobs of each
    token but the first, [B, T - 1] float32.
  """
  # right-padded, so that a text has the positions it was trained with
  positions = jnp.where(mask, jnp.arange(tokens.shape[1]), 0)
  segment_ids = mask.astype(jnp.int32)
  if model.config.head:
    return reward.last_scores(model, params, tokens, positions, segment_ids)
  hidden, _ = model.apply(params, tokens, positions, segment_ids)  # [B, T, D]
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])
  return logprobs


def score_batch(
  opened: lines.OpenedModel,
  read: Callable[..., jax.Array],
  batch_size: int,
  ids: Sequence[Sequence[int]],
  numbers: Sequence[int],
  length: int,
  key: jax.Array,
) -> list[lines.Row]:
  """Scores a batch of rows.

  Args:
    opened: the model.
    read: read_tokens of this model, compiled.
    batch_size: B.
    ids: the tokens of every row.
    numbers: of at most B rows.
    length: T.
    key: not used; nothing is random.

  Returns:
    What is added to each of these rows.
  """
  del key
  # always B rows: another size would be compiled again
  tokens = np.zeros((batch_size, length), np.int32)
  mask = np.zeros((batch_size, length), bool)
  for row, number in enumerate(numbers):
    count = len(ids[number])
    tokens[row, :count] = ids[number]
    mask[row, :count] = True
  placed = opened.layout.place((tokens, mask))
  values = jax.device_get(read(opened.params, *placed))  # [B] or [B, T - 1]
  rows: list[lines.Row] = []
  for row, number in enumerate(numbers):
    if opened.model.config.head:
      rows.append(dict(score=lines.round_float32(values[row])))
    else:
      # one for each token but the first, which nothing predicts
      logprobs = values[row][: len(ids[number]) - 1]
      rows.append(
        dict(
          tokens=ids[number],
          logprobs=list(map(lines.round_float32, logprobs)),
        )
      )
  return rows
