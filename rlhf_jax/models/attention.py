"""Rotary positions, masks and grouped-query attention.

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N, C head_dim.
"""

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that a query with nothing to see yields garbage that is masked later, never NaN


def rotate(x, positions, theta):
  """Rotary position embedding in the half-split form of Hugging Face (Su et al. 2021, arXiv:2104.09864, eq. 34).

  Args:
    x: [B, T, H, C].
    positions: [B, T] int32.
    theta: base of the wavelengths.

  Returns:
    [B, T, H, C], the dtype of x.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(query_segments, key_segments, start=0):
  """Who sees whom: keys at or before the query, of the same segment, never padding.

  Args:
    query_segments: [B, T] int32, the segments of places start .. start + T - 1 of the keys.
    key_segments: [B, S] int32, 0 = padding or not yet written.
    start: place of the first query among the keys, [] int32.

  Returns:
    [B, T, S] bool.
  """
  query_places = start + jnp.arange(query_segments.shape[1])[:, None]
  key_places = jnp.arange(key_segments.shape[1])[None, :]
  same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
  return same & (key_places <= query_places)


def attend(query, key, value, mask):
  """Grouped-query attention, softmax in float32.

  Args:
    query: [B, T, H, C].
    key, value: [B, S, N, C], H a multiple of N.
    mask: [B, T, S] bool.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  B, T, H, C = query.shape
  N = key.shape[2]
  # the G heads that share a key stay an axis of their own: with T in one, XLA could not cut T over devices
  rows = query.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4) * C ** -0.5
  logits = jnp.einsum('bngtc,bsnc->bngts', rows, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, NEVER), axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bngts,bsnc->bngtc', weights, value)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)
