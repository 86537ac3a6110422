"""One layer of the decoder.

(norm) → attention → (norm) → + → (norm) → MLP or experts → (norm) → +

Letters: B batch, T length, S slots of the cache, D width, H heads, N key-value
heads, C head_dim, F inner width, E experts, L layers.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import attention, column_blocks, exact, experts, lora, quantised, rope
from rlhf_jax.models.exact import Arithmetic, Multiply
from rlhf_jax.models.layout import ModelLayout
from rlhf_jax.models.model_config import ACTIVATIONS, ModelConfig

NEUTRAL = {'rms': 1.0, 'rms_offset': 0.0, 'layer': 1.0}  # norm → the initial scale, a no-op

# (shape, axis names, std=0.0, fill=None) → a parameter
MakeLeaf = Callable[..., nnx.Param]
# The keys and values of a layer, 'key' and 'value', each in segments [B, N, S_i, C] of the cache.
Pair = dict[str, tuple[jax.Array, ...]]

# Some columns of rows: [B, Q] int32, those of each row; or a slice, the same of all rows.
Places = jax.Array | slice

# Matrices of the same input that decoding joins to one, see `join_matrices`.
JOINED = {'query_key_value': ('query', 'key', 'value'), 'gate_up': ('gate', 'up')}


class LeafMaker:
  """Makes parameters one after another; each random one uses the next random key."""

  def __init__(self, key: jax.Array):
    self._keys = iter(jax.random.split(key, 64))

  def __call__(
    self,
    shape: tuple[int, ...],
    names: tuple[str | None, ...],
    std: float = 0.0,
    fill: float | None = None,
  ) -> nnx.Param:
    """Makes a parameter.

    Args:
      shape: the shape of the parameter.
      names: the names of its axes.
      std: the standard deviation of random entries, which are normal with mean 0.
      fill: the value of all entries; None = random ones.

    Returns:
      A Param, float32.
    """
    if fill is None:
      value = std * jax.random.normal(next(self._keys), shape)
    else:
      # with a dtype: a weakly typed leaf would make the train step compile twice
      value = jnp.full(shape, fill, jnp.float32)
    return nnx.Param(value, out_sharding=names)


@dataclasses.dataclass(frozen=True)
class LayerContext:
  """The inputs of a layer beside its weights and the hidden states."""

  # (query [B, T, H, C], key, value) → [B, T, H, C]; keys and values are [B, T, N,
  # C], those of a cache segments [B, N, S_i, C]
  attend: Callable[[jax.Array, Any, Any], jax.Array]
  # (cosines, sines) [B, T, 1, R / 2] of the positions; None where positions are
  # learned
  angles: tuple[jax.Array, jax.Array] | None
  layout: ModelLayout  # shards activations
  start: jax.Array | int  # [] or [B] int32, the first free slot of the cache
  arithmetic: Arithmetic  # how products and sums are computed
  joined: dict[str, jax.Array]  # name in JOINED → matrix; empty where none are joined
  blocks: dict[str, jax.Array]  # name → the matrix in blocks of columns; empty where none are cut
  places: Places | None = None  # the only ones whose states are wanted of this layer; None = all

  def take(self, x: jax.Array) -> jax.Array:
    """Takes the wanted places of x [B, T, …], [B, Q, …]."""
    return x if self.places is None else take_places(x, self.places)


class Block(nnx.Module):
  """A decoder layer; its parameters are created for all layers at once.

  As created, every leaf has a leading axis of layers. Merged with the leaves of a
  single layer (`nnx.merge`), the block computes that layer. There are no leaves
  for features that the configuration does not use.
  """

  gate: nnx.Param  # of a gated MLP and of experts
  up: nnx.Param

  def __init__(self, config: ModelConfig, leaf: MakeLeaf):
    self.config = config
    stacked = functools.partial(_make_stacked, leaf, config.layers)
    # The order matters: each leaf takes the next random key.
    self._make_attention(config, stacked)
    self._make_mlp(config, stacked)
    self._make_adapters(config, stacked)

  def _make_attention(self, config: ModelConfig, leaf: MakeLeaf) -> None:
    """Makes the leaves of attention and its norms."""
    D, H, N, C = config.embed, config.heads, config.kv_heads, config.head_dim
    if config.pre_norm:
      make_norm(self, 'attention_norm', config, leaf)
    self._make_projection('query', (H, C), ('heads', 'head_dim'), leaf)
    self._make_projection('key', (N, C), ('kv_heads', 'head_dim'), leaf)
    self._make_projection('value', (N, C), ('kv_heads', 'head_dim'), leaf)
    self.output = leaf(
      (H, C, D),
      ('heads', 'head_dim', 'embed'),
      std=_residual_std(config),
    )
    if config.output_bias:
      self.output_bias = leaf((D,), ('embed',))
    if config.post_norm:
      make_norm(self, 'attention_post_norm', config, leaf)

  def _make_projection(
    self,
    name: str,
    shape: tuple[int, int],
    names: tuple[str, str],
    leaf: MakeLeaf,
  ) -> None:
    """Makes the matrix of queries, keys or values, with its bias and norm."""
    config = self.config
    setattr(self, name, leaf((config.embed, *shape), ('embed', *names), std=0.02))
    if config.qkv_bias:
      setattr(self, name + '_bias', leaf(shape, names))
    if config.qk_norm and name != 'value':
      fill = NEUTRAL[config.norm]
      if config.qk_norm == 'all':
        norm = leaf(shape, names, fill=fill)
      else:  # one for all heads
        norm = leaf((config.head_dim,), ('head_dim',), fill=fill)
      setattr(self, name + '_norm', norm)

  def _make_mlp(self, config: ModelConfig, leaf: MakeLeaf) -> None:
    """Makes the leaves of the MLP or the experts, and their norms."""
    D, F = config.embed, config.mlp
    experts_shape = (config.experts,) if config.experts else ()
    experts_names = ('experts',) if config.experts else ()
    if config.pre_norm:
      make_norm(self, 'mlp_norm', config, leaf)
    if config.experts:
      self.router = leaf((D, config.experts), ('embed', None), std=0.02)
    for name in ('gate', 'up') if config.gated else ('up',):
      shape = (*experts_shape, D, F)
      names = (*experts_names, 'embed', 'mlp')
      setattr(self, name, leaf(shape, names, std=0.02))
      if config.mlp_bias:
        setattr(self, name + '_bias', leaf((F,), ('mlp',)))
    self.down = leaf(
      (*experts_shape, F, D),
      (*experts_names, 'mlp', 'embed'),
      std=_residual_std(config),
    )
    if config.mlp_bias:
      self.down_bias = leaf((D,), ('embed',))
    if config.post_norm:
      make_norm(self, 'mlp_post_norm', config, leaf)

  def _make_adapters(self, config: ModelConfig, leaf: MakeLeaf) -> None:
    """Makes the low-rank adapters of the matrices in `lora_targets`."""
    if not config.lora_rank:
      return
    embed = [(config.embed, 'embed')]
    inner = [(config.mlp, 'mlp')]
    heads = [(config.heads, 'heads'), (config.head_dim, 'head_dim')]
    kv_heads = [(config.kv_heads, 'kv_heads'), (config.head_dim, 'head_dim')]
    axes = {  # matrix → its input axes and output axes
      'query': (embed, heads),
      'key': (embed, kv_heads),
      'value': (embed, kv_heads),
      'output': (heads, embed),
      'gate': (embed, inner),
      'up': (embed, inner),
      'down': (inner, embed),
    }
    for target in config.lora_targets:
      for name, shape, names, initializer in lora.adapter_leaves(config, target, *axes[target]):
        setattr(self, name, leaf(shape, names, **initializer))

  def __call__(
    self,
    hidden: jax.Array,
    context: LayerContext,
    cache: Pair | None = None,
  ) -> tuple[jax.Array, Pair | None]:
    """Computes one layer.

    Args:
      hidden: [B, T, D].
      context: the inputs that all layers share.
      cache: the keys and values of the layer, or None.

    Returns:
      (hidden [B, T, D], or [B, Q, D] of the wanted places; the cache with T more slots
      written, or None).
    """
    constrain = context.layout.constrain
    norm = functools.partial(self._norm, context=context)
    attended, pair = self._attention(norm('attention_norm', hidden), context, cache)
    hidden = context.take(hidden) + norm('attention_post_norm', attended)
    x = norm('mlp_norm', hidden)
    if self.config.experts:
      x = self._mix_experts(x, context)
    else:
      x = self._mlp(x, context)
    hidden = hidden + norm('mlp_post_norm', x)
    return constrain(hidden, ('batch', 'length', 'hidden')), pair

  def _attention(
    self,
    x: jax.Array,
    context: LayerContext,
    cache: Pair | None,
  ) -> tuple[jax.Array, Pair | None]:
    """Computes self-attention of x [B, T, D]: [B, T, D], and the cache with its keys and values."""
    # [B, T, H, C] and twice [B, T, N, C]
    if context.places is None:
      query, key, value = self._project_joined('query_key_value', x, context)
    else:
      query = self._project('query', context.take(x), context)
      key, value = (self._project(name, x, context) for name in ('key', 'value'))
    angles = context.angles
    query_angles = angles and jax.tree.map(context.take, angles)
    query = _rotate(self._qk_norm('query_norm', query, context), query_angles, context)
    key = _rotate(self._qk_norm('key_norm', key, context), angles, context)
    constrain = context.layout.constrain
    query = constrain(query, ('batch', 'length', 'heads', 'head_dim'))
    if cache is None:
      key = constrain(key, ('batch', 'keys', 'kv_heads', 'head_dim'))
      value = constrain(value, ('batch', 'keys', 'kv_heads', 'head_dim'))
    else:
      cache = {
        'key': _write(cache['key'], key, context),
        'value': _write(cache['value'], value, context),
      }
    attended = (key, value) if cache is None else (cache['key'], cache['value'])
    mixed = context.attend(query, *attended)  # [B, T, H, C]
    return self._project('output', mixed, context, contracted=2), cache

  def _mlp(self, x: jax.Array, context: LayerContext) -> jax.Array:
    """Computes the MLP of x [B, T, D]."""
    activation = ACTIVATIONS[self.config.activation]
    if self.config.gated:
      gate, up = self._project_joined('gate_up', x, context)  # [B, T, F]
      inner = activation(gate) * up
    else:
      inner = activation(self._project('up', x, context))
    inner = context.layout.constrain(inner, ('batch', 'length', 'mlp'))
    return self._project('down', inner, context)

  def _mix_experts(self, x: jax.Array, context: LayerContext) -> jax.Array:
    """Computes the mixture of experts of x [B, T, D]."""
    config = self.config
    rows = x.reshape(-1, x.shape[-1])  # [B T, D]
    weights, chosen = experts.route(
      rows,
      self.router[...],
      config.experts_per_token,
      config.renormalise,
      context.arithmetic,
    )
    mixed = experts.mix(
      rows,
      weights,
      chosen,
      self.gate[...],
      self.up[...],
      self.down[...],
      ACTIVATIONS[config.activation],
      context.layout.platform == 'tpu',
      context.arithmetic,
    )
    return mixed.reshape(x.shape)

  def _project(
    self,
    name: str,
    x: jax.Array,
    context: LayerContext,
    contracted: int = 1,
  ) -> jax.Array:
    """Multiplies x by a matrix with its adapters, and adds the bias, if there are any."""
    if name in context.blocks:
      flat = x.reshape(*x.shape[: x.ndim - contracted], -1)
      y = column_blocks.multiply(flat, context.blocks[name])
      y = y.reshape(*flat.shape[:-1], *getattr(self, name).shape[contracted:])
    else:
      y = product(x, self._leaf(name, x.dtype), contracted, context.arithmetic)
    return self._adapt(name, x, y, context, contracted)

  def _project_joined(
    self,
    name: str,
    x: jax.Array,
    context: LayerContext,
  ) -> list[jax.Array]:
    """Multiplies x by each matrix of JOINED[name], in one product if they are joined."""
    parts = JOINED[name]
    if name not in context.joined:
      return [self._project(part, x, context) for part in parts]
    y = product(x, context.joined[name].astype(x.dtype))
    widths = [getattr(self, part).shape[1] for part in parts]
    pieces = jnp.split(y, np.cumsum(widths)[:-1], axis=2)
    return [self._adapt(part, x, piece, context) for part, piece in zip(parts, pieces, strict=True)]

  def _adapt(
    self,
    name: str,
    x: jax.Array,
    y: jax.Array,
    context: LayerContext,
    contracted: int = 1,
  ) -> jax.Array:
    """Adds to y, the product of x and a matrix, what its adapters and bias add, if any."""
    if hasattr(self, name + lora.A):
      scale = self.config.lora_alpha / self.config.lora_rank
      arithmetic = context.arithmetic
      a, b = (self._leaf(name + part, x.dtype) for part in (lora.A, lora.B))
      narrow = product(x, a, contracted, arithmetic)  # [B, T, r]
      y = y + arithmetic.rounded(scale * product(narrow, b, 1, arithmetic))
    if hasattr(self, name + '_bias'):
      y = y + self._leaf(name + '_bias', x.dtype)
    return y

  def _leaf(self, name: str, dtype: Any) -> jax.Array:
    """Returns a parameter in the dtype that the layer computes in."""
    return getattr(self, name)[...].astype(dtype)

  def _norm(self, name: str, x: jax.Array, context: LayerContext) -> jax.Array:
    """Applies a norm over the width if the layer has it."""
    if not hasattr(self, name):
      return x
    bias = None
    if self.config.norm == 'layer':
      bias = getattr(self, name + '_bias')[...]
    scale = getattr(self, name)[...]
    return normalise(x, scale, bias, self.config, context.arithmetic)

  def _qk_norm(self, name: str, x: jax.Array, context: LayerContext) -> jax.Array:
    """Applies the norm of queries or keys [B, T, H or N, C] if the layer has one."""
    if not self.config.qk_norm:
      return x
    scale = getattr(self, name)[...]
    flat = x
    if self.config.qk_norm == 'all':
      flat = x.reshape(*x.shape[:2], -1)
    flat = normalise(flat, scale.reshape(-1), None, self.config, context.arithmetic)
    return flat.reshape(x.shape)


def join_matrices(weights: dict[str, Any]) -> dict[str, Any]:
  """Joins the matrices of a layer that multiply the same input, for decoding on one device.

  A product with few rows takes about as long for a matrix of twice the width. The
  results are the same: each output is still the product of the same two vectors.

  Args:
    weights: the leaves of one layer, [in, out…] without an axis of layers.

  Returns:
    The leaves, with those of JOINED concatenated along their first output axis. Quantised
    matrices and those of experts are left as they are.
  """
  weights = dict(weights)
  for name, parts in JOINED.items():
    leaves = [weights.get(part) for part in parts]
    ranks = {getattr(leaf, 'ndim', 0) for leaf in leaves}
    is_dense = not any(quantised.is_quantised(leaf) for leaf in leaves)
    if is_dense and ranks == {2 if name == 'gate_up' else 3}:
      weights[name] = jnp.concatenate([weights.pop(part) for part in parts], axis=1)
  return weights


def split_matrices(
  weights: dict[str, Any],
  config: ModelConfig,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
  """Undoes `join_matrices`, and returns the joined matrices beside.

  Args:
    weights: the leaves of one layer.
    config: the model's configuration.

  Returns:
    (all leaves by their own names, the joined matrices by theirs). A compiled program
    computes only what it uses of both.
  """
  joined = {name: weights[name] for name in JOINED if name in weights}
  weights = {name: leaf for name, leaf in weights.items() if name not in joined}
  widths = {'query': config.heads, 'key': config.kv_heads, 'value': config.kv_heads}
  for name, matrix in joined.items():
    parts = JOINED[name]
    ends = np.cumsum([widths.get(part, config.mlp) for part in parts])[:-1]
    weights |= dict(zip(parts, jnp.split(matrix, ends, axis=1), strict=True))
  return weights, joined


def make_norm(
  module: nnx.Module,
  name: str,
  config: ModelConfig,
  leaf: MakeLeaf,
) -> None:
  """Adds the parameters of a norm over the width to a module.

  Args:
    module: gets the attributes `name` and, for LayerNorm, `name`_bias.
    name: the name of the scale.
    config: the model's configuration.
    leaf: makes the parameters.
  """
  scale = leaf((config.embed,), ('embed',), fill=NEUTRAL[config.norm])
  setattr(module, name, scale)
  if config.norm == 'layer':
    setattr(module, name + '_bias', leaf((config.embed,), ('embed',)))


def normalise(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  config: ModelConfig,
  arithmetic: Arithmetic = exact.FAST,
) -> jax.Array:
  """Normalises the last axis, in float32.

  RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4), or LayerNorm (Ba et
  al. 2016, arXiv:1607.06450, eq. 4) if there is a bias.

  Args:
    x: [..., D].
    scale: [D] float32.
    bias: [D] float32, or None.
    config: the model's configuration, of which `norm` and `norm_eps` are used.
    arithmetic: how sums are computed.

  Returns:
    [..., D], the dtype of x.
  """
  y = x.astype(jnp.float32)
  D = y.shape[-1]
  if bias is not None:
    y = y - arithmetic.rounded(arithmetic.total(y) / D)
  squares = arithmetic.total(arithmetic.rounded(y * y))  # [..., 1]
  y = y * jax.lax.rsqrt(arithmetic.rounded(squares / D) + config.norm_eps)
  if config.norm == 'rms_offset':
    scale = 1 + scale
  y = y * scale
  if bias is not None:
    y = arithmetic.rounded(y) + bias
  return y.astype(x.dtype)


def product(
  x: jax.Array,
  weight: jax.Array,
  contracted: int = 1,
  arithmetic: Arithmetic = exact.FAST,
) -> jax.Array:
  """Multiplies x by a weight: contracts the last axes of x with the first of the weight.

  The axes of rows and tokens are not merged, as both may be sharded.

  Args:
    x: [..., in…].
    weight: [in…, out…].
    contracted: the number of contracted axes, in….
    arithmetic: how the product is computed.

  Returns:
    [..., out…].
  """
  inner = math.prod(weight.shape[:contracted])
  rows = x.shape[: x.ndim - contracted]
  columns = weight.shape[contracted:]
  matrix = weight.reshape(inner, -1)
  flat = _matrix_product(arithmetic.multiply, x.reshape(*rows, inner), matrix)
  return flat.reshape(rows + columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matrix_product(multiply: Multiply, x: jax.Array, matrix: jax.Array) -> jax.Array:
  """Multiplies [..., K] with [K, N]; see `_product_gradients` for the reason."""
  return multiply(x, matrix)


def _product_forward(
  multiply: Multiply,
  x: jax.Array,
  matrix: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes the product, and keeps what its gradients need."""
  return multiply(x, matrix), (x, matrix)


