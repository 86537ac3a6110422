"""Rotary positions: how fast each pair of a head's places turns, and the turning.

Letters: B batch, T length, H heads, C head_dim, R ≤ C places that turn, L layers.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A ModelConfig. model_config.py checks its scalings with the table below, so that this file cannot
# import it.
AnyModelConfig = Any

# What each scaling needs in `rope_scaling`, by Hugging Face's names.
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
OPTIONAL_NUMBERS = {  # and what it may have besides
  'longrope': ('attention_factor', 'factor'),
}


def short_length(config: AnyModelConfig) -> int:
  """Returns how many tokens a text may have before longrope's long factors count; 0 = any."""
  if config.rope_scaling.get('rope_type') != 'longrope':
    return 0
  return config.rope_scaling['original_max_position_embeddings']


def frequencies(config: AnyModelConfig, long: bool = False) -> tuple[np.ndarray, float]:
  """Computes the radians per position of every layer.

  A layer without rotary positions turns by 0. Scalings: `linear` (Chen et al. 2023,
  arXiv:2306.15595), `llama3` (long waves slowed, short ones kept) and `longrope` (Ding
  et al. 2024, arXiv:2402.13753), whose long factors are for texts of more tokens than
  `short_length`. Each text is judged alone, whatever others are in its batch;
  transformers decides by the longest text of a batch.

  Args:
    config: of the model.
    long: of longrope's long texts.

  Returns:
    ([L, R / 2] float32, what cosines and sines are multiplied with).
  """
  plain = _plain_frequencies(config, config.rope_theta)
  scaled, factor = _scale(plain, config, long)
  local = scaled
  if config.rope_local_theta:
    local = _plain_frequencies(config, config.rope_local_theta)
  # layers with a window have wavelengths of their own (Gemma 3)
  rows = [local if window else scaled for window in config.layer_windows]
  is_rotary = np.asarray(config.rotary_layers, np.float32)[:, None]  # [L, 1]
  return np.stack(rows).astype(np.float32) * is_rotary, factor


def text_lengths(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
  """Computes for each token how long its text is as far as the row has it.

  Args:
    positions: [B, T] int32, within the text.
    segment_ids: [B, T] int32 from 0 to T, the texts of a row.

  Returns:
    [B, T] int32, tokens.
  """

  def last_positions(positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
    count = segment_ids.shape[0] + 1
    last = jax.ops.segment_max(positions, segment_ids, num_segments=count)
    return last[segment_ids]

  return jax.vmap(last_positions)(positions, segment_ids) + 1


def llama3(plain: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
  """Slows the waves that are longer than the texts of the model's first training.

  As Llama 3.1 and transformers do: by `factor` where a wave is longer than
  original / low_freq_factor, not at all where it is shorter than
  original / high_freq_factor, and linearly between.

  Args:
    plain: [R / 2] float32, radians per position.
    scaling: the numbers that SCALINGS names.

  Returns:
    [R / 2] float32.
  """
  original = scaling['original_max_position_embeddings']
  low = scaling['low_freq_factor']
  high = scaling['high_freq_factor']
  turns = original * plain / (2 * math.pi)  # in the texts of the first training
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * plain / scaling['factor'] + kept * plain


def angles(
  positions: jax.Array,
  frequencies: jax.Array,
  factor: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Computes the cosines and sines of positions.

  Args:
    positions: [B, T] int32.
    frequencies: [R / 2] or [B, T, 1, R / 2] float32, radians per position.
    factor: what both are multiplied with.

  Returns:
    (cosines, sines), [B, T, 1, R / 2] float32.
  """
  turned = positions[:, :, None, None].astype(jnp.float32) * frequencies
  return factor * jnp.cos(turned), factor * jnp.sin(turned)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Applies rotary position embedding in the half-split form of Hugging Face.

  RoFormer (Su et al. 2021, arXiv:2104.09864, eq. 34).

  Args:
    x: [B, T, H, C]; the first R of C turn.
    cos: [B, T, 1, R / 2].
    sin: [B, T, 1, R / 2].

  Returns:
    [B, T, H, C], the dtype of x.
  """
  half = cos.shape[-1]
  # pair i of a head is (place i, place R/2 + i)
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
  turning = int(config.head_dim * config.rope_fraction)
  exponents = np.arange(0, turning, 2) / turning
  return (float(theta) ** -exponents).astype(np.float32)


def _scale(
  plain: np.ndarray,
  config: AnyModelConfig,
  long: bool,
) -> tuple[np.ndarray, float]:
  """Scales frequencies [R / 2]: (the new ones, the factor of cosines and sines)."""
  scaling = config.rope_scaling
  kind = scaling.get('rope_type', '')
  if kind == 'linear':
    return plain / scaling['factor'], 1.0
  if kind == 'llama3':
    return llama3(plain, scaling), 1.0
  if kind == 'longrope':
    original = scaling['original_max_position_embeddings']
    name = 'long_factor' if long else 'short_factor'
    growth = scaling.get('factor') or config.max_length / original
    factor = scaling.get('attention_factor') or _longrope_factor(growth, original)
    return plain / np.float32(scaling[name]), factor
  return plain, 1.0


def _longrope_factor(growth: float, original: int) -> float:
  """Computes longrope's √(1 + log(growth) / log(original)), 1 where nothing grew."""
  if growth <= 1:
    return 1.0
  return math.sqrt(1 + math.log(growth) / math.log(original))
