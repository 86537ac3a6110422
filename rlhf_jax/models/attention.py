"""Masks and grouped-query attention, in several implementations with equal numbers.

  plain   products and a softmax; works everywhere
  cudnn   cuDNN's flash attention through `jax.nn.dot_product_attention`: NVIDIA GPUs,
          bfloat16 or float16, no soft cap
  splash  a Pallas kernel that comes with JAX: TPUs (elsewhere interpreted, slowly),
          rows of whole blocks of 128 places
  auto    splash on a TPU and cudnn on a GPU, where they can; else plain

With a cache it is always the plain one.

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N,
C head_dim.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.model_config import ModelConfig, product_precision

BLOCK = 128  # places; splash takes rows of whole blocks

# The logit of a key that may not be seen. Finite, so that a query with nothing to see
# yields garbage that is masked later, never NaN.
NEVER = -1e30

BEST = {'gpu': 'cudnn', 'tpu': 'splash'}  # by platform; elsewhere plain


def causal_mask(
  query_segments: jax.Array,
  key_segments: jax.Array,
  start: jax.Array | int = 0,
) -> jax.Array:
  """Marks the keys that each query sees.

  Those at or before the query, of the same segment, and never padding.

  Args:
    query_segments: [B, T] int32, segments of the places start … start + T − 1.
    key_segments: [B, S] int32, 0 = padding or not yet written.
    start: [] int32, place of the first query among the keys.

  Returns:
    [B, T, S] bool.
  """
  T, S = query_segments.shape[1], key_segments.shape[1]
  same_segment = query_segments[:, :, None] == key_segments[:, None, :]
  is_token = key_segments[:, None, :] > 0
  return same_segment & is_token & (distances(T, S, start) >= 0)


def distances(queries: int, keys: int, start: jax.Array | int = 0) -> jax.Array:
  """Computes how many places before the query each key stands.

  Args:
    queries: T.
    keys: S.
    start: [] int32, place of the first query among the keys.

  Returns:
    [T, S] int32, negative for keys after the query.
  """
  return start + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  scale: float | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """Computes grouped-query attention with the softmax in float32.

  softmax(q·k scale) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), G query heads
  sharing a key-value head (Ainslie et al. 2023, arXiv:2305.13245).

  Args:
    query: [B, T, H, C].
    key: [B, S, N, C], H a multiple of N.
    value: [B, S, N, C].
    mask: [B, T, S] bool.
    scale: of the logits, C^-0.5 by default.
    cap: logits l become cap · tanh(l / cap) (Gemma 2, arXiv:2408.00118, section 2);
      0 = as they are.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  return attend_to_cache(
    query,
    key.swapaxes(1, 2),
    value.swapaxes(1, 2),
    mask,
    scale,
    cap,
  )


def attend_to_cache(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  scale: float | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """Computes `attend` of keys and values as a cache holds them, the heads before the places.

  Then the products of each head read one block of memory. Otherwise XLA's CPU backend
  would copy the whole cache into this order for every token.

  Args:
    query: [B, T, H, C].
    key: [B, N, S, C].
    value: [B, N, S, C].
    mask: [B, T, S] bool.
    scale: as in `attend`.
    cap: as in `attend`.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  B, T, H, C = query.shape
  N = key.shape[1]
  if scale is None:
    scale = C**-0.5
  # The G heads that share a key stay an axis of their own: joined with T, XLA could not
  # cut T over devices.
  groups = query.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4) * scale
  logits = jnp.einsum(
    'bngtc,bnsc->bngts',
    groups,
    key,
    preferred_element_type=jnp.float32,
    precision=product_precision(query.dtype),
  )
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  logits = jnp.where(mask[:, None, None], logits, NEVER)  # [B, N, G, T, S]
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  mixed = jnp.einsum('bngts,bnsc->bngtc', weights, value)  # [B, N, G, T, C]
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


def choose_implementation(
  config: ModelConfig,
  places: int,
  cached: bool,
  platform: str,
  cut: bool = False,
) -> str:
  """Chooses the implementation of attention: 'plain', 'cudnn' or 'splash'.

  Args:
    config: its `attention` is what the user asks for.
    places: T.
    cached: there is a cache.
    platform: 'cpu', 'gpu' or 'tpu'.
    cut: the places of a row lie on several devices.

  Raises:
    UserError: the implementation that was asked for cannot do this.
  """
  if cached:
    return 'plain'
  obstacles = find_obstacles(config, places, cut)
  wanted = config.attention
  if wanted == 'auto':
    best = BEST.get(platform, 'plain')
    return 'plain' if best in obstacles else best
  if wanted in obstacles:
    raise UserError(f'model.attention: {wanted} needs {obstacles[wanted]}')
  return wanted


def find_obstacles(config: ModelConfig, places: int, cut: bool) -> dict[str, str]:
  """Finds the implementations that cannot be used, with what each would need.

  Args:
    config: of the model.
    places: T.
    cut: the places of a row lie on several devices.
  """
  obstacles = {}
  head_fits = config.head_dim % 8 == 0 and config.head_dim <= 128
  if config.dtype == 'float32' or config.attention_cap or not head_fits:
    obstacles['cudnn'] = (
      'bfloat16 or float16, a head_dim of 8 to 128 in steps of 8, and no soft cap'
    )
  if places % BLOCK:
    obstacles['splash'] = f'rows of a multiple of {BLOCK} places, got {places}'
  if cut:
    whole_rows = 'whole rows: mesh.context 1'
    obstacles |= {'cudnn': whole_rows, 'splash': whole_rows}
  return obstacles


def attend_with_library(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  scale: float | None = None,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Computes `attend` by jax.nn.dot_product_attention, where T = S.

  cuDNN refuses rows of an odd length in training where there is a mask, so such rows
  get one place more, which is cut off again.

  Args:
    query: [B, T, H, C].
    key: [B, T, N, C].
    value: [B, T, N, C].
    mask: [B, T, T] bool.
    scale: of the logits, C^-0.5 by default.
    implementation: 'cudnn', or 'xla' in tests.

  Returns:
    [B, T, H, C].
  """
  T = query.shape[1]
  places = T + T % 2
  if places > T:
    query, key, value = (_pad_axes(x, (1,)) for x in (query, key, value))
    mask = _pad_axes(mask, (1, 2))
  # Queries that see nothing see themselves: no library says what comes of a softmax
  # over nothing.
  mask = mask | jnp.eye(places, dtype=bool)
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask[:, None],
    scale=scale,
    implementation=implementation,
  )
  return out[:, :T]


