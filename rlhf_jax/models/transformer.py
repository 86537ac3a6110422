"""The decoder of the Llama family: embed → blocks (RMSNorm, rotary grouped-query attention, SwiGLU) → norm.

Flax NNX declares the parameters, one place per leaf for shape, axis names and initializer, and nothing outside this
folder sees it: `build` splits the definition from the values once and gives pure functions over a nested dict.

All layers are one block whose leaves carry a leading `layers` axis; training scans over it. Where `params['layers']`
is a tuple of single layers instead (see `unstack`), the same block is unrolled: decoding on a CPU is twice as fast so.

Letters: B batch, T length, S places in the cache, V vocabulary, D width, H heads, N key-value heads, C head_dim,
F inner width, L layers.
"""

import dataclasses
import math
from typing import Any, Callable

import flax.struct
from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a model. `dtype` is what it computes in (parameters are float32), `remat` what the backward pass
  recomputes: none, dots (all but matrix products), full."""
  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  tied: bool = True
  max_length: int = 2048
  head: bool = False
  dtype: str = 'float32'
  remat: str = 'none'


@dataclasses.dataclass(frozen=True)
class Model:
  """A definition without values.

  Attributes:
    config: its shape.
    init: key → params, float32.
    apply: (params, tokens [B, T], positions [B, T], segment_ids [B, T], cache=None) → (hidden [B, T, D], cache).
      With a cache the tokens take its next T places.
    axes: the tree of params with a tuple of axis names for each leaf.
  """
  config: ModelConfig
  init: Callable[..., Any]
  apply: Callable[..., Any]
  axes: Any


@flax.struct.dataclass
class Cache:
  """Keys and values of the places written so far.

  Attributes:
    layers: {'key', 'value'} of [L, B, S, N, C], or a tuple of L such pairs of [B, S, N, C].
    segment_ids: [B, S] int32, 0 = not written or padding.
    length: [] int32, places written.
  """
  layers: Any
  segment_ids: jax.Array
  length: jax.Array


class _Block(nnx.Module):
  """All layers at once, by shape; merged with the leaves of one layer, that layer."""

  def __init__(self, config, leaf):
    L, D, H, N, C, F = (config.layers, config.embed, config.heads, config.kv_heads, config.head_dim, config.mlp)
    out = 0.02 * (2 * L) ** -0.5  # GPT-2's scale of what is added to the residual stream
    self.attention_norm = leaf((L, D), ('layers', 'embed'), None)
    self.query = leaf((L, D, H, C), ('layers', 'embed', 'heads', 'head_dim'), 0.02)
    self.key = leaf((L, D, N, C), ('layers', 'embed', 'kv_heads', 'head_dim'), 0.02)
    self.value = leaf((L, D, N, C), ('layers', 'embed', 'kv_heads', 'head_dim'), 0.02)
    self.output = leaf((L, H, C, D), ('layers', 'heads', 'head_dim', 'embed'), out)
    self.mlp_norm = leaf((L, D), ('layers', 'embed'), None)
    self.gate = leaf((L, D, F), ('layers', 'embed', 'mlp'), 0.02)
    self.up = leaf((L, D, F), ('layers', 'embed', 'mlp'), 0.02)
    self.down = leaf((L, F, D), ('layers', 'mlp', 'embed'), out)
    self.config = config

  def __call__(self, hidden, positions, mask, constrain, cache=None, start=0):
    """hidden [B, T, D] → (hidden [B, T, D], {'key', 'value'} [B, T or S, N, C])."""
    config, cast = self.config, lambda weight: weight[...].astype(hidden.dtype)
    x = rms_norm(hidden, self.attention_norm[...], config.norm_eps)
    query, key, value = (_product(x, cast(weight)) for weight in (self.query, self.key, self.value))
    query = attention.rotate(query, positions, config.rope_theta)
    key = attention.rotate(key, positions, config.rope_theta)
    if cache is not None:
      key = jax.lax.dynamic_update_slice_in_dim(cache['key'], key, start, axis=1)
      value = jax.lax.dynamic_update_slice_in_dim(cache['value'], value, start, axis=1)
    query = constrain(query, ('batch', 'length', 'heads', 'head_dim'))
    key, value = (constrain(x, ('batch', 'keys', 'kv_heads', 'head_dim')) for x in (key, value))
    x = attention.attend(query, key, value, mask)
    hidden = hidden + _product(x, cast(self.output), 2)
    x = rms_norm(hidden, self.mlp_norm[...], config.norm_eps)
    x = jax.nn.silu(_product(x, cast(self.gate))) * _product(x, cast(self.up))
    x = constrain(x, ('batch', 'length', 'mlp'))
    hidden = constrain(hidden + _product(x, cast(self.down)), ('batch', 'length', 'hidden'))
    return hidden, {'key': key, 'value': value}


class _Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, leaf):
    self.embedding = leaf((config.vocab_size, config.embed), ('vocab', 'embed'), 0.02)
    self.norm = leaf((config.embed,), ('embed',), None)
    if not config.tied:
      self.unembedding = leaf((config.embed, config.vocab_size), ('embed', 'vocab'), 0.02)
    if config.head:
      self.score = _Score(config, leaf)


class _Score(nnx.Module):

  def __init__(self, config, leaf):
    self.kernel = leaf((config.embed,), ('embed',), (config.embed + 1) ** -0.5)  # Ziegler et al. 2019
    self.bias = leaf((), (), 0.0)


def _product(x, weight, contracted=1):
  """The last axes of x times the first of weight, [..., in…] · [in…, out…] → [..., out…]; a plain matrix product, whose
  gradients XLA's CPU backend runs a fifth faster than those of an einsum. Rows and places stay two axes: both may be cut
  over devices."""
  inner = math.prod(weight.shape[:contracted])
  rows, columns = x.shape[:x.ndim - contracted], weight.shape[contracted:]
  return (x.reshape(*rows, inner) @ weight.reshape(inner, -1)).reshape(rows + columns)


def rms_norm(x, scale, eps):
  """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019), the dtype of x."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * scale).astype(x.dtype)


