"""The decoder: embedding → layers → norm.

One decoder serves all families; the ModelConfig says in what they differ. Flax
NNX declares the shape, axis names and initializer of each parameter in one place,
and is not visible outside this folder: `build_model` separates the definition
from the values once, and returns pure functions of a nested dict of arrays.

All layers are one block whose leaves have a leading axis `layers`. Training scans
over it, but on a CPU the layers are unrolled. If `params['layers']` is a tuple of
single layers instead (`unstack_layers`), they are unrolled everywhere, which
makes decoding twice as fast on a CPU and three times as fast on a GPU. What
differs from layer to layer (windows, rotary frequencies) is scanned together with
the weights.

Letters: B batch, T length, S slots of the cache, V vocabulary, D width, N key-value
heads, C head_dim, L layers.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import (
  attention,
  column_blocks,
  decode_attention,
  exact,
  heads,
  quantised,
  rope,
)
from rlhf_jax.models.block import (
  Block,
  join_matrices,
  LayerContext,
  LeafMaker,
  make_norm,
  MakeLeaf,
  normalise,
  Pair,
  Places,
  split_matrices,
  take_places,
)
from rlhf_jax.models.exact import Arithmetic
from rlhf_jax.models.layout import ModelLayout, SingleDevice
from rlhf_jax.models.model_config import check_model_config, ModelConfig, REMAT
from rlhf_jax.types import Params

__all__ = [
  'Cache',
  'Model',
  'ModelConfig',
  'build_model',
  'cast_for_compute',
  'empty_cache',
  'parameter_count',
  'unstack_layers',
]


@dataclasses.dataclass(frozen=True)
class Model:
  """The definition of a model, without the values of its parameters."""

  config: ModelConfig  # its sizes and features
  init: Callable[[jax.Array], Params]  # key → params, float32; see `init_params`
  # (params, tokens [B, T], positions [B, T], segment_ids [B, T], cache=None,
  # prefix_ids=None, places=None) → (hidden [B, T, D], cache); see `apply_model`
  apply: Callable[..., tuple[jax.Array, Any]]
  axes: Any  # a tree like the params, with a tuple of axis names for each leaf
  # (function, matrix, rows) → function(matrix, rows), see runtime/mesh.py:
  # Layout.with_gathered_matrix
  with_gathered_matrix: Callable[..., Any]
  arithmetic: Arithmetic  # how products and sums are computed


@flax.struct.dataclass
class Cache:
  """The keys and values of the tokens so far."""

  # {'key', 'value'}, each in segments [L, B, N, S_i, C] that follow each other
  # (attention.segment_sizes); or a tuple of L such pairs of [B, N, S_i, C]
  layers: Any
  segment_ids: jax.Array  # [B, S] int32, 0 = not written or padding
  # [] int32, the number of slots written; [B] if rows differ. An int if the cache is
  # empty, so that a program knows that prompts see only themselves.
  length: jax.Array | int
  # [B] bool, rows for which longrope's long factors are used from the first token on
  is_long: jax.Array


def build_model(config: ModelConfig, layout: ModelLayout | None = None) -> Model:
  """Builds the model that a configuration describes.

  Args:
    config: the configuration.
    layout: the devices it will run on: the layout of a mesh (runtime/mesh.py: Layout),
      or None for one device.

  Raises:
    UserError: no such model can be built, see `check_model_config`.
  """
  check_model_config(config)
  if layout is None:
    layout = SingleDevice()
  # axis names are only metadata here; runtime/mesh.py derives shardings from them
  with nnx.use_eager_sharding(False):
    make_modules = functools.partial(_make_modules, config)
    outer, block = nnx.eval_shape(make_modules, jax.random.key(0))
    graph = nnx.graphdef(block)
  arithmetic = exact.build_arithmetic(config, layout)
  return Model(
    config=config,
    init=functools.partial(init_params, config),
    apply=functools.partial(apply_model, config, graph, layout, arithmetic),
    axes={**_axis_names(outer), 'layers': _axis_names(block)},
    with_gathered_matrix=layout.with_gathered_matrix,
    arithmetic=arithmetic,
  )


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Initialises the parameters of a model.

  Args:
    config: the model's configuration.
    key: a random key.

  Returns:
    A nested dict of float32 arrays; those of the layers have a leading axis [L, …].
  """
  with nnx.use_eager_sharding(False):
    outer, block = _make_modules(config, key)
    return {
      **nnx.to_pure_dict(nnx.state(outer)),
      'layers': nnx.to_pure_dict(nnx.state(block)),
    }


