"""Computes log-probabilities, next-token logits and scalar scores from hidden states.

The logits of a whole batch, [B, T, V], never exist at one time: they are computed and
reduced chunk by chunk.

Letters: B batch, T length, V vocabulary, D width.
"""

from collections.abc import Callable
import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp

from rlhf_jax.models.model_config import product_precision
from rlhf_jax.types import Params

if TYPE_CHECKING:  # for annotations only
  from rlhf_jax.models.transformer import Model

CHUNK = 128  # positions of a row whose logits exist at one time


def unembedding(params: Params) -> jax.Array:
  """Returns the unembedding, which is the transposed embedding if the two are tied.

  Args:
    params: the parameters of a model.

  Returns:
    [D, V].
  """
  if 'unembedding' in params:
    return params['unembedding']
  return params['embedding'].T


def next_token_logits(model: 'Model', params: Params, hidden: jax.Array) -> jax.Array:
  """Computes the logits of the next token, with the model's soft cap if it has one.

  Args:
    model: the model that computed the hidden states.
    params: its parameters.
    hidden: [..., D].

  Returns:
    [..., V] float32.
  """
  return _compute_logits(model, unembedding(params), hidden)


def token_logprobs(
  model: 'Model',
  params: Params,
  hidden: jax.Array,
  targets: jax.Array,
  temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Computes the log-probabilities of targets, and the entropies of the predictions.

  The predictions are softmax(logits / temperature).

  Args:
    model: the model that computed the hidden states.
    params: its parameters.
    hidden: [B, T, D]; hidden[:, t] predicts targets[:, t].
    targets: [B, T] int32.
    temperature: the sampling temperature; 0 (greedy) counts as 1.

  Returns:
    (logprobs, entropies), both [B, T] float32, nats.
  """
  B, T = targets.shape
  chunk_length = min(T, CHUNK)
  chunk: Callable[..., tuple[jax.Array, jax.Array]] = functools.partial(
    _chunk_logprobs, model, temperature or 1.0
  )
  if T > chunk_length:
    # otherwise the logits of every chunk would be stored for the backward pass
    chunk = jax.checkpoint(chunk)

  def map_chunks(matrix: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
    return jax.lax.map(lambda rows: chunk(matrix, *rows), (hidden, targets))

  results = model.with_gathered_matrix(
    map_chunks,
    unembedding(params),
    _split_chunks(hidden, chunk_length),
    _split_chunks(targets, chunk_length),
  )
  logprobs, entropies = (jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T] for x in results)
  return logprobs, entropies


def scalar_scores(params: Params, hidden: jax.Array) -> jax.Array:
  """Applies the scalar head at each position, in float32.

  Args:
    params: the parameters of a model with a scalar head.
    hidden: [..., D].

  Returns:
    [...] float32.
  """
  head = params['score']
  return hidden.astype(jnp.float32) @ head['kernel'] + head['bias']


def _compute_logits(model: 'Model', matrix: jax.Array, hidden: jax.Array) -> jax.Array:
  """Multiplies hidden states [..., D] with [D, V]: [..., V] float32."""
  matrix = matrix.astype(hidden.dtype)
  logits = jnp.matmul(
    hidden,
    matrix,
    preferred_element_type=jnp.float32,
    precision=product_precision(hidden.dtype),
  )
  cap = model.config.logit_cap
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  return logits


def _chunk_logprobs(
  model: 'Model',
  temperature: float,
  matrix: jax.Array,
  hidden: jax.Array,
  targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes `token_logprobs` of one chunk: hidden [B, C, D], targets [B, C]."""
  logits = _compute_logits(model, matrix, hidden) / temperature  # [B, C, V]
  logprobs = jax.nn.log_softmax(logits, axis=-1)
  chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
  return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def _split_chunks(x: jax.Array, length: int) -> jax.Array:
  """Splits [B, T, …], padded with zeros, into n chunks [n, B, length, …].

  A chunk takes every n-th position, so that each device has a share of every chunk
  where T is sharded.
  """
  B, T = x.shape[:2]
  padding = [(0, 0), (0, -T % length)] + [(0, 0)] * (x.ndim - 2)
  rows = jnp.pad(x, padding).reshape(B, length, -1, *x.shape[2:])
  return jnp.moveaxis(rows, 2, 0)  # chunks first, as lax.map maps over the first axis
