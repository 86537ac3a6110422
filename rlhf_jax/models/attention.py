"""Masks and grouped-query attention.

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N, C head_dim.
"""

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that a query with nothing to see yields garbage that is masked later, never NaN


def causal_mask(query_segments, key_segments, start=0):
  """Who sees whom: keys at or before the query, of the same segment, never padding.

  Args:
    query_segments: [B, T] int32, the segments of places start .. start + T - 1 of the keys.
    key_segments: [B, S] int32, 0 = padding or not yet written.
    start: place of the first query among the keys, [] int32.

  Returns:
    [B, T, S] bool.
  """
  same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
  return same & (distances(query_segments.shape[1], key_segments.shape[1], start) >= 0)


def distances(queries, keys, start=0):
  """How many places before the query each key stands: [T, S] int32."""
  return start + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]


def attend(query, key, value, mask, scale=None, cap=0.0):
  """Grouped-query attention, softmax in float32.

  Args:
    query: [B, T, H, C].
    key, value: [B, S, N, C], H a multiple of N.
    mask: [B, T, S] bool.
    scale: of the logits, C^-0.5 by default.
    cap: logits l become cap · tanh(l / cap) (Gemma 2, arXiv:2408.00118, section 2); 0 = as they are.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  B, T, H, C = query.shape
  S, N = key.shape[1:3]
  # the G heads that share a key stand below each other: two plain batched products, whatever G is
  rows = query.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4).reshape(B, N, -1, C) * (scale or C ** -0.5)
  logits = jnp.einsum('bnrc,bsnc->bnrs', rows, key, preferred_element_type=jnp.float32).reshape(B, N, -1, T, S)
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, NEVER), axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bnrs,bsnc->bnrc', weights.reshape(B, N, -1, S), value)
  return mixed.reshape(B, N, H // N, T, C).transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)
