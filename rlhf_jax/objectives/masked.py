"""Reductions that say what they are over. All in float32; what the mask leaves out may be anything, even NaN."""

import jax
import jax.numpy as jnp


def total(x, mask):
  """Sum of x where mask, [] float32."""
  return jnp.sum(jnp.where(mask, x, 0.0), dtype=jnp.float32)


def mean(x, mask):
  """Mean of x over the places in mask; 0 where there are none."""
  return total(x, mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def whiten(x, mask, shift_mean: bool = True):
  """x to variance 1 over the places in mask (population variance, eps 1e-8: Ziegler et al. 2019), and to mean 0.

  Args:
    x: any shape, float32.
    mask: the same shape, bool.
    shift_mean: False keeps the mean, as for rewards.

  Returns:
    The shape of x; 0 outside the mask.
  """
  average = mean(x, mask)
  variance = mean((x - average) ** 2, mask)
  white = (x - average) * jax.lax.rsqrt(variance + 1e-8)
  return jnp.where(mask, white if shift_mean else white + average, 0.0)
