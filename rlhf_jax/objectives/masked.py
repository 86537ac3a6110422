"""Reductions over the entries that a mask selects.

All of them sum in float32. Entries outside the mask may have any value, even
NaN. A mask is bool, or numeric; a numeric mask selects the entries where it is
not 0.
"""

import chex
import jax
import jax.numpy as jnp


def keep(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns x in the mask and 0 outside it.

  What is computed from it then has finite derivatives, whatever stood outside
  the mask: a mask that is applied to a result only would multiply a NaN by the
  gradient 0.

  Args:
    x: [...] float32.
    mask: [...] bool or numeric, the same shape.

  Returns:
    [...] float32.

  >>> print(keep(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
  [1. 0.]
  """
  return jnp.where(mask, x, 0.0)


def total(x: jax.Array | float, mask: jax.Array) -> jax.Array:
  """Sums x over the entries in the mask.

  Args:
    x: [...] float32 or bool, the shape of the mask, or a number.
    mask: [...] bool or numeric, non-zero where an entry counts.

  Returns:
    [] float32.

  >>> print(total(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])))
  3.0
  """
  chex.assert_is_broadcastable(jnp.shape(x), jnp.shape(mask))
  return jnp.sum(jnp.where(mask, x, 0.0), dtype=jnp.float32)


def count(mask: jax.Array) -> jax.Array:
  """Counts the entries in the mask.

  Args:
    mask: [...] bool or numeric, non-zero where an entry counts.

  Returns:
    [] float32.

  >>> print(count(jnp.array([0.5, 0.0, 3.0])))
  2.0
  """
  return total(1.0, mask)


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Averages x over the entries in the mask.

  Args:
    x: [...] float32 or bool.
    mask: [...] bool, the same shape. A numeric mask adds up to the denominator,
      but does not weight x.

  Returns:
    [] float32; 0 if the mask is empty.

  >>> print(mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
  2.0
  """
  chex.assert_equal_shape([x, mask])
  return total(x, mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def whiten(x: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Scales x to variance 1 over the mask, and shifts it to mean 0.

  (x − mean) / √(variance + 1e-8), the variance being that of the population, as
  in the code of Ziegler et al. 2019 (arXiv:1909.08593).

  Args:
    x: [...] float32.
    mask: [...] bool, the same shape.
    shift_mean: False keeps the mean, as for rewards.

  Returns:
    [...] float32, 0 outside the mask.

  >>> x = jnp.array([1.0, 3.0, 50.0])
  >>> print(whiten(x, jnp.array([True, True, False])))
  [-1.  1.  0.]
  >>> print(whiten(x, jnp.array([True, True, False]), shift_mean=False))
  [1. 3. 0.]
  """
  chex.assert_equal_shape([x, mask])
  chex.assert_type(x, float)
  x = keep(x, mask)
  average = mean(x, mask)
  variance = mean((x - average) ** 2, mask)
  white = (x - average) * jax.lax.rsqrt(variance + 1e-8)
  if not shift_mean:
    white = white + average
  return jnp.where(mask, white, 0.0)
