"""One layer of the decoder: (norm) → attention → (norm) → + → (norm) → MLP or experts → (norm) → +.

Letters: B batch, T length, S places in the cache, D width, H heads, N key-value heads, C head_dim, F inner width,
E experts, L layers.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from rlhf_jax.models import experts, lora
from rlhf_jax.models.model_config import ACTIVATIONS

NEUTRAL = {'rms': 1.0, 'rms_offset': 0.0, 'layer': 1.0}  # the scale that changes nothing


class Block(nnx.Module):
  """All layers at once, by shape; merged with the leaves of one layer, that layer. A feature that a config does not
  have has no leaf."""

  def __init__(self, config, leaf):
    L, D, H, N, C, F = (
      config.layers,
      config.embed,
      config.heads,
      config.kv_heads,
      config.head_dim,
      config.mlp,
    )
    out = 0.02 * (2 * L) ** -0.5  # GPT-2's scale of what is added to the residual stream
    stacked = lambda shape, names, **how: leaf((L, *shape), ('layers', *names), **how)
    rows = {'query': ((H, C), ('heads', 'head_dim')), 'key': ((N, C), ('kv_heads', 'head_dim'))}
    rows['value'] = rows['key']
    each, every = ((config.experts,), ('experts',)) if config.experts else ((), ())

    if config.pre_norm:
      make_norm(self, 'attention_norm', config, stacked)
    for name, (shape, names) in rows.items():
      setattr(self, name, stacked((D, *shape), ('embed', *names), std=0.02))
      if config.qkv_bias:
        setattr(self, name + '_bias', stacked(shape, names))
      if config.qk_norm and name != 'value':
        place = (shape, names) if config.qk_norm == 'all' else ((C,), ('head_dim',))
        setattr(self, name + '_norm', stacked(*place, fill=NEUTRAL[config.norm]))
    self.output = stacked((H, C, D), ('heads', 'head_dim', 'embed'), std=out)
    if config.output_bias:
      self.output_bias = stacked((D,), ('embed',))
    if config.post_norm:
      make_norm(self, 'attention_post_norm', config, stacked)

    if config.pre_norm:
      make_norm(self, 'mlp_norm', config, stacked)
    if config.experts:
      self.router = stacked((D, config.experts), ('embed', None), std=0.02)
    for name in ('gate', 'up') if config.gated else ('up',):
      setattr(self, name, stacked((*each, D, F), (*every, 'embed', 'mlp'), std=0.02))
      if config.mlp_bias:
        setattr(self, name + '_bias', stacked((F,), ('mlp',)))
    self.down = stacked((*each, F, D), (*every, 'mlp', 'embed'), std=out)
    if config.mlp_bias:
      self.down_bias = stacked((D,), ('embed',))
    if config.post_norm:
      make_norm(self, 'mlp_post_norm', config, stacked)

    d, h, n, c, f = (D, 'embed'), (H, 'heads'), (N, 'kv_heads'), (C, 'head_dim'), (F, 'mlp')
    maps = dict(
      query=([d], [h, c]),
      key=([d], [n, c]),
      value=([d], [n, c]),
      output=([h, c], [d]),
      gate=([d], [f]),
      up=([d], [f]),
      down=([f], [d]),
    )
    for target in config.lora_targets if config.lora_rank else ():
      for name, shape, names, how in lora.adapter_leaves(config, target, *maps[target]):
        setattr(self, name, stacked(shape, names, **how))
    self.config = config

  def __call__(self, hidden, turn, attend, constrain, ragged, cache=None, start=0):
    """One layer.

    Args:
      hidden: [B, T, D].
      turn: (x [B, T, H or N, C]) → the same with its positions in it.
      attend: (query, key, value) → [B, T, H, C].
      constrain: (array, axis names) → array laid so, see runtime/mesh.py: Layout.constrain.
      ragged: how experts are computed, see experts.py.
      cache: {'key', 'value'} [B, S, N, C], or None.
      start: the first free place of the cache, [] int32.

    Returns:
      (hidden [B, T, D], {'key', 'value'} [B, T or S, N, C]).
    """
    x = self._norm('attention_norm', hidden)
    query, key, value = (self._times(name, x) for name in ('query', 'key', 'value'))
    query, key = turn(self._qk_norm('query_norm', query)), turn(self._qk_norm('key_norm', key))
    if cache is not None:
      key = jax.lax.dynamic_update_slice_in_dim(cache['key'], key, start, axis=1)
      value = jax.lax.dynamic_update_slice_in_dim(cache['value'], value, start, axis=1)
    query = constrain(query, ('batch', 'length', 'heads', 'head_dim'))
    key, value = (constrain(x, ('batch', 'keys', 'kv_heads', 'head_dim')) for x in (key, value))
    x = self._times('output', attend(query, key, value), 2)
    hidden = hidden + self._norm('attention_post_norm', x)
    x = self._norm('mlp_norm', hidden)
    x = self._experts(x, ragged) if self.config.experts else self._mlp(x, constrain)
    hidden = constrain(hidden + self._norm('mlp_post_norm', x), ('batch', 'length', 'hidden'))
    return hidden, {'key': key, 'value': value}

  def _mlp(self, x, constrain):
    activation, up = ACTIVATIONS[self.config.activation], self._times('up', x)
    x = activation(self._times('gate', x)) * up if self.config.gated else activation(up)
    return self._times('down', constrain(x, ('batch', 'length', 'mlp')))

  def _experts(self, x, ragged):
    config, rows = self.config, x.reshape(-1, x.shape[-1])
    weights, chosen = experts.route(
      rows, self.router[...], config.experts_per_token, config.renormalise
    )
    mixed = experts.mix(
      rows,
      weights,
      chosen,
      self.gate[...],
      self.up[...],
      self.down[...],
      ACTIVATIONS[config.activation],
      ragged,
    )
    return mixed.reshape(x.shape)

  def _times(self, name, x, contracted=1):
    leaf = lambda ending: getattr(self, name + ending)[...].astype(x.dtype)
    y = product(x, leaf(''), contracted)
    if hasattr(self, name + lora.A):
      scale = self.config.lora_alpha / self.config.lora_rank
      y = y + scale * product(product(x, leaf(lora.A), contracted), leaf(lora.B))
    return y + leaf('_bias') if hasattr(self, name + '_bias') else y

  def _norm(self, name, x):
    if not hasattr(self, name):
      return x
    bias = getattr(self, name + '_bias')[...] if self.config.norm == 'layer' else None
    return normalise(x, getattr(self, name)[...], bias, self.config)

  def _qk_norm(self, name, x):
    if not self.config.qk_norm:
      return x
    scale, shape = getattr(self, name)[...], x.shape
    flat = x.reshape(*shape[:2], -1) if self.config.qk_norm == 'all' else x
    return normalise(flat, scale.reshape(-1), None, self.config).reshape(shape)


def make_norm(module, name, config, leaf):
  """Gives a module the leaves of a norm over the width."""
  setattr(module, name, leaf((config.embed,), ('embed',), fill=NEUTRAL[config.norm]))
  if config.norm == 'layer':
    setattr(module, name + '_bias', leaf((config.embed,), ('embed',)))


def normalise(x, scale, bias, config):
  """RMSNorm (Zhang & Sennrich 2019, eq. 4), or LayerNorm (Ba et al. 2016, eq. 4) where there is a bias, over the last
  axis, in float32; the dtype of x."""
  y = x.astype(jnp.float32)
  if bias is not None:
    y = y - jnp.mean(y, axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
  y = y * (1 + scale if config.norm == 'rms_offset' else scale)
  return (y if bias is None else y + bias).astype(x.dtype)


def product(x, weight, contracted=1):
  """The last axes of x times the first of weight, [..., in…] · [in…, out…] → [..., out…]; a plain matrix product, whose
  gradients XLA's CPU backend runs a fifth faster than those of an einsum. Rows and places stay two axes: both may be
  cut over devices."""
  inner = math.prod(weight.shape[:contracted])
  rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
  return (x.reshape(*rows, inner) @ weight.reshape(inner, -1)).reshape(rows + columns)
