"""Rotary position embeddings: their frequencies, and the rotation of queries and keys.

Letters: B batch, T length, H heads, C head_dim, R ≤ C rotated dimensions of a head,
L layers.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import exact
from rlhf_jax.models.model_config import ModelConfig


def short_length(config: ModelConfig) -> int:
  """Returns up to how many tokens longrope's short factors are used; 0 for other scalings."""
  if config.rope_scaling.get('rope_type') != 'longrope':
    return 0
  return config.rope_scaling['original_max_position_embeddings']


def frequencies(config: ModelConfig, long: bool = False) -> tuple[np.ndarray, float]:
  """Computes the rotary frequencies of every layer, in radians per position.

  They are 0 in layers without rotary positions. The scalings are `linear` (Chen
  et al. 2023, arXiv:2306.15595), `llama3` (see `llama3`) and `longrope` (Ding et
  al. 2024, arXiv:2402.13753). The long factors of longrope are used for texts of
  more than `short_length` tokens, whatever other texts are in the batch;
  transformers decides by the longest text of a batch instead.

  Args:
    config: the model's configuration.
    long: whether to use the long factors of longrope.

  Returns:
    (frequencies [L, R / 2] float32, the factor of cosines and sines).
  """
  plain = _plain_frequencies(config, config.rope_theta)
  scaled, factor = _scale(plain, config, long)
  local = scaled
  if config.rope_local_theta:
    local = _plain_frequencies(config, config.rope_local_theta)
  # layers with a sliding window may have a rope_theta of their own (Gemma 3)
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
  """Lowers the frequencies whose wavelength exceeds the original context length.

  As in Llama 3.1 and transformers, a frequency is divided by `factor` if its
  wavelength is longer than original / low_freq_factor, kept if it is shorter than
  original / high_freq_factor, and interpolated between the two otherwise.

  Args:
    plain: [R / 2] float32, the frequencies to scale, in radians per position.
    scaling: a `rope_scaling` with the keys that `ROPE_SCALINGS` of model_config.py lists.

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
    frequencies: [R / 2] or [B, T, 1, R / 2] float32, radians per position.
    factor: cosines and sines are multiplied by it.

  Returns:
    (cosines, sines), [B, T, 1, R / 2] float32.
  """
  radians = positions[:, :, None, None].astype(jnp.float32) * frequencies
  half = radians.shape[-1]
  both = jnp.concatenate([factor * jnp.cos(radians), factor * jnp.sin(radians)], axis=-1)
  both = jax.lax.platform_dependent(both, cpu=_store, default=lambda x: x)
  return both[..., :half], both[..., half:]


def rotate(
  x: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  rounded: Callable[[jax.Array], jax.Array] = exact.FAST.rounded,
) -> jax.Array:
  """Applies rotary position embedding in the half-split form of Hugging Face.

  RoFormer (Su et al. 2021, arXiv:2104.09864, eq. 34).

  Args:
    x: [B, T, H, C], queries or keys; the first R of C dimensions are rotated.
    cos: [B, T, 1, R / 2].
    sin: [B, T, 1, R / 2].
    rounded: what is done to the four products before they are added, see exact.py.

  Returns:
    [B, T, H, C], the dtype of x.
  """
  half = cos.shape[-1]
  # pair i of a head is (dimension i, dimension R/2 + i)
  first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
  first = first.astype(jnp.float32)
  second = second.astype(jnp.float32)
  parts = [
    (rounded(first * cos) - rounded(second * sin)).astype(x.dtype),
    (rounded(second * cos) + rounded(first * sin)).astype(x.dtype),
  ]
  if rest.shape[-1]:
    parts.append(rest)
  return jnp.concatenate(parts, axis=-1)


def _store(x: jax.Array) -> jax.Array:
  """Returns x [..., C], stored before it is used, on a CPU.

  XLA's CPU backend would compute cosines and sines again for every number of
  every head, forward and backward, as it holds them to be cheap: that took a
  tenth of the forward pass. A product with the identity is exact there and ends
  the fusion; an optimization barrier does not.
  """
  return x @ jnp.eye(x.shape[-1], dtype=x.dtype)


def _plain_frequencies(config: ModelConfig, theta: float) -> np.ndarray:
  """Computes theta^(−2i/R), i = 0 … R/2 − 1: [R / 2] float32."""
  rotated = int(config.head_dim * config.rope_fraction)  # R
  exponents = np.arange(0, rotated, 2) / rotated
  return (float(theta) ** -exponents).astype(np.float32)


def _scale(
  plain: np.ndarray,
  config: ModelConfig,
  long: bool,
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
    name = 'long_factor' if long else 'short_factor'
    extension = scaling.get('factor') or config.max_length / original
    factor = scaling.get('attention_factor') or _longrope_factor(extension, original)
    return plain / np.float32(scaling[name]), factor
  return plain, 1.0


def _longrope_factor(extension: float, original: int) -> float:
  """Computes longrope's √(1 + log(extension) / log(original)), at least 1.

  Args:
    extension: how many times longer the context is than the original one.
    original: the original context length, in tokens.
  """
  if extension <= 1:  # the context is no longer than the original one
    return 1.0
  return math.sqrt(1 + math.log(extension) / math.log(original))
