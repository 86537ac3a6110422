"""Rotary position embeddings: their frequencies, and the rotation of queries and keys.

Letters: B batch, T length, H heads, C head_dim, R ≤ C rotated dimensions of a head,
L layers.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A ModelConfig. This file cannot import it, as model_config.py imports the table below.
AnyModelConfig = Any

# rope_type → the other keys that `rope_scaling` must have, named as by Hugging Face.
SCALINGS = {
  'linear': ('factor',),
  'llama3': (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  ),
  'longrope': (
    'short_factor',
    'long_factor',
    'original_max_position_embeddings',
  ),
}


def frequencies(config: AnyModelConfig, length: int) -> tuple[np.ndarray, float]:
  """Computes the rotary frequencies of every layer, in radians per position.

  They are 0 in layers without rotary positions. The scalings are `linear` (Chen et al.
  2023, arXiv:2306.15595), `llama3` (see `llama3`) and `longrope` (Ding et al. 2024,
  arXiv:2402.13753). The long factors of longrope are used if a row can be longer than
  the context length that the model was first trained with; transformers decides by the
  longest text of a batch instead.

  Args:
    config: the model's configuration.
    length: the number of tokens that a row has room for.

  Returns:
    (frequencies [L, R / 2] float32, the factor of cosines and sines).
  """
  plain = _plain_frequencies(config, config.rope_theta)
  scaled, factor = _scale(plain, config, length)
  local = scaled
  if config.rope_local_theta:
    local = _plain_frequencies(config, config.rope_local_theta)
  # layers with a sliding window may have a rope_theta of their own (Gemma 3)
  rows = [local if window else scaled for window in config.layer_windows]
  is_rotary = np.asarray(config.rotary_layers, np.float32)[:, None]  # [L, 1]
  return np.stack(rows).astype(np.float32) * is_rotary, factor


def llama3(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
  """Lowers the frequencies whose wavelength exceeds the original context length.

  As in Llama 3.1 and transformers, a frequency is divided by `factor` if its wavelength
  is longer than original / low_freq_factor, kept if it is shorter than
  original / high_freq_factor, and interpolated between the two otherwise.

  Args:
    plain: [R / 2] float32, the frequencies to scale, in radians per position.
    scaling: a `rope_scaling` with the keys that SCALINGS lists.

  Returns:
    [R / 2] float32.
  """
  original = scaling['original_max_position_embeddings']
  low = scaling['low_freq_factor']
  high = scaling['high_freq_factor']
  turns = original * plain / (2 * math.pi)  # full turns within the original context length
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * plain / scaling['factor'] + kept * plain


def angles(
  positions: jax.Array,
  frequencies: jax.Array,
  factor: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Computes the cosines and sines that rotate queries and keys.

  Args:
    positions: [B, T] int32.
    frequencies: [R / 2] float32, radians per position.
    factor: cosines and sines are multiplied by it.

  Returns:
    (cosines, sines), [B, T, 1, R / 2] float32.
  """
  radians = positions[:, :, None, None].astype(jnp.float32) * frequencies
  return factor * jnp.cos(radians), factor * jnp.sin(radians)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Applies rotary position embedding in the half-split form of Hugging Face.

  RoFormer (Su et al. 2021, arXiv:2104.09864, eq. 34).

  Args:
    x: [B, T, H, C], queries or keys; the first R of C dimensions are rotated.
    cos: [B, T, 1, R / 2].
    sin: [B, T, 1, R / 2].

  Returns:
    [B, T, H, C], the dtype of x.
  """
  half = cos.shape[-1]
  # pair i of a head is (dimension i, dimension R/2 + i)
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  first = first.astype(jnp.float32)
  second = second.astype(jnp.float32)
  parts = [
    (first * cos - second * sin).astype(x.dtype),
    (second * cos + first * sin).astype(x.dtype),
  ]
  if rest.shape[-1]:
    parts.append(rest)
  return jnp.concatenate(parts, axis=-1)


def _plain_frequencies(config: AnyModelConfig, theta: float) -> np.ndarray:
  """Computes theta^(−2i/R), i = 0 … R/2 − 1: [R / 2] float32."""
  rotated = int(config.head_dim * config.rope_fraction)  # R
  exponents = np.arange(0, rotated, 2) / rotated
  return (float(theta) ** -exponents).astype(np.float32)


def _scale(
  plain: np.ndarray,
  config: AnyModelConfig,
  length: int,
) -> tuple[np.ndarray, float]:
  """Returns the scaled frequencies [R / 2] and the factor of cosines and sines."""
  scaling = config.rope_scaling
  kind = scaling.get('rope_type', '')
  if kind == 'linear':
    return plain / scaling['factor'], 1.0
  if kind == 'llama3':
    return llama3(plain, scaling), 1.0
  if kind == 'longrope':
    original = scaling['original_max_position_embeddings']
    name = 'long_factor' if length > original else 'short_factor'
    factor = scaling.get('attention_factor') or _longrope_factor(config, original)
    return plain / np.float32(scaling[name]), factor
  return plain, 1.0


def _longrope_factor(config: AnyModelConfig, original: int) -> float:
  """Computes longrope's √(1 + log(max_length / original) / log(original)), at least 1."""
  extension = config.max_length / original
  if extension <= 1:  # the context is no longer than the original one
    return 1.0
  return math.sqrt(1 + math.log(extension) / math.log(original))