def apply_model(
  config: ModelConfig,
  graph: nnx.GraphDef,
  layout: ModelLayout,
  arithmetic: Arithmetic,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  cache: Cache | None = None,
  prefix_ids: jax.Array | None = None,
  places: Places | None = None,
) -> tuple[jax.Array, Cache | None]:
  """Computes hidden states; with a cache, the tokens take its next T slots.

  Args:
    config: the model's configuration.
    graph: the definition of its block.
    layout: shards activations.
    arithmetic: how products and sums are computed.
    params: from `init_params`, with stacked or unstacked layers.
    tokens: [B, T] int32.
    positions: [B, T] int32.
    segment_ids: [B, T] int32, 0 = padding.
    cache: a cache of S slots, or None.
    prefix_ids: [B, T] int32, for tokens whose segment continues another one of their row, as
      several responses do their prompt, that one's id; else 0. It must come first in the row,
      and positions go on from its last. None = no segment does; so it is with a cache, and
      where `attention.sees_prefixes` says no.
    places: the only columns whose states are wanted, so that the last layer need not compute the
      others: [B, Q] int32, or a slice of Q that all rows share; None = all.

  Returns:
    (hidden [B, T, D], or [B, Q, D]; the cache with T more slots written, or None). With exact
    numerics a row of the cache has only as many more as the row has tokens.

  Raises:
    UserError: rows are longer than the model's learned positions.
  """
  start: jax.Array | int = 0 if cache is None else cache.length
  columns_before = None
  if config.is_exact and isinstance(start, int):
    # each row begins with its first token, as if there were no padding before it
    columns, columns_before = exact.align(segment_ids)
    take = functools.partial(exact.take_columns, columns=columns)
    tokens, positions, segment_ids = take(tokens), take(positions), take(segment_ids)
  hidden = _embed(config, layout, arithmetic, params, tokens, positions)
  segments, pairs = segment_ids, None
  if cache is not None:
    pairs = cache.layers
    segments = _write_segments(cache.segment_ids, segment_ids, start)
  length = segments.shape[1]
  if config.learned_positions and length > config.max_length:
    raise UserError(
      f'model: rows of {length} tokens, expected at most {config.max_length}, the number '
      'of its learned positions'
    )
  attend, windows = _prepare_attention(
    config,
    layout,
    segment_ids,
    segments,
    start,
    cached=cache is not None,
    positions=positions,
    prefix_ids=prefix_ids,
  )
  is_long = _find_long_texts(config, positions, segment_ids, cache)
  rotary, frequencies = _prepare_rotary(config, positions, is_long)
  per_layer = {**windows, **frequencies}
  # On a CPU a scan spends a tenth of a step on stacking what the backward pass needs.
  unroll = layout.platform == 'cpu' and cache is None
  is_unrolled = unroll or not isinstance(params['layers'], dict)
  make_layer = functools.partial(
    _make_layer, config, graph, layout, arithmetic, rotary, start, is_unrolled
  )
  last_layer = make_layer(attend, None)
  early = places is not None and is_unrolled and attend.can_take_places(layout)
  if places is not None and early:
    last_layer = make_layer(attend.at_places(places), places)
  hidden, pairs = _apply_layers(
    make_layer(attend, None), last_layer, hidden, params['layers'], pairs, per_layer, unroll
  )
  written: jax.Array | int = tokens.shape[1]
  if columns_before is not None:
    hidden = exact.take_columns(hidden, columns_before)
    written = jnp.sum(segment_ids > 0, axis=1)
  if places is not None and not early:
    hidden = take_places(hidden, places)
  hidden = normalise(hidden, params['norm'], params.get('norm_bias'), config, arithmetic)
  if cache is None:
    return hidden, None
  return hidden, dataclasses.replace(
    cache,
    layers=pairs,
    segment_ids=segments,
    length=jnp.asarray(start + written, jnp.int32),
  )


