"""Rotary positions: how fast each pair of a head's places turns, layer by layer, and the turning itself.

Letters: B batch, T length, H heads, C head_dim, R ≤ C places that turn, L layers.
"""

import math

import jax.numpy as jnp
import numpy as np

SCALINGS = {  # what each needs in `rope_scaling`, by Hugging Face's names
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
    'longrope': ('short_factor', 'long_factor', 'original_max_position_embeddings'),
}


def frequencies(config, places):
  """Radians per position of every layer, and what the cosines and sines are multiplied with.

  A layer without rotary positions turns by 0. Scalings: `linear` (Chen et al. 2023, arXiv:2306.15595), `llama3` (long
  waves slowed, short ones kept), `longrope` (Ding et al. 2024, arXiv:2402.13753), whose long factors are for rows of
  more places than the model first was trained with; transformers decides by the longest text of a batch instead.

  Args:
    config: a ModelConfig.
    places: how long a row can be.

  Returns:
    ([L, R / 2] float32 numpy, float).
  """
  turning = int(config.head_dim * config.rope_fraction)
  base = lambda theta: (float(theta) ** -(np.arange(0, turning, 2) / turning)).astype(np.float32)
  slow, factor = _scaled(base(config.rope_theta), config, places)
  local = base(config.rope_local_theta) if config.rope_local_theta else slow
  rows = [local if window else slow for window in config.layer_windows]
  return np.stack(rows).astype(np.float32) * np.float32(config.rotary_layers)[:, None], factor


def _scaled(plain, config, places):
  said = config.rope_scaling
  kind = said.get('rope_type', '')
  if kind == 'linear':
    return plain / said['factor'], 1.0
  if kind == 'llama3':
    return llama3(plain, said), 1.0
  if kind == 'longrope':
    first = said['original_max_position_embeddings']
    factors = np.float32(said['long_factor' if places > first else 'short_factor'])
    longer = config.max_length / first
    factor = said.get('attention_factor') or (math.sqrt(1 + math.log(longer) / math.log(first)) if longer > 1 else 1.0)
    return plain / factors, factor
  return plain, 1.0


def llama3(plain, said):
  """Frequencies with the waves that are longer than the model was first trained with slowed."""
  first, low, high = said['original_max_position_embeddings'], said['low_freq_factor'], said['high_freq_factor']
  kept = np.clip((first * plain / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
  return (1 - kept) * plain / said['factor'] + kept * plain


def angles(positions, frequencies, factor=1.0):
  """(cosines, sines) [B, T, 1, R / 2] float32 of positions [B, T] int32 and frequencies [R / 2]."""
  turned = positions[:, :, None, None].astype(jnp.float32) * frequencies
  return factor * jnp.cos(turned), factor * jnp.sin(turned)


def rotate(x, cos, sin):
  """Rotary position embedding in the half-split form of Hugging Face (Su et al. 2021, arXiv:2104.09864, eq. 34).

  Args:
    x: [B, T, H, C]; the first R of C turn.
    cos, sin: [B, T, 1, R / 2].

  Returns:
    [B, T, H, C], the dtype of x.
  """
  half = cos.shape[-1]
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  first, second = first.astype(jnp.float32), second.astype(jnp.float32)
  turned = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype)]
  return jnp.concatenate(turned + [rest] * bool(rest.shape[-1]), axis=-1)
