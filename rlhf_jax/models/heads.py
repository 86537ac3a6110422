"""From hidden states to numbers: log-probabilities of chosen tokens, next-token logits, scalar scores.

The logits of a whole batch, [B, T, V], are never kept: they are made, used and forgotten chunk by chunk.
"""

import jax
import jax.numpy as jnp

CHUNK = 128  # places whose logits exist at one time


def unembedding(params):
  """[D, V]: the output matrix, the transposed embedding where the two are tied."""
  return params['unembedding'] if 'unembedding' in params else params['embedding'].T


def next_token_logits(model, params, hidden):
  """Next-token logits [..., V] float32 of hidden [..., D], soft-capped where the model's are."""
  return _logits(model, unembedding(params), hidden)


def _logits(model, matrix, hidden):
  cap = model.config.logit_cap
  values = jnp.matmul(hidden, matrix.astype(hidden.dtype), preferred_element_type=jnp.float32)
  return cap * jnp.tanh(values / cap) if cap else values


def token_logprobs(model, params, hidden, targets, temperature=1.0):
  """Log-probabilities of targets, and entropies, under softmax(logits / temperature).

  Args:
    model, params: what made the hidden states.
    hidden: [B, T, D], each place predicting the target at the same place.
    targets: [B, T] int32.
    temperature: the one the tokens were, or would be, sampled with; 0 (greedy) counts as 1.

  Returns:
    (logprobs, entropies), both [B, T] float32, nats.
  """
  B, T = targets.shape
  places = min(T, CHUNK)
  pad = -T % places  # a chunk takes every n-th place: one that is cut over devices keeps all of them busy
  cut = lambda x: jnp.moveaxis(
      jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(B, places, -1, *x.shape[2:]), 2, 0)

  def chunk(matrix, hidden, targets):
    logprobs = jax.nn.log_softmax(_logits(model, matrix, hidden) / (temperature or 1.0), axis=-1)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)

  def chunks(matrix, *rows):
    one = jax.checkpoint(chunk) if pad + T > places else chunk
    return jax.lax.map(lambda row: one(matrix, *row), rows)

  found = model.with_gathered_matrix(chunks, unembedding(params), cut(hidden), cut(targets))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, -1)[:, :T], found)


def scalar_scores(params, hidden):
  """The scalar head at each place: [..., D] → [...] float32."""
  return hidden.astype(jnp.float32) @ params['score']['kernel'] + params['score']['bias']
