"""Arithmetic that gives a token the same bits whatever is computed beside it.

With `numerics='exact'` the forward pass of a token depends on its text alone: not on
the batch, the padding, what shares its row, the capacity of a cache, or the devices.
So sampler and training agree to the bit. Three things would tie them to it:

  products   XLA's CPU backend sums a product in an order that depends on the number of
             rows. Here products have one fixed shape, a tile of ROWS rows.
  attention  keys are summed KEYS at a time, counted from the first token of the text,
             for a tile of queries of fixed size. Masked keys add exact zeros.
  fusion     a product a·b that is added to something is rounded first in one program,
             and not in another, where it becomes one fused instruction. `rounded`
             keeps the two apart.

Gradients are those of the ordinary forms.

Letters: B batch, T queries, S keys, H query heads, N key-value heads, G = H / N, C
head_dim, t queries of a tile, Q = t G rounded up to QUERIES.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention
from rlhf_jax.models.decode_attention import MASKED_LOGIT
from rlhf_jax.models.layout import ModelLayout
from rlhf_jax.models.model_config import ModelConfig, product_precision, TEXT_STEP

ROWS = 64  # of a product
KEYS = 64  # whose values are summed at a time
QUERIES = TEXT_STEP  # rows of a tile of attention, or a multiple of them

LOWEST = float(jnp.finfo(jnp.float32).min)

Multiply = Callable[[jax.Array, jax.Array], jax.Array]  # [..., K], [K, N] → [..., N]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """How a model computes what its results might depend on.

  Attributes:
    multiply: the product of rows [B, ..., K] and a matrix, in the dtype of the rows.
    logits: the same in float32.
    own_logits: the same for the rows of one device, in a map over devices.
    rounded: what is done to products a·b before they are added to something.
    total: the sum over the last axis, which stays, with one entry.
    peak: the maximum over the last axis, likewise; it has no gradient.
  """

  multiply: Multiply
  logits: Multiply
  own_logits: Multiply
  rounded: Callable[[jax.Array], jax.Array]
  total: Callable[[jax.Array], jax.Array]
  peak: Callable[[jax.Array], jax.Array]


def build_arithmetic(config: ModelConfig, layout: ModelLayout) -> Arithmetic:
  """Builds the arithmetic that a model's configuration asks for.

  Args:
    config: the model's configuration.
    layout: the devices it will run on.

  Raises:
    UserError: it asks for exact numerics, which these devices do not have.
  """
  if not config.is_exact:
    return FAST
  if layout.platform != 'cpu':
    raise UserError(f'model.numerics: exact is for CPUs only, got a {layout.platform}')
  if not layout.shards_rows_only:
    raise UserError(
      'model.numerics: exact needs mesh.tensor = mesh.context = 1 and mesh.rollout_tensor at '
      'most 1, so that each device computes its own rows alone'
    )
  multiply = functools.partial(_multiply_over, layout)
  return Arithmetic(
    multiply=multiply,
    logits=multiply,
    own_logits=multiply_tiles,
    rounded=rounded,
    total=total,
    peak=peak,
  )


def multiply_to_float32(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Multiplies [..., K] with [K, N] at once: [..., N] float32."""
  return jnp.matmul(
    x,
    matrix,
    preferred_element_type=jnp.float32,
    precision=product_precision(x.dtype),
  )


def keep(x: jax.Array) -> jax.Array:
  """Returns x unchanged: in place of `rounded` where results need not be exact."""
  return x