def _make_layer(
  config: ModelConfig,
  graph: nnx.GraphDef,
  layout: ModelLayout,
  arithmetic: Arithmetic,
  rotary: '_Rotary | None',
  start: jax.Array | int,
  is_unrolled: bool,
  attend: '_Attention',
  places: Places | None,
) -> Callable[..., tuple[jax.Array, Pair | None]]:
  """Makes the function of one layer: (hidden, inputs) → (hidden, pair), see `_apply_layer`."""
  layer: Callable[..., tuple[jax.Array, Pair | None]] = functools.partial(
    _apply_layer, config, graph, layout, arithmetic, attend, rotary, start, places
  )
  if config.remat == 'none':
    return layer
  # The barrier against common subexpressions is for unrolled layers. In a scan
  # nothing can be shared, and it would only have everything that was saved
  # copied before it is used.
  return jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=is_unrolled)


def _write_segments(
  cached: jax.Array,
  new: jax.Array,
  start: jax.Array | int,
) -> jax.Array:
  """Writes the segment ids [B, T] of new tokens to those of a cache [B, S]."""
  if isinstance(start, jax.Array) and start.ndim:
    slots = start[:, None] + jnp.arange(new.shape[1])
    rows = jnp.arange(len(start))[:, None]
    return cached.at[rows, slots].set(new, mode='drop', unique_indices=True)
  return jax.lax.dynamic_update_slice_in_dim(cached, new, start, axis=1)


def _find_long_texts(
  config: ModelConfig,
  positions: jax.Array,
  segment_ids: jax.Array,
  cache: Cache | None,
) -> jax.Array | None:
  """Finds the tokens of texts for which longrope's long factors are used.

  A text's own length decides. With a cache, where a text comes in pieces, it is the length up to
  the end of this piece, unless `cache.is_long` already says that the text is long.

  Returns:
    [B, T] bool; None for models without longrope.
  """
  limit = rope.short_length(config)
  if not limit:
    return None
  is_long = rope.text_lengths(positions, segment_ids) > limit
  if cache is None:
    return is_long
  return is_long | cache.is_long[:, None]


class _OuterParameters(nnx.Module):
  """The parameters outside the layers: embeddings, the last norm and the heads."""

  def __init__(self, config: ModelConfig, leaf: MakeLeaf):
    V, D = config.vocab_size, config.embed
    self.embedding = leaf((V, D), ('vocab', 'embed'), std=0.02)
    if config.learned_positions:
      self.positions = leaf((config.max_length, D), (None, 'embed'), std=0.02)
    make_norm(self, 'norm', config, leaf)
    if not config.tied:
      self.unembedding = leaf((D, V), ('embed', 'vocab'), std=0.02)
    if config.head:
      self.score = _Score(config, leaf)


class _Score(nnx.Module):
  """The parameters of the scalar head."""

  def __init__(self, config: ModelConfig, leaf: MakeLeaf):
    std = (config.embed + 1) ** -0.5  # Ziegler et al. 2019, arXiv:1909.08593
    self.kernel = leaf((config.embed,), ('embed',), std=std)
    self.bias = leaf((), ())
    if config.likelihood_head:
      self.likelihood = leaf((heads.NUM_LIKELIHOODS,), (None,))


def _make_modules(config: ModelConfig, key: jax.Array) -> tuple[_OuterParameters, Block]:
  """Makes all modules; the order decides which random key each leaf gets."""
  leaf = LeafMaker(key)
  return _OuterParameters(config, leaf), Block(config, leaf)


def _axis_names(module: nnx.Module) -> dict[str, Any]:
  """Returns the axis names of a module's parameters, as a nested dict of tuples."""
  names = jax.tree.map(
    lambda leaf: leaf.get_metadata('out_sharding'),
    nnx.state(module),
    is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
  )
  return nnx.to_pure_dict(names)


