"""Masks and grouped-query attention, in several implementations with the same results.

  plain   matrix products and a softmax; works everywhere
  cudnn   cuDNN's flash attention through `jax.nn.dot_product_attention`: NVIDIA GPUs,
          bfloat16 or float16, no soft cap
  splash  the Pallas kernel that comes with JAX: TPUs (interpreted slowly elsewhere),
          rows of a multiple of 128 tokens
  auto    splash on a TPU and cudnn on a GPU if they support the model, else plain

With a cache, attention is plain, except for single queries on a GPU
(decode_attention.py).

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N,
C head_dim.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import decode_attention
from rlhf_jax.models.decode_attention import MASKED_LOGIT
from rlhf_jax.models.model_config import ModelConfig, product_precision

BLOCK = 128  # tokens; the length of a row must be a multiple of it for splash

# Slots of a cache: its first segment has twice as many, and no segment has fewer.
LEAST_READ = 64

FASTEST = {'gpu': 'cudnn', 'tpu': 'splash'}  # platform → implementation; plain elsewhere


def causal_mask(
  query_segments: jax.Array,
  key_segments: jax.Array,
  start: jax.Array | int = 0,
  prefix_ids: jax.Array | None = None,
) -> jax.Array:
  """Marks the keys that each query attends to.

  These are the keys at or before the query, in the same segment or in the one that this
  continues, but never padding.

  Args:
    query_segments: [B, T] int32, segment ids of the queries start … start + T − 1.
    key_segments: [B, S] int32, segment ids of the keys; 0 = padding or not yet written.
    start: [] or [B] int32, the index of the first query among the keys.
    prefix_ids: [B, T] int32, the ids of the segments that those of the queries continue; 0 or
      None = none.

  Returns:
    [B, T, S] bool.
  """
  T, S = query_segments.shape[1], key_segments.shape[1]
  same_segment = query_segments[:, :, None] == key_segments[:, None, :]
  if prefix_ids is not None:
    same_segment |= prefix_ids[:, :, None] == key_segments[:, None, :]
  is_token = key_segments[:, None, :] > 0
  return same_segment & is_token & (distances(T, S, start) >= 0)


def distances(queries: int, keys: int, start: jax.Array | int = 0) -> jax.Array:
  """Computes the distance from each key to each query, in tokens.

  Args:
    queries: the number of queries, T.
    keys: the number of keys, S.
    start: [] or [B] int32, the index of the first query among the keys.

  Returns:
    [T, S] or [B, T, S] int32, negative for keys after the query.
  """
  first = jnp.asarray(start)[..., None, None]
  return first + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]


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
    scale: the logits are q·k × scale; None = C^-0.5.
    cap: logits l become cap · tanh(l / cap) (Gemma 2, arXiv:2408.00118, section 2);
      0 = no cap.

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
  """Computes `attend` with keys and values as a cache stores them: heads before tokens.

  In this order the products of a head read one block of memory; in the other,
  XLA's CPU backend would copy the whole cache into this order for every token.

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
  return _attend_to_all(query, [key], [value], mask, scale, cap)


def segment_sizes(places: int) -> list[int]:
  """Returns the slots of each segment of a cache, which is an array of its own.

  Each segment has as many slots as all before it, so that what is filled is read as whole
  arrays of at most twice the size. XLA's CPU backend would copy the first slots of a single
  array before every product, which takes longer than the product.

  >>> segment_sizes(1000)
  [128, 128, 256, 488]
  """
  sizes: list[int] = []
  end = 2 * LEAST_READ
  while end + LEAST_READ <= places:
    sizes.append(end - sum(sizes))
    end *= 2
  return [*sizes, places - sum(sizes)]


def segment_offsets(segments: Sequence[jax.Array]) -> list[int]:
  """Returns the first slot of each segment […, S_i, C] of a cache."""
  ends = itertools.accumulate(segment.shape[-2] for segment in segments)
  return [0, *ends][:-1]


