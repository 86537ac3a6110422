"""Exponentials of log-ratios that do not overflow.

exp(x) is infinite from x = 88.7 on in float32, and 0 · ∞, as at a masked token, is NaN, in the
gradient too. A ratio of e^20 is far beyond what any method trusts or clips; from there on the
functions go on as their tangent, with a finite gradient in the right direction, of which the
squares can be added up too.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

LIMIT = 20.0  # nats


def exp(x: jax.Array) -> jax.Array:
  """Computes e^x up to x = 20, and its tangent there beyond.

  Args:
    x: [...] float32.

  Returns:
    [...] float32.

  >>> print(exp(jnp.array([-jnp.inf, 0.0, 1.0])))
  [0.        1.        2.7182817]
  """
  return _go_on(jnp.exp, x)


def expm1(x: jax.Array) -> jax.Array:
  """Computes e^x − 1 up to x = 20, accurately near 0, and its tangent there beyond.

  Args:
    x: [...] float32.

  Returns:
    [...] float32.

  >>> print(expm1(jnp.array([0.0, 1e-8])))
  [0.e+00 1.e-08]
  """
  return _go_on(jnp.expm1, x)


def _go_on(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Computes a function with the derivative exp up to the limit, and its tangent beyond."""
  beyond = jnp.maximum(x - LIMIT, 0.0)
  return function(jnp.minimum(x, LIMIT)) + math.exp(LIMIT) * beyond
