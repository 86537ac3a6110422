"""From hidden states to numbers: log-probabilities, next-token logits, scalar scores.

The logits of a whole batch, [B, T, V], are never kept: they are made, used and
forgotten chunk by chunk.

Letters: B batch, T length, V vocabulary, D width.
"""

from collections.abc import Callable
import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.model_config import product_precision
from rlhf_jax.types import Params

if TYPE_CHECKING:  # only named here; the transformer is no part of a head
  from rlhf_jax.models.transformer import Model

EMPTY_LOGIT = -1e9  # of ids that stand for no token; finite, as entropies multiply with it
CHUNK = 128  # places whose logits exist at one time


def unembedding(params: Params) -> jax.Array:
  """Returns the output matrix, the transposed embedding where the two are tied.

  Args:
    params: of a model.

  Returns:
    [D, V].
  """
  if 'unembedding' in params:
    return params['unembedding']
  return params['embedding'].T


def next_token_logits(model: 'Model', params: Params, hidden: jax.Array) -> jax.Array:
  """Computes the logits of the next token, soft-capped if the model's are.

  Args:
    model: what made the hidden states.
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
  """Computes log-probabilities of targets, and entropies, under the model.

  Both are of softmax(logits / temperature).

  Args:
    model: what made the hidden states.
    params: its parameters.
    hidden: [B, T, D], each place predicting the target at the same place.
    targets: [B, T] int32.
    temperature: the one the tokens were, or would be, sampled with; 0 (greedy) counts
      as 1.

  Returns:
    (logprobs, entropies), both [B, T] float32, nats.
  """
  B, T = targets.shape
  places = min(T, CHUNK)
  chunk: Callable[..., tuple[jax.Array, jax.Array]] = functools.partial(
    _chunk_logprobs, model, temperature or 1.0
  )
  if T > places:
    chunk = jax.checkpoint(chunk)  # or the backward pass keeps every chunk's logits

  def map_chunks(matrix: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
    return jax.lax.map(lambda rows: chunk(matrix, *rows), (hidden, targets))

  results = model.with_gathered_matrix(
    map_chunks,
    unembedding(params),
    _split_chunks(hidden, places),
    _split_chunks(targets, places),
  )
  logprobs, entropies = (jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T] for x in results)
  return logprobs, entropies


def scalar_scores(params: Params, hidden: jax.Array) -> jax.Array:
  """Applies the scalar head at each place, in float32.

  Args:
    params: of a model with a head.
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
  if model.config.empty_ids:
    is_empty = np.zeros(model.config.vocab_size, bool)
    for first, behind in model.config.empty_ids:
      is_empty[first:behind] = True
    logits = jnp.where(is_empty, EMPTY_LOGIT, logits)
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


def _split_chunks(x: jax.Array, places: int) -> jax.Array:
  """Splits [B, T, …] into chunks [n, B, places, …], the last one padded with zeros.

  A chunk takes every n-th place: one that is cut over devices keeps all of them busy.
  """
  B, T = x.shape[:2]
  padding = [(0, 0), (0, -T % places)] + [(0, 0)] * (x.ndim - 2)
  rows = jnp.pad(x, padding).reshape(B, places, -1, *x.shape[2:])
  return jnp.moveaxis(rows, 2, 0)  # chunks first: they are mapped over
