"""Attention of one query a row to a cache, as a GPU kernel that reads only what is filled.

XLA computes it with two matrix products over the whole cache, filled or not, and a softmax
between them. This kernel, in Pallas for Triton, reads each filled slot of the cache once.

Letters: B rows, S slots of the cache, H query heads, N key-value heads, G = H / N, C head_dim.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.model_config import ModelConfig

BLOCK = 16  # slots that a program reads at a time
QUERIES = 16  # the fewest rows of a matrix product in Triton; G is padded to it
WARPS = 1  # of 32 threads, that computes one program
STAGES = 4  # blocks that are being read while one is computed

# The logit of a masked key, in every implementation of attention. It is finite, so
# that a query whose keys are all masked gives an arbitrary result, which is masked
# later, and never NaN.
MASKED_LOGIT = -1e30


def is_supported(config: ModelConfig) -> bool:
  """Tells whether the kernel computes the attention of this model."""
  C = config.head_dim
  is_power = C & (C - 1) == 0
  return config.dtype != 'float32' and is_power and 16 <= C <= 256


def filled_range(mask: jax.Array) -> jax.Array:
  """Returns where the slots that a row attends to begin and end.

  Args:
    mask: [B, S] bool.

  Returns:
    [B, 2] int32, the first such slot and the one after the last; equal if there is none.
  """
  S = mask.shape[1]
  places = jnp.arange(S, dtype=jnp.int32)
  end = jnp.max(jnp.where(mask, places + 1, 0), axis=1)
  begin = jnp.min(jnp.where(mask, places, S), axis=1)
  return jnp.stack([jnp.minimum(begin, end), end], axis=1)


def attend_one(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  filled: jax.Array,
  scale: float | None = None,
  cap: float = 0.0,
  interpret: bool = False,
) -> jax.Array:
  """Computes `attention.attend_to_cache` for a single query in each row.

  Args:
    query: [B, 1, H, C], bfloat16 or float16.
    key: [B, N, S, C].
    value: [B, N, S, C].
    mask: [B, S] bool, slots that the row attends to.
    filled: [B, 2] int32, from `filled_range`.
    scale: the logits are q·k × scale; None = C^-0.5.
    cap: soft cap of the logits; 0 = none.
    interpret: whether to interpret the kernel, as is needed without a GPU.

  Returns:
    [B, 1, H, C], the dtype of query. A row that attends to nothing gets zeros.
  """
  # imported late, as most runs need none of it
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  B, _, H, C = query.shape
  N, S = key.shape[1:3]
  G = H // N
  kernel = functools.partial(
    _attend_in_program,
    pallas,
    triton,
    queries=G,
    scale=C**-0.5 if scale is None else scale,
    cap=cap,
  )
  heads = pallas.BlockSpec((None, None, QUERIES, C), lambda b, n: (b, n, 0, 0))
  slots = pallas.BlockSpec((None, None, S, C), lambda b, n: (b, n, 0, 0))
  call: Callable[..., jax.Array] = pallas.pallas_call(
    kernel,
    grid=(B, N),
    in_specs=[
      pallas.BlockSpec((None, 2), lambda b, n: (b, 0)),
      pallas.BlockSpec((None, S), lambda b, n: (b, 0)),
      heads,
      slots,
      slots,
    ],
    out_specs=heads,
    out_shape=jax.ShapeDtypeStruct((B, N, G, C), query.dtype),
    compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    interpret=interpret,
    name='attend_one',
  )
  groups = query.reshape(B, N, G, C)
  mixed = call(filled, mask.astype(jnp.int8), groups, key, value)
  return mixed.reshape(B, 1, H, C)


def _attend_in_program(
  pallas: Any,
  triton: Any,
  filled_ref: Any,
  mask_ref: Any,
  query_ref: Any,
  key_ref: Any,
  value_ref: Any,
  out_ref: Any,
  *,
  queries: int,
  scale: float,
  cap: float,
) -> None:
  """Computes the G queries of one row and key-value head, a block of slots after the other.

  The softmax is computed on the way (Dao et al. 2022, arXiv:2205.14135, algorithm 1): the
  sums so far are rescaled whenever a block has a larger logit than all before.

  Args:
    pallas: the module jax.experimental.pallas.
    triton: the module jax.experimental.pallas.triton.
    filled_ref: [2] int32.
    mask_ref: [S] int8.
    query_ref: [QUERIES, C], of which the first `queries` exist.
    key_ref: [S, C].
    value_ref: [S, C].
    out_ref: [QUERIES, C].
    queries: G.
    scale: the logits are q·k × scale.
    cap: soft cap of the logits; 0 = none.
  """
  C = query_ref.shape[1]
  rows = jnp.arange(QUERIES)[:, None] < queries
  query = triton.load(query_ref.at[:, :], mask=rows, other=0.0)
  begin = filled_ref[0]
  end = filled_ref[1]

  def add_block(number: jax.Array, sums: Any) -> Any:
    mixed, total, peak = sums  # [QUERIES, C], [QUERIES], [QUERIES] float32
    places = number * BLOCK + jnp.arange(BLOCK)
    here = pallas.ds(number * BLOCK, BLOCK)
    exists = places < end
    wanted = triton.load(mask_ref.at[here], mask=exists, other=0) != 0
    key = triton.load(key_ref.at[here, :], mask=exists[:, None], other=0.0)
    logits = triton.dot(query, key.T).astype(jnp.float32) * scale
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(wanted[None], logits, MASKED_LOGIT)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
    kept = jnp.exp(peak - new_peak)
    # a block without any wanted slot has its own peak as its logits
    weights = jnp.where(wanted[None], jnp.exp(logits - new_peak[:, None]), 0.0)
    value = triton.load(value_ref.at[here, :], mask=exists[:, None], other=0.0)
    added = triton.dot(weights.astype(value.dtype), value).astype(jnp.float32)
    mixed = mixed * kept[:, None] + added
    return mixed, total * kept + jnp.sum(weights, axis=1), new_peak

  nothing = (
    jnp.zeros((QUERIES, C), jnp.float32),
    jnp.zeros(QUERIES, jnp.float32),
    jnp.full(QUERIES, MASKED_LOGIT, jnp.float32),
  )
  blocks = begin // BLOCK, pallas.cdiv(end, BLOCK)
  mixed, total, _ = jax.lax.fori_loop(*blocks, add_block, nothing)
  mixed = mixed / jnp.maximum(total, 1e-30)[:, None]
  triton.store(out_ref.at[:, :], mixed.astype(out_ref.dtype), mask=rows)
