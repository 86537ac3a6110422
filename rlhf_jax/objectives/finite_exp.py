"""Exponentials of log-ratios that do not overflow.

In float32 exp(x) is infinite for x above 88.7. At a masked token this gives 0 ·
∞ = NaN, in the loss and in the gradient. A ratio of e^20 is far beyond the
ratios that any method trusts or clips. Above x = 20 the functions therefore
continue as their tangent at 20. Their gradient is then finite and has the right
sign, and its squares can be summed without overflow.
"""

from collections.abc import Callable
import math

import jax
import jax.numpy as jnp

LIMIT = 20.0  # nats


def exp(x: jax.Array) -> jax.Array:
  """Computes e^x for x up to 20, and the tangent at 20 for larger x.

  Args:
    x: [...] float32.

  Returns:
    [...] float32.

  >>> print(exp(jnp.array([-jnp.inf, 0.0, 1.0])))
  [0.        1.        2.7182817]
  """
  return _continue_linearly(jnp.exp, x)


def expm1(x: jax.Array) -> jax.Array:
  """Computes e^x − 1, accurately near 0, for x up to 20, and the tangent at 20 for larger x.

  Args:
    x: [...] float32.

  Returns:
    [...] float32.

  >>> print(expm1(jnp.array([0.0, 1e-8])))
  [0.e+00 1.e-08]
  """
  return _continue_linearly(jnp.expm1, x)


def _continue_linearly(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
  """Computes a function whose derivative is exp up to LIMIT, and its tangent at LIMIT above it."""
  beyond = jnp.maximum(x - LIMIT, 0.0)
  return function(jnp.minimum(x, LIMIT)) + math.exp(LIMIT) * beyond