def multiply_tiles(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Multiplies [..., K] with [K, N] in tiles of ROWS rows: [..., N], on one device."""
  rows = x.reshape(-1, x.shape[-1])
  count = rows.shape[0]
  padded = jnp.pad(rows, ((0, -count % ROWS), (0, 0)))

  def multiply_tile(tile: jax.Array) -> jax.Array:
    return tile @ matrix

  tiles = jax.lax.map(multiply_tile, padded.reshape(-1, ROWS, x.shape[-1]))
  return tiles.reshape(-1, matrix.shape[1])[:count].reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_over(layout: ModelLayout, x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Multiplies as `multiply_tiles`, each device its own rows with the whole matrix.

  Args:
    layout: shards the first axis of x, as rows of a batch.
    x: [B, ..., K].
    matrix: [K, N].

  Returns:
    [B, ..., N].
  """
  names = ('batch', *[None] * (x.ndim - 1))
  mapped = layout.shard_map(multiply_tiles, (names, (None, None)), names)
  assert mapped is not None  # as rows are whole
  return mapped(x, matrix)


def _multiply_forward(
  layout: ModelLayout,
  x: jax.Array,
  matrix: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes the product, and keeps what its gradients need."""
  return _multiply_over(layout, x, matrix), (x, matrix)


def _multiply_gradients(
  layout: ModelLayout,
  saved: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, ...]:
  """Computes the gradients of the product at once."""
  del layout
  _, pull = jax.vjp(jnp.matmul, *saved)
  return pull(gradient)


_multiply_over.defvjp(_multiply_forward, _multiply_gradients)


@jax.custom_jvp
def rounded(x: jax.Array) -> jax.Array:
  """Returns x, rounded to its dtype before anything is added to it.

  A product that is added to something becomes one instruction with a single
  rounding where XLA fuses the two. A maximum between them prevents that; barriers
  and `reduce_precision` do not, as they are removed before.

  Args:
    x: float32, finite.
  """
  return jnp.maximum(x, LOWEST)


@rounded.defjvp
def _rounded_tangent(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Returns the tangent unchanged, as rounding is the identity."""
  return rounded(*primals), tangents[0]


@jax.custom_jvp
def total(x: jax.Array) -> jax.Array:
  """Sums the last axis, its halves first, in an order that the length alone decides.

  Args:
    x: [..., n] float32.

  Returns:
    [..., 1] float32.
  """
  return _fold(jnp.add, 0.0, x)


@total.defjvp
def _total_tangent(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Sums the tangent in any order."""
  return total(*primals), _sum_last(tangents[0])


def peak(x: jax.Array) -> jax.Array:
  """Returns the maximum of the last axis.

  XLA's reductions compute what is fused into them by other rules, so that a soft cap
  would have other bits here than elsewhere.

  Args:
    x: [..., n] float32.

  Returns:
    [..., 1] float32, without a gradient.
  """
  return _fold(jnp.maximum, LOWEST, jax.lax.stop_gradient(x))


def _fold(
  combine: Callable[[jax.Array, jax.Array], jax.Array], neutral: float, x: jax.Array
) -> jax.Array:
  """Combines the halves of the last axis until one entry is left."""
  while x.shape[-1] > 1:
    half = (x.shape[-1] + 1) // 2
    first, second = x[..., :half], x[..., half:]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, half - second.shape[-1])]
    x = combine(first, jnp.pad(second, padding, constant_values=neutral))
  return x


def _max_last(x: jax.Array) -> jax.Array:
  """Returns the maximum of the last axis, which stays; it has no gradient."""
  return jnp.max(jax.lax.stop_gradient(x), axis=-1, keepdims=True)


def _sum_last(x: jax.Array) -> jax.Array:
  """Sums the last axis, which stays."""
  return jnp.sum(x, axis=-1, keepdims=True)


FAST = Arithmetic(
  multiply=jnp.matmul,
  logits=multiply_to_float32,
  own_logits=multiply_to_float32,
  rounded=keep,
  total=_sum_last,
  peak=_max_last,
)


def round_up(places: int) -> int:
  """Returns the slots of a cache with room for so many tokens: whole tiles of keys."""
  return -(-places // KEYS) * KEYS


def align(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns columns that bring the first token of each row to its beginning, and back.

  Padding from the left of a row goes to its end.

  Args:
    segment_ids: [B, T] int32, 0 = padding.

  Returns:
    (columns, their inverse), [B, T] int32 each, for `take_columns`.
  """
  length = segment_ids.shape[1]
  shifts = jnp.argmax(segment_ids > 0, axis=1)[:, None]  # 0 in a row of padding
  columns = jnp.arange(length)
  return (columns + shifts) % length, (columns - shifts) % length


def take_columns(x: jax.Array, columns: jax.Array) -> jax.Array:
  """Takes columns [B, T] of each row of x [B, T, …]."""
  return jax.vmap(jnp.take, in_axes=(0, 0, None))(x, columns, 0)


def find_starts(segment_ids: jax.Array) -> jax.Array:
  """Returns the column [B, T] at which the text of each token begins; 0 for padding."""
  is_first = segment_ids[:, 1:] != segment_ids[:, :-1]
  columns = jnp.arange(1, segment_ids.shape[1])
  firsts = jnp.pad(jnp.where(is_first, columns, 0), ((0, 0), (1, 0)))
  return jnp.where(segment_ids > 0, jax.lax.cummax(firsts, axis=1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
  layout: ModelLayout,
  scale: float | None,
  cap: float,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  begin: jax.Array,
  starts: jax.Array | None,
) -> jax.Array:
  """Computes `attention.attend_to_cache`, each device its own rows.

  Args:
    layout: shards rows over the devices.
    scale: as in `attention.attend`.
    cap: as in `attention.attend`.
    query: [B, T, H, C].
    key: [B, N, S, C].
    value: [B, N, S, C].
    mask: [B, T, at most S] bool; keys behind it are not seen.
    begin: [] or [B] int32, the column of the first query among the keys.
    starts: [B, T] int32, the column of the first key of each query's text, from
      `find_starts`; None where it is 0 in every row.

  Returns:
    [B, T, H, C].
  """
  heads = ('batch', 'length', 'heads', 'head_dim')
  keys = ('batch', 'kv_heads', 'keys', 'head_dim')
  columns = ('batch', 'length')
  inputs: list[Any] = [heads, keys, keys, (*columns, None), ('batch',)[: begin.ndim]]
  arrays = [query, key, value, mask, begin]
  if starts is not None:
    inputs.append(columns)
    arrays.append(starts)
  mapped = layout.shard_map(functools.partial(_attend_locally, scale, cap), inputs, heads)
  assert mapped is not None  # as rows are whole
  return mapped(*arrays)


def _attend_forward(*arguments: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Computes attention, and keeps what its gradients need."""
  query, key, value, mask = arguments[3:7]
  return attend(*arguments), (query, key, value, mask)


def _attend_gradients(
  layout: ModelLayout,
  scale: float | None,
  cap: float,
  saved: tuple[jax.Array, ...],
  gradient: jax.Array,
) -> tuple[jax.Array | None, ...]:
  """Computes the gradients of the ordinary form, in which attention is computed again."""
  del layout
  query, key, value, mask = saved

  def attend_at_once(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return attention.attend_to_cache(query, key, value, mask, scale, cap)

  _, pull = jax.vjp(attend_at_once, query, key, value)
  return (*pull(gradient), None, None, None)


attend.defvjp(_attend_forward, _attend_gradients)


def _attend_locally(
  scale: float | None,
  cap: float,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  begin: jax.Array,
  starts: jax.Array | None = None,
) -> jax.Array:
  """Computes `attend` for the rows of one device."""
  end = -key.shape[2] % KEYS
  key, value = (jnp.pad(x, ((0, 0), (0, 0), (0, end), (0, 0))) for x in (key, value))
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, key.shape[2] - mask.shape[2])))
  if scale is None:
    scale = query.shape[-1] ** -0.5
  inputs = (query * scale, key, value, mask, jnp.max(begin))
  if starts is None:
    return _attend_in_tiles(_read_aligned, cap, *inputs, jnp.zeros(mask.shape[:2], jnp.int32))
  return jax.lax.cond(
    jnp.any(starts > 0),
    functools.partial(_attend_in_tiles, _read_windows, cap),
    functools.partial(_attend_in_tiles, _read_aligned, cap),
    *inputs,
    starts,
  )


def _attend_in_tiles(
  read: Callable[..., jax.Array],
  cap: float,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  begin: jax.Array,
  starts: jax.Array,
) -> jax.Array:
  """Computes attention for one tile of queries after the other.

  Args:
    read: (array [B, M, S, …], starts [B], number) → [B, M, KEYS, …], one tile of keys.
    cap: soft cap of the logits; 0 = none.
    query: [B, T, H, C], multiplied by the scale.
    key: [B, N, S, C], S a multiple of KEYS.
    value: [B, N, S, C].
    mask: [B, T, S] bool.
    begin: [] int32, the last of the rows' columns of the first query.
    starts: [B, T] int32.

  Returns:
    [B, T, H, C].
  """
  B, T, H, C = query.shape
  N, S = key.shape[1:3]
  G = H // N
  t = max(1, QUERIES // G)
  tiles = -(-T // t)

  def cut(x: jax.Array) -> jax.Array:  # [B, T, …] → [tiles, B, t, …]
    padding = [(0, 0), (0, -T % t)] + [(0, 0)] * (x.ndim - 2)
    return jnp.moveaxis(jnp.pad(x, padding).reshape(B, tiles, t, *x.shape[2:]), 1, 0)

  queries = cut(query.reshape(B, T, N, G * C)).swapaxes(2, 3)  # [tiles, B, N, t, G C]
  queries = queries.reshape(tiles, B, N, t * G, C)
  more = -(t * G) % QUERIES  # rows that fill up a tile
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))

  def attend_tile(inputs: tuple[jax.Array, ...]) -> jax.Array:
    number, queries, mask, starts = inputs
    rows = jnp.repeat(mask, G, axis=1)  # [B, t G, S]
    rows = jnp.pad(rows, ((0, 0), (0, more), (0, 0)))[:, None].swapaxes(2, 3)
    last = begin + jnp.minimum((number + 1) * t, T) - 1 - jnp.min(starts)
    parts = functools.partial(_read_parts, read, key, value, rows, starts)
    return _attend_to_parts(parts, cap, queries, S // KEYS, last // KEYS + 1)

  numbers = jnp.arange(tiles)
  out = jax.lax.map(attend_tile, (numbers, queries, cut(mask), cut(starts)[:, :, 0]))
  out = out[:, :, :, : t * G].reshape(tiles, B, N, t, G, C)
  return out.transpose(1, 0, 3, 2, 4, 5).reshape(B, tiles * t, H, C)[:, :T]


def _read_parts(
  read: Callable[..., jax.Array],
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  starts: jax.Array,
  number: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Reads a tile of keys and values [B, N, KEYS, C] and of the mask [B, 1, Q, KEYS]."""
  parts = [read(x, starts, number) for x in (key, value, mask)]
  return parts[0], parts[1], parts[2].swapaxes(2, 3)


def _read_aligned(x: jax.Array, starts: jax.Array, number: jax.Array | int) -> jax.Array:
  """Reads a tile of keys where every text begins at column 0."""
  del starts
  if x.shape[2] == KEYS:
    return x
  return jax.lax.dynamic_slice_in_dim(x, number * KEYS, KEYS, axis=2)


def _read_windows(x: jax.Array, starts: jax.Array, number: jax.Array | int) -> jax.Array:
  """Reads a tile of keys, counted from a column of each row; zeros behind the last."""
  columns = starts[:, None] + number * KEYS + jnp.arange(KEYS)  # [B, KEYS]

  def take(row: jax.Array, columns: jax.Array) -> jax.Array:
    return row.at[:, columns].get(mode='fill', fill_value=0)

  return jax.vmap(take)(x, columns)


def _attend_to_parts(
  parts: Callable[[jax.Array | int], tuple[jax.Array, jax.Array, jax.Array]],
  cap: float,
  queries: jax.Array,
  most: int,
  count: jax.Array,
) -> jax.Array:
  """Computes attention of one tile of queries, one tile of keys after the other.

  The softmax is computed on the way (Dao et al. 2022, arXiv:2205.14135, algorithm 1).
  A tile whose keys are all masked changes nothing: its weights are 0, and if it comes
  first, what it left is multiplied by 0.

  Args:
    parts: number → keys and values [B, N, KEYS, C] and mask [B, 1, Q, KEYS].
    cap: soft cap of the logits; 0 = none.
    queries: [B, N, Q, C].
    most: the tiles of keys that there are.
    count: [] int32, those behind which there is nothing to attend to.

  Returns:
    [B, N, Q, C].
  """

  def add_part(number: jax.Array | int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    mixed, summed, before = sums
    key, value, mask = parts(number)
    logits = jnp.einsum('bnqc,bnsc->bnqs', queries, key)
    if cap:
      logits = rounded(cap * jnp.tanh(logits / cap))
    logits = jnp.where(mask, logits, MASKED_LOGIT)
    highest = jnp.maximum(before, peak(logits))
    kept = jnp.exp(before - highest)
    weights = jnp.exp(logits - highest)
    added = jnp.einsum('bnqs,bnsc->bnqc', weights, value)
    mixed = rounded(mixed * kept) + added
    return mixed, rounded(summed * kept) + total(weights), highest

  nothing = (
    jnp.zeros_like(queries),
    jnp.zeros_like(queries[..., :1]),
    jnp.full_like(queries[..., :1], MASKED_LOGIT),
  )
  if most == 1:
    mixed, summed, _ = add_part(0, nothing)
  else:
    mixed, summed, _ = jax.lax.fori_loop(0, jnp.minimum(count, most), add_part, nothing)
  return mixed / summed
