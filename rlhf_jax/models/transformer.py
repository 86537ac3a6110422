"""The decoder: embed → blocks → norm. One for all families; what they differ in is in the ModelConfig.

Flax NNX declares the parameters, one place per leaf for shape, axis names and initializer, and nothing outside this
folder sees it: `build` splits the definition from the values once and gives pure functions over a nested dict.

All layers are one block whose leaves carry a leading `layers` axis; training scans over it. Where `params['layers']`
is a tuple of single layers instead (see `unstack`), the same block is unrolled: decoding on a CPU is twice as fast so.
What differs from layer to layer (windows, rotary frequencies) is scanned beside the weights.

Letters: B batch, T length, S places in the cache, V vocabulary, D width, N key-value heads, C head_dim, L layers.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, Callable

import flax.struct
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, quantised, rope
from rlhf_jax.models.block import Block, make_norm, normalise
from rlhf_jax.models.model_config import ModelConfig, REMAT, check_model_config


@dataclasses.dataclass(frozen=True)
class Model:
  """A definition without values.

  Attributes:
    config: its shape.
    init: key → params, float32.
    apply: (params, tokens [B, T], positions [B, T], segment_ids [B, T], cache=None) → (hidden [B, T, D], cache).
      With a cache the tokens take its next T places.
    axes: the tree of params with a tuple of axis names for each leaf.
    with_gathered_matrix: (function, matrix, rows) → function(matrix, rows), see runtime/mesh.py: Layout.with_gathered_matrix.
  """

  config: ModelConfig
  init: Callable[..., Any]
  apply: Callable[..., Any]
  axes: Any
  with_gathered_matrix: Callable[..., Any]


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


def _one_device():
  """What build asks of a layout, where there is none."""
  return SimpleNamespace(
    platform=jax.default_backend(),
    constrain=lambda x, names: x,
    shard_map=lambda function, inputs, output: function,
    with_gathered_matrix=lambda function, matrix, *rows: function(matrix, *rows),
  )


class _Ends(nnx.Module):
  """What stands before and after the blocks."""

  def __init__(self, config, leaf):
    self.embedding = leaf((config.vocab_size, config.embed), ('vocab', 'embed'), std=0.02)
    if config.learned_positions:
      self.positions = leaf((config.max_length, config.embed), (None, 'embed'), std=0.02)
    make_norm(self, 'norm', config, leaf)
    if not config.tied:
      self.unembedding = leaf((config.embed, config.vocab_size), ('embed', 'vocab'), std=0.02)
    if config.head:
      self.score = _Score(config, leaf)


class _Score(nnx.Module):
  def __init__(self, config, leaf):
    self.kernel = leaf(
      (config.embed,), ('embed',), std=(config.embed + 1) ** -0.5
    )  # Ziegler et al. 2019
    self.bias = leaf((), ())


def build_model(config: ModelConfig, layout=None) -> Model:
  """The model of a config.

  Args:
    config: its shape.
    layout: where it will run, which lays activations on a mesh (runtime/mesh.py: Layout); None is one device.

  Raises:
    UserError: no model has this shape.
  """
  check_model_config(config)
  layout = layout or _one_device()

  def define(key):
    keys = iter(jax.random.split(key, 64))

    def leaf(shape, names, std=0.0, fill=None):
      value = std * jax.random.normal(next(keys), shape) if fill is None else jnp.full(shape, fill)
      return nnx.Param(value, out_sharding=names)

    return _Ends(config, leaf), Block(config, leaf)

  with nnx.use_eager_sharding(
    False
  ):  # axis names are metadata here; the mesh is the runtime's business
    ends, block = nnx.eval_shape(define, jax.random.key(0))
    graph = nnx.graphdef(block)
  names = lambda module: nnx.to_pure_dict(
    jax.tree.map(
      lambda leaf: leaf.get_metadata('out_sharding'),
      nnx.state(module),
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
  )

  def init(key):
    with nnx.use_eager_sharding(False):
      ends, block = define(key)
      return {**nnx.to_pure_dict(nnx.state(ends)), 'layers': nnx.to_pure_dict(nnx.state(block))}

  def apply(params, tokens, positions, segment_ids, cache=None):
    indices = layout.constrain(
      tokens, ('rows', None)
    )  # else XLA may cut them along odd lengths, and fail
    hidden = layout.constrain(
      params['embedding'][indices].astype(config.dtype), ('rows', None, 'embed')
    )
    if config.embed_scale:
      hidden = hidden * jnp.asarray(config.embed**0.5, config.dtype)
    if config.learned_positions:
      hidden = hidden + params['positions'][positions].astype(config.dtype)
    hidden = layout.constrain(hidden, ('batch', 'length', 'hidden'))
    if cache is None:
      start, segments, pairs = 0, segment_ids, None
    else:
      start, pairs = cache.length, cache.layers
      segments = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, start, axis=1)
    if config.learned_positions and segments.shape[1] > config.max_length:
      raise UserError(
        f'model: rows of {segments.shape[1]} places, expected at most its {config.max_length} positions'
      )
    layer, differs = _layer(config, graph, layout, positions, segment_ids, segments, start)

    if isinstance(params['layers'], dict):
      hidden, pairs = jax.lax.scan(layer, hidden, (params['layers'], pairs, differs))
    else:
      made = []
      for i, (weights, pair) in enumerate(zip(params['layers'], pairs or [None] * config.layers)):
        hidden, pair = layer(
          hidden, (weights, pair, {name: values[i] for name, values in differs.items()})
        )
        made.append(pair)
      pairs = tuple(made)
    hidden = normalise(hidden, params['norm'], params.get('norm_bias'), config)
    if cache is None:
      return hidden, None
    return hidden, Cache(pairs, segments, start + tokens.shape[1])

  return Model(
    config, init, apply, {**names(ends), 'layers': names(block)}, layout.with_gathered_matrix
  )


def _layer(config, graph, layout, positions, segment_ids, segments, start):
  """The body of the scan, and what it takes from layer to layer beside weights and cache.

  Args:
    graph: the block's definition.
    positions, segment_ids: [B, T] int32.
    segments: [B, S] int32, of the keys; where there is no cache those of the queries.
    start: the place of the first query among the keys.

  Returns:
    (layer: (hidden, (weights, pair or None, one of differs)) → (hidden, pair or None), differs: a dict of [L, …]).
  """
  T, S = segment_ids.shape[1], segments.shape[1]
  mask, distance = (
    attention.causal_mask(segment_ids, segments, start),
    attention.distances(T, S, start),
  )
  windows = [window if 0 < window < S else S for window in config.layer_windows]
  differs = {}
  if len(set(windows)) > 1:
    differs['window'] = np.asarray(windows, np.int32)
  elif windows[0] < S:
    mask = mask & (distance < windows[0])
  if not config.learned_positions:
    table, factor = rope.frequencies(config, S)
    differs['frequencies'] = table
  scale, cap = (
    config.attention_scalar**-0.5 if config.attention_scalar else None,
    config.attention_cap,
  )
  names = lambda heads: ('batch', 'length', heads, 'head_dim')
  splash = layout.shard_map(
    functools.partial(
      attention.splash,
      windows=sorted(set(windows)),
      scale=scale,
      cap=cap,
      interpret=layout.platform != 'tpu',
    ),
    (names('heads'), names('kv_heads'), names('kv_heads'), ('batch', 'length'), ()),
    names('heads'),
  )
  way = attention.pick(config, T, segments is not segment_ids, layout.platform, cut=splash is None)
  ragged = layout.platform == 'tpu'

  def layer(hidden, given):
    weights, pair, own = given
    seen = mask & (distance < own['window']) if 'window' in own else mask
    angles = (
      None if config.learned_positions else rope.angles(positions, own['frequencies'], factor)
    )
    turn = lambda x: rope.rotate(x, *angles) if angles else x
    attend = {
      'plain': lambda *qkv: attention.attend(*qkv, seen, scale, cap),
      'cudnn': lambda *qkv: attention.library(*qkv, seen, scale),
      'splash': lambda *qkv: splash(*qkv, segments, own.get('window', windows[0])),
    }[way]
    weights = quantised.restore_all(weights, hidden.dtype)
    hidden, new = nnx.merge(graph, weights)(
      hidden, turn, attend, layout.constrain, ragged, pair, start
    )
    return hidden, None if pair is None else new

  if config.remat != 'none':
    layer = jax.checkpoint(layer, policy=REMAT[config.remat])
  return layer, differs


def unstack_layers(params):
  """The same parameters with `layers` a tuple of single layers: apply then unrolls them."""
  count = jax.tree.leaves(params['layers'])[0].shape[0]
  return {
    **params,
    'layers': tuple(
      jax.tree.map(lambda leaf, i=i: leaf[i], params['layers']) for i in range(count)
    ),
  }


def cast_for_compute(params, dtype):
  """The same parameters in the dtype that they compute in, for a call that reads them many times; norms and the scalar
  head, which compute in float32, and quantised matrices stay."""

  def one(path, leaf):
    said = jax.tree_util.keystr(path)
    kept = 'norm' in said or 'score' in said or quantised.is_quantised(leaf)
    return leaf if kept else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=quantised.is_quantised)


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
