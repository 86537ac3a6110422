"""The KL divergence of the policy from the reference.

There are estimators over sampled tokens, the bound for best-of-n sampling, and
the controller that adapts the coefficient of the KL penalty.
"""

from collections.abc import Callable
import math

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import finite_exp

KLTerm = Callable[[jax.Array, jax.Array], jax.Array]  # (log π, log π_ref) → term per token


def _check_logprobs(logprobs: jax.Array, reference_logprobs: jax.Array) -> None:
  """Asserts that both arrays are of floats and have the same shape."""
  chex.assert_equal_shape([logprobs, reference_logprobs])
  chex.assert_type([logprobs, reference_logprobs], float)


def k1(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
  """Estimates the KL divergence per token as log π − log π_ref.

  Unbiased for KL(π ‖ π_ref) if the tokens are sampled from π; may be negative
  (Schulman 2020, "Approximating KL divergence").

  Args:
    logprobs: [...] float32, log π of the sampled tokens, nats.
    reference_logprobs: [...] float32, log π_ref of the same tokens.

  Returns:
    [...] float32, nats.

  >>> print(k1(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])))
  [ 0.5 -1. ]
  """
  _check_logprobs(logprobs, reference_logprobs)
  return logprobs - reference_logprobs


def k2(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
  """Estimates the KL divergence per token as ½ (log π − log π_ref)².

  Biased, but its expected gradient is that of KL(π ‖ π_ref) (Schulman 2020).

  Args:
    logprobs: [...] float32, log π of the sampled tokens, nats.
    reference_logprobs: [...] float32, log π_ref of the same tokens.

  Returns:
    [...] float32.

  >>> print(k2(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])))
  [0.125 0.5  ]
  """
  _check_logprobs(logprobs, reference_logprobs)
  return 0.5 * (logprobs - reference_logprobs) ** 2


def k3(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
  """Estimates the KL divergence per token as exp(−k1) + k1 − 1.

  Unbiased and never negative (Schulman 2020). Its expected gradient, however,
  is that of KL(π_ref ‖ π).

  Args:
    logprobs: [...] float32, log π of the sampled tokens, nats.
    reference_logprobs: [...] float32, log π_ref of the same tokens.

  Returns:
    [...] float32, nats.

  >>> estimates = k3(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0]))
  >>> print(jax.device_get(estimates).round(3))
  [0.107 0.718]
  """
  _check_logprobs(logprobs, reference_logprobs)
  log_ratio = reference_logprobs - logprobs  # −k1
  return finite_exp.expm1(log_ratio) - log_ratio  # expm1 is accurate near 0


def k1_term(logprobs: jax.Array, reference_logprobs: jax.Array) -> jax.Array:
  """Computes k1 as a term of a loss: the value of k1 with the gradient of k2.

  The gradient of k1 itself, ∇ log π, has the expectation 0 under π and would
  not penalise anything; the expected gradient of k2 is that of KL(π ‖ π_ref).

  Args:
    logprobs: [...] float32, log π of the sampled tokens, nats.
    reference_logprobs: [...] float32, log π_ref of the same tokens.

  Returns:
    [...] float32, nats.

  >>> print(k1_term(jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])))
  [ 0.5 -1. ]
  """
  squared = k2(logprobs, reference_logprobs)  # provides the gradient
  return squared + jax.lax.stop_gradient(k1(logprobs, reference_logprobs) - squared)


# The KL terms that a loss may add for each token, by the name that a config gives them.
KL_TERMS: dict[str, KLTerm] = {
  'k1': k1_term,  # with the gradient of KL(π ‖ π_ref)
  'k2': k2,  # likewise
  'k3': k3,  # with that of KL(π_ref ‖ π)
}


def best_of_n_kl(count: int) -> float:
  """Bounds KL(best of n samples ‖ the policy) by log n − (n − 1)/n.

  The bound is attained if no two samples score the same (Beirami et al. 2024,
  arXiv:2401.01879, theorem 1; first in Stiennon et al. 2020, arXiv:2009.01325,
  appendix G.3).

  Args:
    count: n, at least 1.

  Returns:
    The bound, nats.

  >>> round(best_of_n_kl(4), 4)
  0.6363
  """
  return math.log(count) - (count - 1) / count


def adapt_kl_coefficient(
  coefficient: jax.Array | float,
  kl: jax.Array | float,
  target: float,
  horizon: float,
  episodes: int,
) -> jax.Array:
  """Raises the KL coefficient if the KL is above its target, and lowers it if below.

  β ← β (1 + clip(kl / target − 1, ±0.2) · episodes / horizon) (Ziegler et al.
  2019, arXiv:1909.08593, section 2.2, as in their code).

  Args:
    coefficient: [] float32, β.
    kl: [] float32, the mean over the batch of the KL of a whole response, nats.
    target: the target of `kl`, nats.
    horizon: the episodes over which the coefficient may change by a fifth.
    episodes: the number of responses in the batch.

  Returns:
    [] float32, the next β.

  >>> print(adapt_kl_coefficient(jnp.float32(0.1), jnp.float32(6.6), 6.0, 1000.0, 100))
  0.101
  """
  chex.assert_rank([coefficient, kl], 0)
  error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
  return coefficient * (1.0 + error * episodes / horizon)
