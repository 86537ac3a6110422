"""Computes log-probabilities, next-token logits and scalar scores from hidden states.

The logits of a whole batch, [B, T, V], never exist at one time: they are computed
and reduced chunk by chunk.

Letters: B batch, T length, V vocabulary, D width.
"""

import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import column_blocks
from rlhf_jax.models.exact import Multiply
from rlhf_jax.models.model_config import product_precision
from rlhf_jax.types import Params

if TYPE_CHECKING:  # for annotations only
  from rlhf_jax.models.transformer import Model

EMPTY_LOGIT = -1e9  # of ids that stand for no token; finite, as entropies multiply with it
NUM_LIKELIHOODS = 2  # numbers that say how likely a response is: see likelihood_features
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
  blocks = params.get(column_blocks.KEY, {})
  if 'unembedding' in blocks:
    return _compute_logits(model, column_blocks.multiply, blocks['unembedding'], hidden)
  return _compute_logits(model, model.arithmetic.logits, unembedding(params), hidden)


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
    (logprobs, entropies), both [B, T] float32, nats. Entropies have no gradient.
  """
  B, T = targets.shape
  chunk_length = min(T, CHUNK)
  # the logits of a single chunk are stored for the backward pass, those of several are not
  keep_logits = T <= chunk_length
  chunk = functools.partial(_chunk_logprobs, model, temperature or 1.0, keep_logits)

  def map_chunks(matrix: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
    return jax.lax.map(lambda rows: chunk(matrix, *rows), (hidden, targets))

  results = model.with_gathered_matrix(
    map_chunks,
    unembedding(params),
    _split_chunks(hidden, chunk_length),
    _split_chunks(targets, chunk_length),
  )
  logprobs, entropies = (jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T] for x in results)
  return logprobs, jax.lax.stop_gradient(entropies)


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


def likelihood_features(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """Summarises how likely the tokens of a response are: their mean and their minimum.

  A falsehood in fluent words has one improbable token, which the mean hides and the minimum shows.

  Args:
    logprobs: [..., T] float32, of each token.
    mask: [..., T] bool, the tokens of the response.

  Returns:
    [..., NUM_LIKELIHOODS] float32, nats; 0 for a response without tokens.
  """
  mean = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1)
  lowest = jnp.min(jnp.where(mask, logprobs, 0.0), axis=-1)  # log-probabilities are at most 0
  return jnp.stack([mean, lowest], axis=-1)


def likelihood_scores(params: Params, logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """Computes what the likelihood of a response adds to its score.

  Args:
    params: the parameters of a model whose config has `likelihood_head`.
    logprobs: [..., T] float32, of each token under the model itself.
    mask: [..., T] bool, the tokens of the response.

  Returns:
    [...] float32.
  """
  head = params['score']
  # Adam moves every weight by about the learning rate. The hidden state has D of
  # them and this part two, so these count D times, to be learned as fast.
  weights = head['kernel'].shape[0] * head['likelihood']
  return likelihood_features(logprobs, mask) @ weights


def log_total(model: 'Model', shifted: jax.Array) -> jax.Array:
  """Computes log Σ exp over the vocabulary.

  Args:
    model: the model that computed the logits.
    shifted: [..., V] float32, logits less their maximum.

  Returns:
    [..., 1] float32.
  """
  return jnp.log(model.arithmetic.total(jnp.exp(shifted)))


def _compute_logits(
  model: 'Model',
  multiply: Multiply,
  matrix: jax.Array,
  hidden: jax.Array,
) -> jax.Array:
  """Multiplies hidden states [..., D] with [D, V]: [..., V] float32."""
  logits = multiply(hidden, matrix.astype(hidden.dtype))
  cap = model.config.logit_cap
  if cap:
    logits = model.arithmetic.rounded(cap * jnp.tanh(logits / cap))
  if model.config.empty_ids:
    is_empty = np.zeros(model.config.vocab_size, bool)
    for first, behind in model.config.empty_ids:
      is_empty[first:behind] = True
    logits = jnp.where(is_empty, EMPTY_LOGIT, logits)
  return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunk_logprobs(
  model: 'Model',
  temperature: float,
  keep_logits: bool,
  matrix: jax.Array,
  hidden: jax.Array,
  targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes `token_logprobs` of one chunk: hidden [B, C, D], targets [B, C].

  Its gradient is written out below: JAX's own would scatter into zeros of [B, C,
  V] and sum over them again, which costs as much as the products.
  """
  results, _ = _chunk_forward(model, temperature, keep_logits, matrix, hidden, targets)
  return results


def _chunk_forward(
  model: 'Model',
  temperature: float,
  keep_logits: bool,
  matrix: jax.Array,
  hidden: jax.Array,
  targets: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """Computes a chunk, and what its gradients need; logits only if they are to be kept."""
  logits = _compute_logits(model, model.arithmetic.own_logits, matrix, hidden)  # [B, C, V]
  scaled = model.arithmetic.rounded(logits / temperature)
  shifted = scaled - model.arithmetic.peak(scaled)
  logprobs = shifted - log_total(model, shifted)
  chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]  # [B, C]
  entropies = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
  saved = (matrix, hidden, targets, logits if keep_logits else None)
  return (chosen, entropies), saved


def _chunk_gradients(
  model: 'Model',
  temperature: float,
  keep_logits: bool,
  saved: Any,
  gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
  """Computes the gradients of the log-probabilities by the matrix and the hidden states.

  d log p(y) / d z = onehot(y) - p, with z the logits / temperature.
  """
  matrix, hidden, targets, logits = saved
  of_logprobs, _ = gradients  # entropies have none
  if not keep_logits:
    logits = _compute_logits(model, model.arithmetic.own_logits, matrix, hidden)
  probabilities = jax.nn.softmax(logits / temperature, axis=-1)
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]  # [B, C, V]
  of_logits = (is_target - probabilities) * (of_logprobs / temperature)[..., None]
  cap = model.config.logit_cap
  if cap:
    of_logits = of_logits * (1 - jnp.square(logits / cap))  # the slope of cap · tanh
  # the barrier has it computed once, for both products
  of_logits = jax.lax.optimization_barrier(of_logits.astype(hidden.dtype))
  compute = functools.partial(
    jnp.einsum,
    preferred_element_type=jnp.float32,
    precision=product_precision(hidden.dtype),
  )
  of_hidden = compute('bcv,dv->bcd', of_logits, matrix.astype(hidden.dtype))
  of_matrix = compute('bcd,bcv->dv', hidden, of_logits)
  return of_matrix.astype(matrix.dtype), of_hidden.astype(hidden.dtype), None


_chunk_logprobs.defvjp(_chunk_forward, _chunk_gradients)


def _split_chunks(x: jax.Array, length: int) -> jax.Array:
  """Splits [B, T, …], padded with zeros, into n chunks [n, B, length, …].

  A chunk takes every n-th position, so that each device has a share of every chunk
  where T is sharded.
  """
  B, T = x.shape[:2]
  padding = [(0, 0), (0, -T % length)] + [(0, 0)] * (x.ndim - 2)
  rows = jnp.pad(x, padding).reshape(B, length, -1, *x.shape[2:])
  return jnp.moveaxis(rows, 2, 0)  # chunks first, as lax.map maps over the first axis
