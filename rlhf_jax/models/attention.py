"""Masks and grouped-query attention, by several hands that give the same numbers:

  plain   products and a softmax; anything, anywhere
  cudnn   cuDNN's flash attention through `jax.nn.dot_product_attention`: NVIDIA GPUs, bfloat16 or float16, no soft cap
  splash  a Pallas kernel that comes with JAX: TPUs (elsewhere interpreted, slowly), rows of whole blocks of 128 places
  auto    splash on a TPU, cudnn on a GPU, where they can; else plain

With a cache it is always the plain one.

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N, C head_dim.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError

BLOCK = 128  # places; splash takes rows of whole blocks
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
  N = key.shape[2]
  # the G heads that share a key stay an axis of their own: with T in one, XLA could not cut T over devices
  rows = query.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4) * (scale or C ** -0.5)
  logits = jnp.einsum('bngtc,bsnc->bngts', rows, key, preferred_element_type=jnp.float32)
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, NEVER), axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bngts,bsnc->bngtc', weights, value)
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def pick(config, places, cached, platform, cut=False):
  """Who computes attention: 'plain', 'cudnn' or 'splash'.

  Args:
    config: a ModelConfig; `attention` is the wish.
    places: T.
    cached: there is a cache.
    platform: 'cpu', 'gpu' or 'tpu'.
    cut: the places of a row lie on several devices.

  Raises:
    UserError: who was wished for cannot.
  """
  cannot = {'plain': '', 'cudnn': '', 'splash': ''}
  if config.dtype == 'float32' or config.attention_cap or config.head_dim % 8 or config.head_dim > 128:
    cannot['cudnn'] = 'needs bfloat16 or float16, a head_dim of 8 to 128 in steps of 8, and no soft cap'
  if places % BLOCK:
    cannot['splash'] = f'needs rows of a multiple of {BLOCK} places, got {places}'
  if cut:
    cannot['cudnn'] = cannot['splash'] = 'needs whole rows: mesh.context 1'
  if cached:
    return 'plain'
  if config.attention != 'auto':
    if cannot[config.attention]:
      raise UserError(f'model.attention: {config.attention} {cannot[config.attention]}')
    return config.attention
  best = {'gpu': 'cudnn', 'tpu': 'splash'}.get(platform, 'plain')
  return 'plain' if cannot[best] else best


def library(query, key, value, mask, scale=None, implementation='cudnn'):
  """`attend` by jax.nn.dot_product_attention, where T = S. Queries that see nothing see themselves: no library says
  what comes of a softmax over nothing."""
  mask = mask | jnp.eye(mask.shape[1], dtype=bool)
  return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale, implementation=implementation)


def splash(query, key, value, segments, window, windows, scale=None, cap=0.0, interpret=False):
  """`attend` by JAX's Pallas kernel, where T = S. It never makes [T, S], and passes over blocks that nobody sees.

  Args:
    query, key, value: as `attend` takes them.
    segments: [B, T] int32; padding sees padding.
    window: how many places back a query sees; may be traced.
    windows: all values that window can have, sorted.
    interpret: step by step, where there is no TPU.
  """
  one = lambda size: functools.partial(_splash, window=size, scale=scale or query.shape[-1] ** -0.5, cap=cap,
                                       interpret=interpret)
  if len(windows) == 1:
    return one(windows[0])(query, key, value, segments)
  which = jnp.searchsorted(jnp.asarray(windows), window)
  return jax.lax.switch(which, [one(size) for size in windows], query, key, value, segments)


def _splash(query, key, value, segments, window, scale, cap, interpret):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
  T, H = query.shape[1:3]
  block = max(size for size in (BLOCK, 2 * BLOCK, 4 * BLOCK) if T % size == 0)
  sizes = kernels.BlockSizes(**dict.fromkeys((
      'block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv', 'block_kv_dkv_compute', 'block_q_dq',
      'block_kv_dq'), block))
  seen = masks.LocalMask((T, T), (window - 1, 0), 0) if window < T else masks.CausalMask((T, T))
  kernel = kernels.make_splash_mha(
      masks.MultiHeadMask([seen] * H), head_shards=1, q_seq_shards=1, block_sizes=sizes,
      attn_logits_soft_cap=cap or None, interpret=interpret)
  row = lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids))
  heads_first = [x.swapaxes(1, 2) for x in (query * scale, key, value)]
  return jax.vmap(row)(*heads_first, segments).swapaxes(1, 2).astype(query.dtype)