def _embed(
  config: ModelConfig,
  layout: ModelLayout,
  arithmetic: Arithmetic,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """Embeds tokens [B, T], and their positions if these are learned: [B, T, D]."""
  # sharded explicitly: otherwise XLA may shard the indices along an odd length, and fail
  tokens = layout.constrain(tokens, ('rows', None))
  hidden = params['embedding'][tokens].astype(config.dtype)
  hidden = layout.constrain(hidden, ('rows', None, 'embed'))
  if config.embed_scale:
    hidden = arithmetic.rounded(hidden * jnp.asarray(config.embed**0.5, config.dtype))
  if config.learned_positions:
    hidden = hidden + params['positions'][positions].astype(config.dtype)
  return layout.constrain(hidden, ('batch', 'length', 'hidden'))


Angles = tuple[jax.Array, jax.Array]  # cosines and sines, [B, T, 1, R / 2] float32


@dataclasses.dataclass(frozen=True)
class _Attention:
  """What all layers of a forward pass share in computing attention."""

  implementation: str  # plain, cudnn, splash or decode
  cached: bool  # whether keys and values are those of a cache
  # the Pallas kernel mapped over the devices; None if they share the tokens of a row
  splash: Callable[..., jax.Array] | None
  mask: jax.Array  # [B, T, S] bool
  distance: jax.Array  # [T, S] or [B, T, S] int32, from key to query, in tokens
  segments: jax.Array  # [B, S] int32, of the keys
  window: int  # the window of every layer, if all have the same
  scale: float | None  # the logits are q·k × scale; None = C^-0.5
  cap: float  # soft cap of the logits; 0 = none
  library_mask: jax.Array | None  # for cuDNN; None if layers differ, or elsewhere
  one_text: jax.Array | None  # [] bool, a causal mask is enough; None = no
  # [] int32, the slots of the cache before which all filled ones are; None = to read all
  filled: jax.Array | None
  # (query, key, value as in a cache, mask) → [B, T, H, C], see exact.py; None = not exact
  exact: Callable[..., jax.Array] | None

  def can_take_places(self, layout: ModelLayout) -> bool:
    """Tells whether a layer can compute the states at some places only."""
    is_plain = self.implementation == 'plain' and self.exact is None and self.filled is None
    return is_plain and layout.shards_rows_only

  def at_places(self, places: Places) -> '_Attention':
    """Returns the attention of the queries at some places only."""
    distance = jnp.broadcast_to(self.distance, self.mask.shape)
    return dataclasses.replace(
      self, mask=take_places(self.mask, places), distance=take_places(distance, places)
    )

  def attend(
    self,
    window: jax.Array | None,
    query: jax.Array,
    key: Any,
    value: Any,
  ) -> jax.Array:
    """Computes attention in a layer; `window` [] int32 is its own, if windows differ.

    Keys and values are arrays, or the segments of a cache.
    """
    if self.implementation == 'splash':
      assert self.splash is not None
      size = self.window if window is None else window
      return self.splash(query, key, value, self.segments, size)
    if self.library_mask is not None and window is None:
      return attention.attend_with_library(
        query,
        key,
        value,
        self.library_mask,
        self.scale,
        self.one_text,
      )
    mask = self.mask
    if window is not None:
      mask = mask & (self.distance < window)
    if self.exact is not None:
      if self.cached:
        (key,), (value,) = key, value  # one segment
      else:
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
      return self.exact(query, key, value, mask)
    if self.implementation == 'decode':
      (key,), (value,) = key, value
      mask = mask[:, 0]
      filled = decode_attention.filled_range(mask)
      return decode_attention.attend_one(query, key, value, mask, filled, self.scale, self.cap)
    if self.filled is not None:
      return attention.attend_to_filled(
        query,
        key,
        value,
        mask,
        self.filled,
        self.scale,
        self.cap,
      )
    if self.cached:
      key, value = (attention.join_segments(x, mask.shape[-1]) for x in (key, value))
      return attention.attend_to_cache(query, key, value, mask, self.scale, self.cap)
    if self.implementation == 'cudnn':
      mask = attention.mask_for_library(mask)
      return attention.attend_with_library(query, key, value, mask, self.scale)
    return attention.attend(query, key, value, mask, self.scale, self.cap)


def _prepare_attention(
  config: ModelConfig,
  layout: ModelLayout,
  segment_ids: jax.Array,
  segments: jax.Array,
  start: jax.Array | int,
  cached: bool,
  positions: jax.Array,
  prefix_ids: jax.Array | None,
) -> tuple[_Attention, dict[str, np.ndarray]]:
  """Prepares attention for all layers of a forward pass.

  Args:
    config: the model's configuration.
    layout: the devices it runs on.
    segment_ids: [B, T] int32, of the queries.
    segments: [B, S] int32, of the keys; without a cache, the same as `segment_ids`.
    start: [] or [B] int32, the index of the first query among the keys.
    cached: whether there is a cache.
    positions: [B, T] int32, of the queries.
    prefix_ids: [B, T] int32, of the segments that those of the queries continue; None = none.

  Returns:
    (what all layers share, what differs from layer to layer: an array [L] named `window`, or
    nothing).
  """
  T, S = segment_ids.shape[1], segments.shape[1]
  if cached and isinstance(start, int):
    # the slots that are not written yet are left out
    segments = segments[:, : start + T]
  mask = attention.causal_mask(segment_ids, segments, start, prefix_ids)
  distance = attention.distances(T, segments.shape[1], start)
  if prefix_ids is not None:  # other texts lie between a prefix and what continues it
    distance = positions[:, :, None] - positions[:, None, :]
  windows = [window if 0 < window < S else S for window in config.layer_windows]
  per_layer: dict[str, np.ndarray] = {}
  if len(set(windows)) > 1:
    per_layer['window'] = np.asarray(windows, np.int32)
  elif windows[0] < S:
    mask = mask & (distance < windows[0])
  scale = None
  if config.attention_scalar:
    scale = config.attention_scalar**-0.5
  splash = _map_splash(config, layout, sorted(set(windows)), scale)
  implementation = attention.choose_implementation(
    config,
    T,
    cached,
    layout.platform,
    sharded=not layout.is_one_device if cached else splash is None,
    prefixes=prefix_ids is not None,
  )
  library_mask = one_text = None
  if implementation == 'cudnn' and 'window' not in per_layer:
    library_mask = attention.mask_for_library(mask)
    if windows[0] == S:
      one_text = attention.hold_one_text(segment_ids)
  filled = None
  # on a GPU, each choice at run time would have to wait for the host
  if cached and implementation == 'plain' and layout.platform != 'gpu':
    filled = None if isinstance(start, int) else jnp.max(start) + T
  exact_attention = None
  if config.is_exact:
    implementation = 'plain'  # as auto is on a CPU; others are refused
    # rows of a cache begin at its first slot
    starts = None if cached else exact.find_starts(segment_ids)
    exact_attention = functools.partial(
      _attend_exactly, layout, scale, config.attention_cap, jnp.asarray(start, jnp.int32), starts
    )
  shared = _Attention(
    implementation=implementation,
    cached=cached,
    splash=splash,
    mask=mask,
    distance=distance,
    segments=segments,
    window=windows[0],
    scale=scale,
    cap=config.attention_cap,
    library_mask=library_mask,
    one_text=one_text,
    filled=filled,
    exact=exact_attention,
  )
  return shared, per_layer


def _attend_exactly(
  layout: ModelLayout,
  scale: float | None,
  cap: float,
  begin: jax.Array,
  starts: jax.Array | None,
  *inputs: jax.Array,
) -> jax.Array:
  """Computes `exact.attend` of (query, key, value, mask)."""
  return exact.attend(layout, scale, cap, *inputs, begin, starts)


@dataclasses.dataclass(frozen=True)
class _Rotary:
  """How all layers of a forward pass rotate queries and keys by their positions."""

  positions: jax.Array  # [B, T] int32
  is_long: jax.Array | None  # [B, T] bool, tokens with longrope's long factors; None without it
  factor: float  # of cosines and sines
  angles: Angles | None  # of all layers, if their frequencies are the same

  def compute(
    self,
    frequencies: jax.Array,
    long_frequencies: jax.Array | None = None,
  ) -> Angles:
    """Computes the angles for frequencies [R / 2]; the long ones count where `is_long` says so."""
    if self.is_long is not None:
      assert long_frequencies is not None
      is_long = self.is_long[:, :, None, None]
      frequencies = jnp.where(is_long, long_frequencies, frequencies)
    return rope.angles(self.positions, frequencies, self.factor)


def _prepare_rotary(
  config: ModelConfig,
  positions: jax.Array,
  is_long: jax.Array | None,
) -> tuple[_Rotary | None, dict[str, np.ndarray]]:
  """Prepares rotary positions for all layers of a forward pass.

  Args:
    config: the model's configuration.
    positions: [B, T] int32.
    is_long: [B, T] bool, tokens that use longrope's long factors; None without longrope.

  Returns:
    (what all layers share, or None where positions are learned; what differs from layer to
    layer: arrays [L, R / 2] named as the arguments of `_Rotary.compute`, or nothing).
  """
  if config.learned_positions:
    return None, {}
  per_layer: dict[str, np.ndarray] = {}
  per_layer['frequencies'], factor = rope.frequencies(config)
  if is_long is not None:
    per_layer['long_frequencies'], _ = rope.frequencies(config, long=True)
  rotary = _Rotary(positions, is_long, factor, angles=None)
  if any((rows != rows[0]).any() for rows in per_layer.values()):
    return rotary, per_layer
  # Computed once, not in every layer.
  angles = rotary.compute(**{name: jnp.asarray(rows[0]) for name, rows in per_layer.items()})
  return dataclasses.replace(rotary, angles=angles), {}


def _map_splash(
  config: ModelConfig,
  layout: ModelLayout,
  windows: list[int],
  scale: float | None,
) -> Callable[..., jax.Array] | None:
  """Maps the Pallas kernel over the devices; None if they share the tokens of a row."""
  kernel = functools.partial(
    attention.attend_with_splash,
    windows=windows,
    scale=scale,
    cap=config.attention_cap,
    interpret=layout.platform != 'tpu',
  )
  query = ('batch', 'length', 'heads', 'head_dim')
  key = ('batch', 'length', 'kv_heads', 'head_dim')
  segments = ('batch', 'length')
  window = ()
  return layout.shard_map(kernel, (query, key, key, segments, window), query)


def _apply_layer(
  config: ModelConfig,
  graph: nnx.GraphDef,
  layout: ModelLayout,
  arithmetic: Arithmetic,
  shared: _Attention,
  rotary: _Rotary | None,
  start: jax.Array | int,
  places: Places | None,
  hidden: jax.Array,
  inputs: tuple[dict[str, Any], Pair | None, dict[str, jax.Array]],
) -> tuple[jax.Array, Pair | None]:
  """Computes one layer: the body of the scan over layers.

  Args:
    config: the model's configuration.
    graph: the definition of its block.
    layout: shards activations.
    arithmetic: how products and sums are computed.
    shared: what all layers share in computing attention.
    rotary: how queries and keys are rotated; None where positions are learned.
    start: [] or [B] int32, the first free slot of the cache.
    places: the only ones whose states are wanted; None = all.
    hidden: [B, T, D].
    inputs: (the layer's weights, its cached keys and values or None, its own window
      and frequencies where layers differ).

  Returns:
    (hidden [B, T, D] or [B, Q, D], its keys and values or None).
  """
  weights, pair, own = inputs
  own = dict(own)
  window = own.pop('window', None)
  angles = rotary.angles if rotary else None
  if rotary and angles is None:
    angles = rotary.compute(**own)
  weights, joined = split_matrices(weights, config)
  blocks = weights.pop(column_blocks.KEY, {})
  context = LayerContext(
    attend=functools.partial(shared.attend, window),
    angles=angles,
    layout=layout,
    start=start,
    arithmetic=arithmetic,
    joined=joined,
    blocks=blocks,
    places=places,
  )
  block = nnx.merge(graph, quantised.restore_all(weights, hidden.dtype))
  return block(hidden, context, pair)


def _apply_layers(
  layer: Callable[..., tuple[jax.Array, Pair | None]],
  last_layer: Callable[..., tuple[jax.Array, Pair | None]],
  hidden: jax.Array,
  layers: Any,
  pairs: Any,
  per_layer: dict[str, np.ndarray],
  unroll: bool,
) -> tuple[jax.Array, Any]:
  """Applies all layers, in a scan or unrolled.

  Args:
    layer: (hidden, (weights, pair, own)) → (hidden, pair).
    last_layer: likewise; the same in a scan.
    hidden: [B, T, D].
    layers: the weights, a dict of [L, …] or a tuple of L dicts.
    pairs: the cached keys and values, likewise; None without a cache.
    per_layer: what differs from layer to layer, arrays [L, …].
    unroll: whether stacked layers are unrolled; a tuple of layers always is.

  Returns:
    (hidden [B, T, D], the pairs with T more slots written).
  """
  if isinstance(layers, dict):
    if not unroll:
      return jax.lax.scan(layer, hidden, (layers, pairs, per_layer))
    layers = _split_layers(layers)
  new_pairs = []
  for i, weights in enumerate(layers):
    pair = pairs[i] if pairs else None
    own = {name: values[i] for name, values in per_layer.items()}
    apply = last_layer if i == len(layers) - 1 else layer
    hidden, new_pair = apply(hidden, (weights, pair, own))
    new_pairs.append(new_pair)
  return hidden, tuple(new_pairs)


@jax.custom_vjp
def _split_layers(stacked: Params) -> tuple[Params, ...]:
  """Splits a dict of arrays [L, …] into L dicts of arrays […].

  Its gradient stacks the gradients of the layers; JAX's own would add up L arrays
  of [L, …], all but one layer of each zeros.
  """
  count = jax.tree.leaves(stacked)[0].shape[0]
  return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))


