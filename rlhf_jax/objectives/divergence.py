"""How far the policy is from the reference: estimators over sampled tokens, and the coefficient that holds it."""

import math

import jax
import jax.numpy as jnp


def k1(logprobs, reference_logprobs):
  """log π − log π_ref at sampled tokens: unbiased for KL(π ‖ π_ref), may be negative. [...] float32, nats."""
  return logprobs - reference_logprobs


def k2(logprobs, reference_logprobs):
  """½ (log π − log π_ref)² (Schulman 2020, "Approximating KL divergence"). [...] float32."""
  return 0.5 * (logprobs - reference_logprobs) ** 2


def k3(logprobs, reference_logprobs):
  """exp(−k1) + k1 − 1: unbiased and never negative (Schulman 2020). [...] float32, nats."""
  log_ratio = reference_logprobs - logprobs
  return jnp.expm1(log_ratio) - log_ratio


def k1_term(logprobs, reference_logprobs):
  """k1 as a term of a loss: its value with the gradient of k2, which is that of KL(π ‖ π_ref). The gradient of k1 alone,
  ∇ log π, is 0 on average over π and would hold nothing. (That of k3 is that of KL(π_ref ‖ π).)"""
  half = k2(logprobs, reference_logprobs)
  return half + jax.lax.stop_gradient(k1(logprobs, reference_logprobs) - half)


TERMS = {'k1': k1_term, 'k2': k2, 'k3': k3}  # of a loss


def best_of_n_kl(count: int) -> float:
  """KL(best of n samples ‖ the policy) ≤ log n − (n − 1)/n, nats; equal where no two samples score the same (Beirami et
  al. 2024, arXiv:2401.01879, theorem 1; first in Stiennon et al. 2020, appendix G.3).

  Args:
    count: n, from 1.
  """
  return math.log(count) - (count - 1) / count


def adapt_kl_coefficient(coefficient, kl, target: float, horizon: float, episodes: int):
  """The next KL coefficient (Ziegler et al. 2019, arXiv:1909.08593, section 2.2, as in their code).

  β ← β (1 + clip(kl / target − 1, ±0.2) · episodes / horizon).

  Args:
    coefficient: [] float32.
    kl: [] float32, mean over the batch of the sum over the response, nats.
    target: the same unit, nats per response.
    horizon: episodes over which the coefficient may change by a fifth.
    episodes: responses in the batch.
  """
  error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
  return coefficient * (1.0 + error * episodes / horizon)