def _pad_axes(x: jax.Array, axes: Sequence[int]) -> jax.Array:
  """Appends one zero along each of these axes."""
  padding = [(0, int(axis in axes)) for axis in range(x.ndim)]
  return jnp.pad(x, padding)


def attend_with_splash(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: jax.Array,
  window: jax.Array | int,
  windows: Sequence[int],
  scale: float | None = None,
  cap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Computes `attend` by JAX's Pallas kernel, where T = S.

  It never makes [T, S], and skips blocks that nobody sees.

  Args:
    query: [B, T, H, C].
    key: [B, T, N, C].
    value: [B, T, N, C].
    segments: [B, T] int32; here padding sees padding.
    window: [] int32, how many places back a query sees; may be traced.
    windows: all values that `window` can have, sorted.
    scale: of the logits, C^-0.5 by default.
    cap: soft cap of the logits; 0 = none.
    interpret: run step by step, where there is no TPU.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  if scale is None:
    scale = query.shape[-1] ** -0.5
  # A kernel's window is fixed when it is made: there is one for each.
  kernels = [
    functools.partial(
      _attend_in_window,
      window=size,
      scale=scale,
      cap=cap,
      interpret=interpret,
    )
    for size in windows
  ]
  if len(kernels) == 1:
    return kernels[0](query, key, value, segments)
  number = jnp.searchsorted(jnp.asarray(windows), window)
  return jax.lax.switch(number, kernels, query, key, value, segments)


def _attend_in_window(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segments: jax.Array,
  window: int,
  scale: float,
  cap: float,
  interpret: bool,
) -> jax.Array:
  """Computes `attend_with_splash` for one fixed window."""
  # imported late: Pallas for TPUs takes a second, and most runs need none of it
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  T, H = query.shape[1:3]
  mask: splash_attention_mask.Mask = splash_attention_mask.CausalMask((T, T))
  if window < T:
    mask = splash_attention_mask.LocalMask((T, T), (window - 1, 0), 0)
  kernel: Callable[..., jax.Array] = splash_attention_kernel.make_splash_mha(
    splash_attention_mask.MultiHeadMask([mask] * H),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash_attention_kernel.BlockSizes(**_block_sizes(T)),
    attn_logits_soft_cap=cap if cap else None,
    interpret=interpret,
  )

  def attend_row(
    query: jax.Array,  # [H, T, C]
    key: jax.Array,  # [N, T, C]
    value: jax.Array,
    segments: jax.Array,  # [T]
  ) -> jax.Array:
    ids = splash_attention_kernel.SegmentIds(segments, segments)
    return kernel(query, key, value, ids)

  mixed = jax.vmap(attend_row)(
    (query * scale).swapaxes(1, 2),  # [B, H, T, C]
    key.swapaxes(1, 2),  # [B, N, T, C]
    value.swapaxes(1, 2),
    segments,
  )
  return mixed.swapaxes(1, 2).astype(query.dtype)


def _block_sizes(places: int) -> dict[str, Any]:
  """Returns the block sizes of all of the kernel's loops: the largest that divides."""
  sizes = [BLOCK, 2 * BLOCK, 4 * BLOCK]
  block = max(size for size in sizes if places % size == 0)
  names = (
    'block_q',
    'block_kv',
    'block_kv_compute',
    'block_q_dkv',
    'block_kv_dkv',
    'block_kv_dkv_compute',
    'block_q_dq',
    'block_kv_dq',
  )
  return dict.fromkeys(names, block)