def _split_layers_forward(stacked: Params) -> tuple[tuple[Params, ...], None]:
  """Splits the layers; the gradient needs nothing of them."""
  return _split_layers(stacked), None


def _stack_layers(_: None, layers: tuple[Params, ...]) -> tuple[Params]:
  """Stacks L dicts of arrays […] to one of arrays [L, …]: the gradient of the split."""
  return (jax.tree.map(_stack, *layers),)


def _stack(*gradients: jax.Array) -> jax.Array | None:
  """Stacks the gradients of one leaf; integers, of quantised matrices, have none."""
  if gradients[0].dtype == jax.dtypes.float0:
    return None
  return jnp.stack(gradients)


_split_layers.defvjp(_split_layers_forward, _stack_layers)


def unstack_layers(params: Params, join: bool = False) -> Params:
  """Splits stacked layers into single ones, which `Model.apply` then unrolls.

  Args:
    params: parameters whose layers have a leading axis [L, …].
    join: whether to join matrices that multiply the same input, see `join_matrices`.

  Returns:
    The same parameters with `layers` as a tuple of single layers.
  """
  layers = _split_layers(params['layers'])
  if join:
    layers = tuple(join_matrices(layer) for layer in layers)
  return {**params, 'layers': layers}


def cast_for_compute(params: Params, dtype: str) -> Params:
  """Casts parameters once to the dtype of the computation, for many calls that use them.

  Norms and the scalar head, which compute in float32, and quantised matrices are
  not cast.

  Args:
    params: the parameters of a model.
    dtype: the `dtype` of its ModelConfig.
  """

  def cast(path: Any, leaf: Any) -> Any:
    name = jax.tree_util.keystr(path)
    if 'norm' in name or 'score' in name or quantised.is_quantised(leaf):
      return leaf
    return leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params, is_leaf=quantised.is_quantised)