def build(config: ModelConfig, constrain=lambda x, names: x) -> Model:
  """The model of a config.

  Args:
    config: its shape.
    constrain: (array, axis names) → array, puts a sharding on activations; the identity by default.

  Raises:
    UserError: no model has this shape.
  """
  _check(config)

  def define(key):
    keys = iter(jax.random.split(key, 16))

    def leaf(shape, names, scale):  # a scale of None: the norms' ones
      value = jnp.ones(shape) if scale is None else scale * jax.random.normal(next(keys), shape)
      return nnx.Param(value, out_sharding=names)

    return _Ends(config, leaf), _Block(config, leaf)

  with nnx.use_eager_sharding(False):  # axis names are metadata here; the mesh is the runtime's business
    ends, block = nnx.eval_shape(define, jax.random.key(0))
    graph = nnx.graphdef(block)
  names = lambda module: jax.tree.map(
      lambda leaf: leaf.get_metadata('out_sharding'), nnx.state(module),
      is_leaf=lambda x: isinstance(x, nnx.Variable))

  def init(key):
    with nnx.use_eager_sharding(False):
      ends, block = define(key)
      return {**nnx.to_pure_dict(nnx.state(ends)), 'layers': nnx.to_pure_dict(nnx.state(block))}

  def apply(params, tokens, positions, segment_ids, cache=None):
    dtype = jnp.dtype(config.dtype)
    hidden = constrain(params['embedding'][tokens].astype(dtype), ('batch', 'length', 'hidden'))
    if cache is None:
      mask, start, pairs = attention.causal_mask(segment_ids, segment_ids), 0, None
    else:
      start = cache.length
      segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, start, axis=1)
      mask, pairs = attention.causal_mask(segment_ids, segments, start), cache.layers

    def layer(hidden, weights_and_pair):
      weights, pair = weights_and_pair
      hidden, pair = nnx.merge(graph, weights)(hidden, positions, mask, constrain, pair, start)
      return hidden, None if cache is None else pair

    if config.remat != 'none':
      layer = jax.checkpoint(layer, policy=REMAT[config.remat])
    if isinstance(params['layers'], dict):
      hidden, pairs = jax.lax.scan(layer, hidden, (params['layers'], pairs))
    else:
      made = []
      for weights, pair in zip(params['layers'], pairs or [None] * config.layers):
        hidden, pair = layer(hidden, (weights, pair))
        made.append(pair)
      pairs = tuple(made)
    hidden = rms_norm(hidden, params['norm'], config.norm_eps)
    if cache is None:
      return hidden, None
    return hidden, Cache(pairs, segments, start + tokens.shape[1])

  return Model(config, init, apply, {**_plain(names(ends)), 'layers': _plain(names(block))})


def _check(config):
  names = ('vocab_size', 'embed', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp')
  sizes = {name: getattr(config, name) for name in names}
  if min(sizes.values()) < 1 or config.heads % config.kv_heads or config.head_dim % 2:
    raise UserError('model: expected sizes from 1, heads a multiple of kv_heads and an even head_dim; got '
                    + ', '.join(f'{name} {size}' for name, size in sizes.items()))
  for name, known in (('dtype', DTYPES), ('remat', tuple(REMAT))):
    if getattr(config, name) not in known:
      raise UserError(f'model.{name}: expected one of {", ".join(known)}, got {getattr(config, name)!r}')


def _plain(state):
  return nnx.to_pure_dict(state)


def unstack(params):
  """The same parameters with `layers` a tuple of single layers: apply then unrolls them."""
  count = jax.tree.leaves(params['layers'])[0].shape[0]
  return {**params, 'layers': tuple(
      jax.tree.map(lambda leaf, i=i: leaf[i], params['layers']) for i in range(count))}


def empty_cache(config: ModelConfig, batch: int, places: int, stacked: bool) -> Cache:
  """A cache with room for `places` tokens of each of `batch` rows, for scanned (stacked) or unrolled layers."""
  shape = (batch, places, config.kv_heads, config.head_dim)
  pair = lambda *lead: {name: jnp.zeros(lead + shape, config.dtype) for name in ('key', 'value')}
  layers = pair(config.layers) if stacked else tuple(pair() for _ in range(config.layers))
  return Cache(layers, jnp.zeros((batch, places), jnp.int32), jnp.zeros((), jnp.int32))


def parameter_count(model: Model) -> int:
  """Number of parameters."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