def join_segments(segments: Sequence[jax.Array], places: int) -> jax.Array:
  """Returns the first slots of a cache as one array [B, N, places, C]."""
  parts = [
    segment[:, :, : places - offset]
    for segment, offset in zip(segments, segment_offsets(segments), strict=True)
    if offset < places
  ]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def attend_to_filled(
  query: jax.Array,
  keys: Sequence[jax.Array],
  values: Sequence[jax.Array],
  mask: jax.Array,
  filled: jax.Array,
  scale: float | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """Computes `attend_to_cache` on the first segments of a cache only, all that are filled.

  Args:
    query: [B, T, H, C].
    keys: segments [B, N, S_i, C], S slots together.
    values: likewise.
    mask: [B, T, S] bool, False from slot `filled` on.
    filled: [] int32.
    scale: as in `attend`.
    cap: as in `attend`.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  offsets = segment_offsets(keys)

  def attend_to_first(count: int, *inputs: Any) -> jax.Array:
    query, keys, values, mask = inputs
    return _attend_to_all(query, keys[:count], values[:count], mask, scale, cap)

  branches = [functools.partial(attend_to_first, count + 1) for count in range(len(keys))]
  last = jnp.sum(filled > jnp.asarray(offsets[1:], jnp.int32))
  return jax.lax.switch(last, branches, query, tuple(keys), tuple(values), mask)


def _attend_to_all(
  query: jax.Array,
  keys: Sequence[jax.Array],
  values: Sequence[jax.Array],
  mask: jax.Array,
  scale: float | None,
  cap: float,
) -> jax.Array:
  """Computes `attend_to_cache` with keys and values in segments.

  The mask may be longer than they are; its end is not read.
  """
  B, T, H, C = query.shape
  N = keys[0].shape[1]
  if scale is None:
    scale = C**-0.5
  # The G heads that share a key keep an axis of their own: if it were merged with
  # T, XLA could not shard T.
  groups = query.reshape(B, T, N, H // N, C).transpose(0, 2, 3, 1, 4) * scale
  logits = _multiply_all(groups, keys)
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  mask = mask[:, None, None, :, : logits.shape[-1]]
  logits = jnp.where(mask, logits, MASKED_LOGIT)  # [B, N, G, T, S]
  mixed = _average_values(logits, list(values))  # [B, N, G, T, C]
  return mixed.transpose(0, 3, 1, 2, 4).reshape(B, T, H, C)


@jax.custom_vjp
def _average_values(logits: jax.Array, values: list[jax.Array]) -> jax.Array:
  """Averages the values of a row with the softmax of logits as weights.

  Its gradient is written out, as in FlashAttention (Dao et al. 2022, arXiv:2205.14135, appendix
  B.4): the sum over keys that the gradient of a softmax needs is one over C of the output. By
  JAX's own rule XLA's CPU backend spends a fifth more on attention forward and backward.

  Args:
    logits: [B, N, G, T, S] float32.
    values: segments [B, N, S_i, C], S keys together.

  Returns:
    [B, N, G, T, C], the dtype of values.
  """
  return _average_forward(logits, values)[0]


def _average_forward(logits: jax.Array, values: list[jax.Array]) -> tuple[jax.Array, Any]:
  """Computes the average, and keeps what its gradients need."""
  weights = jax.nn.softmax(logits, axis=-1)
  parts = [
    _multiply('bngts,bnsc->bngtc', part, value)
    for part, value in zip(_split_keys(weights, values), values, strict=True)
  ]
  mixed = functools.reduce(jnp.add, parts)
  return mixed.astype(values[0].dtype), (weights, values, mixed)


def _average_gradients(
  saved: tuple[jax.Array, list[jax.Array], jax.Array], gradient: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
  """Computes the gradients of the average by logits and values."""
  weights, values, mixed = saved
  by_weights = _multiply_all(gradient, values)
  # The mean of `by_weights` under the weights.
  mean = jnp.sum(gradient.astype(jnp.float32) * mixed, axis=-1, keepdims=True)
  by_values = [
    jnp.einsum('bngts,bngtc->bnsc', part, gradient) for part in _split_keys(weights, values)
  ]
  return weights * (by_weights - mean), by_values


_average_values.defvjp(_average_forward, _average_gradients)


def _split_keys(weights: jax.Array, values: Sequence[jax.Array]) -> list[jax.Array]:
  """Splits weights [B, N, G, T, S] into those of each segment of values, in their dtype."""
  weights = weights.astype(values[0].dtype)
  return [
    weights[..., offset : offset + value.shape[2]]
    for value, offset in zip(values, segment_offsets(values), strict=True)
  ]


def _multiply_all(groups: jax.Array, segments: Sequence[jax.Array]) -> jax.Array:
  """Multiplies [B, N, G, T, C] with segments [B, N, S_i, C]: [B, N, G, T, S] float32."""
  parts = [_multiply('bngtc,bnsc->bngts', groups, segment) for segment in segments]
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _multiply(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes an einsum of two arrays of one dtype, float32."""
  return jnp.einsum(
    equation,
    x,
    y,
    preferred_element_type=jnp.float32,
    precision=product_precision(x.dtype),
  )


def choose_implementation(
  config: ModelConfig,
  length: int,
  cached: bool,
  platform: str,
  sharded: bool = False,
  prefixes: bool = False,
) -> str:
  """Chooses the implementation of attention: 'plain', 'cudnn', 'splash' or 'decode'.

  Args:
    config: the model's configuration, whose `attention` the user sets.
    length: the tokens of a row, T.
    cached: whether there is a cache.
    platform: 'cpu', 'gpu' or 'tpu'.
    sharded: whether the tokens of a row are sharded over devices; with a cache, whether
      there is more than one device.
    prefixes: whether segments continue others of their row.

  Raises:
    UserError: the implementation that the user set cannot be used here.
  """
  if cached:
    has_kernel = platform == 'gpu' and length == 1 and decode_attention.is_supported(config)
    return 'decode' if has_kernel and not sharded else 'plain'
  obstacles = find_obstacles(config, length, sharded, prefixes)
  wanted = config.attention
  if wanted == 'auto':
    fastest = FASTEST.get(platform, 'plain')
    return 'plain' if fastest in obstacles else fastest
  if wanted in obstacles:
    raise UserError(f'model.attention: {wanted} needs {obstacles[wanted]}')
  return wanted


def find_obstacles(
  config: ModelConfig, length: int, sharded: bool, prefixes: bool = False
) -> dict[str, str]:
  """Returns the implementations that cannot be used, each with what it would need.

  Args:
    config: the model's configuration.
    length: the tokens of a row, T.
    sharded: whether the tokens of a row are sharded over devices.
    prefixes: whether segments continue others of their row.
  """
  obstacles = {}
  head_fits = config.head_dim % 8 == 0 and config.head_dim <= 128
  if config.dtype == 'float32' or config.attention_cap or not head_fits:
    obstacles['cudnn'] = (
      'bfloat16 or float16, a head_dim of 8 to 128 in steps of 8, and no soft cap'
    )
  if length % BLOCK:
    obstacles['splash'] = f'rows of a multiple of {BLOCK} tokens, got {length}'
  if prefixes:
    obstacles['splash'] = 'rows whose segments do not continue others'
  if sharded:
    whole_rows = 'mesh.context = 1, so that no row is split over devices'
    obstacles |= {'cudnn': whole_rows, 'splash': whole_rows}
  return obstacles


def sees_prefixes(config: ModelConfig, platform: str) -> bool:
  """Tells whether segments may continue others of their row, and it is worth it.

  Not with splash, which masks by segments alone and is the fastest on a TPU. Nor where what a
  prefix is depends on the text that continues it: with longrope on its length, with exact
  numerics on its columns.

  Args:
    config: the model's configuration.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  implementation = config.attention
  if implementation == 'auto':
    implementation = FASTEST.get(platform, 'plain')
  is_long = config.rope_scaling.get('rope_type') == 'longrope'
  return implementation != 'splash' and not is_long and not config.is_exact


def hold_one_text(segments: jax.Array) -> jax.Array:
  """Tells whether each row holds one text, from its first token on, and then padding.

  Then a causal mask alone hides all that must be hidden from real tokens.

  Args:
    segments: [B, T] int32, segment ids; 0 = padding.

  Returns:
    [] bool, for all rows together.
  """
  is_token = segments > 0
  begins_again = is_token[:, 1:] & ~is_token[:, :-1]
  is_other = is_token & (segments != segments[:, :1])
  return ~(jnp.any(begins_again) | jnp.any(is_other))


def mask_for_library(mask: jax.Array) -> jax.Array:
  """Makes the mask that `attend_with_library` takes.

  A query whose keys are all masked attends to itself, as libraries do not define
  a softmax over nothing. In training, cuDNN refuses a mask for rows of odd
  length, so this one is for rows of even length.

  Args:
    mask: [B, T, T] bool.

  Returns:
    [B, 1, T, T] bool, T rounded up to an even number.
  """
  if mask.shape[-1] % 2:
    mask = _pad_axes(mask, (1, 2))
  return (mask | jnp.eye(mask.shape[-1], dtype=bool))[:, None]


def attend_with_library(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  scale: float | None = None,
  one_text: jax.Array | None = None,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> jax.Array:
  """Computes `attend` with jax.nn.dot_product_attention, for T = S.

  With a mask cuDNN takes half as long again as with its own causal mask alone, so
  `one_text` chooses between the two at run time.

  Args:
    query: [B, T, H, C].
    key: [B, T, N, C].
    value: [B, T, N, C].
    mask: from `mask_for_library`; no key is after its query.
    scale: the logits are q·k × scale; None = C^-0.5.
    one_text: [] bool, whether a causal mask is enough, see `hold_one_text`; None = no.
    implementation: 'cudnn', or 'xla' in tests.

  Returns:
    [B, T, H, C].
  """
  T = query.shape[1]
  if mask.shape[-1] > T:
    query, key, value = (_pad_axes(x, (1,)) for x in (query, key, value))
  attend_causally = functools.partial(
    jax.nn.dot_product_attention,
    is_causal=True,  # beside a mask, this lets cuDNN skip what both hide
    scale=scale,
    implementation=implementation,
  )

  def attend_masked(*inputs: jax.Array) -> jax.Array:
    # given as a bias, the mask would get a gradient, which takes a third of the time
    return attend_causally(*inputs, mask=mask)

  if one_text is None:
    return attend_masked(query, key, value)[:, :T]
  out = jax.lax.cond(one_text, attend_causally, attend_masked, query, key, value)
  return out[:, :T]


def _pad_axes(x: jax.Array, axes: Sequence[int]) -> jax.Array:
  """Pads an array with one zero at the end of each of these axes."""
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
  """Computes `attend` with JAX's Pallas kernel, for T = S.

  The kernel never materialises [T, S], and skips blocks that are masked completely.

  Args:
    query: [B, T, H, C].
    key: [B, T, N, C].
    value: [B, T, N, C].
    segments: [B, T] int32, segment ids; unlike in `attend`, padding attends to padding.
    window: [] int32, the sliding window in tokens, the query's own included; may be
      traced.
    windows: all values that `window` can have, sorted.
    scale: the logits are q·k × scale; None = C^-0.5.
    cap: soft cap of the logits; 0 = none.
    interpret: whether to interpret the kernel, as is needed without a TPU.

  Returns:
    [B, T, H, C], the dtype of query.
  """
  if scale is None:
    scale = query.shape[-1] ** -0.5
  # The window of a kernel is fixed when it is built, so each window has a kernel.
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


def _block_sizes(length: int) -> dict[str, Any]:
  """Returns the block sizes of the kernel's loops, all the largest that divides a row."""
  sizes = [BLOCK, 2 * BLOCK, 4 * BLOCK]
  block = max(size for size in sizes if length % size == 0)
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