def empty_cache(
  config: ModelConfig,
  batch: int,
  places: int,
  stacked: bool,
  whole: bool = False,
) -> Cache:
  """Makes an empty cache.

  Args:
    config: the model's configuration.
    batch: the number of rows.
    places: the number of slots, S: tokens that each row has room for.
    stacked: whether layers are stacked, and scanned, rather than unrolled.
    whole: whether keys and values are one segment, as they always are with exact numerics.
  """
  if config.is_exact:  # whole tiles, so that none is cut out and padded for every token
    sizes = [exact.round_up(places)]
  elif whole:
    sizes = [places]
  else:
    sizes = attention.segment_sizes(places)
  layers: Any
  if stacked:
    layers = _empty_pair(config, (config.layers, batch), sizes)
  else:
    layers = tuple(_empty_pair(config, (batch,), sizes) for _ in range(config.layers))
  return Cache(
    layers=layers,
    segment_ids=jnp.zeros((batch, places), jnp.int32),
    length=0,
    is_long=jnp.zeros(batch, bool),
  )


def _empty_pair(config: ModelConfig, before: tuple[int, ...], sizes: Sequence[int]) -> Pair:
  """Makes keys and values of zeros, in segments of these sizes; `before` are their first axes."""
  shapes = [(*before, config.kv_heads, size, config.head_dim) for size in sizes]
  return {
    name: tuple(jnp.zeros(shape, config.dtype) for shape in shapes) for name in ('key', 'value')
  }


def parameter_count(model: Model) -> int:
  """Returns the number of a model's parameters."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))