def _product_gradients(
  multiply: Multiply,
  saved: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the gradients of a product by its arguments.

  These are the formulas of JAX's own rule, in another order of operations: JAX's
  rule leaves a transposed product, for which XLA's CPU backend computes whatever
  made the gradient a second time, along the wrong axis. That took a fifth of a
  train step.

  Args:
    multiply: what computed the product; its gradients are computed at once.
    saved: x [..., K] and the matrix [K, N].
    gradient: [..., N], of the product.

  Returns:
    (gradient of x [..., K], gradient of the matrix [K, N]).
  """
  del multiply
  x, matrix = saved
  # the barrier has it computed once, for both products
  gradient = jax.lax.optimization_barrier(gradient)
  rows = tuple(range(x.ndim - 1))
  last = x.ndim - 1
  of_x = jax.lax.dot_general(gradient, matrix, (((last,), (1,)), ((), ())))
  of_matrix = jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))
  return of_x, of_matrix


_matrix_product.defvjp(_product_forward, _product_gradients)


def _make_stacked(
  leaf: MakeLeaf,
  layers: int,
  shape: tuple[int, ...],
  names: tuple[str | None, ...],
  **initializer: Any,
) -> nnx.Param:
  """Makes a parameter of every layer, with a leading axis `layers`."""
  return leaf((layers, *shape), ('layers', *names), **initializer)


def _residual_std(config: ModelConfig) -> float:
  """Returns the initial standard deviation of matrices that write to the residual stream.

  GPT-2 (Radford et al. 2019, section 2.3).
  """
  return 0.02 * (2 * config.layers) ** -0.5


def _write(
  segments: tuple[jax.Array, ...], new: jax.Array, context: LayerContext
) -> tuple[jax.Array, ...]:
  """Writes keys or values [B, T, N, C] to the next slots of a cache, of segments [B, N, S, C]."""
  start = context.start
  write: Callable[..., jax.Array]
  if isinstance(start, jax.Array) and start.ndim:
    write = _write_each_row
  elif len(segments) == 1:
    write = _write_inside
  else:
    write = _write_overlap
  offsets = attention.segment_offsets(segments)
  axes = ('batch', 'kv_heads', 'keys', 'head_dim')
  return tuple(
    context.layout.constrain(write(segment, new, start - offset), axes)
    for segment, offset in zip(segments, offsets, strict=True)
  )


def _write_each_row(segment: jax.Array, new: jax.Array, start: Any) -> jax.Array:
  """Writes what of [B, T, N, C] lies in a segment [B, N, S, C], each row from its own slot on.

  Starts [B] are counted from the first slot of the segment: they may be negative, or behind it.
  """
  rows = jnp.arange(len(start))
  S, T = segment.shape[2], new.shape[1]
  slots = start[:, None] + jnp.arange(T)
  slots = jnp.where(slots < 0, S + jnp.arange(T), slots)  # S and more are dropped
  return segment.at[rows[:, None], :, slots].set(new, mode='drop', unique_indices=True)


def _write_inside(segment: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
  """Writes [B, T, N, C] to a segment [B, N, S, C], from the same slot on in all rows."""
  return jax.lax.dynamic_update_slice_in_dim(segment, new.swapaxes(1, 2), start, axis=2)


def _write_overlap(segment: jax.Array, new: jax.Array, start: jax.Array | int) -> jax.Array:
  """Writes what of [B, T, N, C] lies in a segment [B, N, S, C], all rows from one slot on.

  The start [] is counted from the first slot of the segment: it may be negative, or behind it.
  """
  S, T = segment.shape[2], new.shape[1]
  width = min(T, S)  # of the slots that are read, and written again
  first = jnp.clip(start, 0, S - width)
  sources = first - start + jnp.arange(width)
  is_inside = (sources >= 0) & (sources < T)
  kept = jax.lax.dynamic_slice_in_dim(segment, first, width, axis=2)
  moved = jnp.take(new, jnp.clip(sources, 0, T - 1), axis=1).swapaxes(1, 2)
  changed = jnp.where(is_inside[:, None], moved, kept)
  return jax.lax.dynamic_update_slice_in_dim(segment, changed, first, axis=2)


def _rotate(
  x: jax.Array, angles: tuple[jax.Array, jax.Array] | None, context: LayerContext
) -> jax.Array:
  """Applies rotary positions, if there are any, to queries or keys [B, T, H or N, C]."""
  if angles is None:
    return x
  return rope.rotate(x, *angles, context.arithmetic.rounded)


def take_places(x: jax.Array, places: Places) -> jax.Array:
  """Takes places of x [B, T, …], [B, Q, …]."""
  if isinstance(places, slice):
    return x[:, places]
  return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)
