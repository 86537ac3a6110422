"""Policy and value losses on sampled tokens.

A policy loss computes a loss for each token; a reduction combines these into
the loss of the batch. Both are chosen by name from the tables below.

Letters: N responses of at most R tokens. ρ = π / π_old is the probability of a
token under the policy that is trained, divided by that under the policy that
sampled it.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rlhf_jax.objectives import finite_exp, masked


class PolicyLosses(NamedTuple):
  """The result of a policy loss, for each token."""

  losses: jax.Array  # [N, R] float32, not yet masked
  ratios: jax.Array  # [N, R] float32, ρ
  # [N, R] bool, where clipping stops the gradient or limits a weight
  clipped: jax.Array


# (logprobs, old_logprobs, advantages, mask, clip_low, clip_high) → PolicyLosses
PolicyLoss = Callable[..., PolicyLosses]
# (losses [N, R], mask [N, R]) → (sum, divisor), [] float32
Reduction = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def clipped(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float,
  clip_high: float,
) -> PolicyLosses:
  """Computes the clipped surrogate max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)).

  PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7) and GRPO; with ε_high >
  ε_low the clip-higher of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 10).

  Args:
    logprobs: [N, R] float32, log π, nats.
    old_logprobs: [N, R] float32, log π_old.
    advantages: [N, R] float32, A.
    mask: [N, R] bool, the tokens of each response.
    clip_low: ε_low.
    clip_high: ε_high.

  Returns:
    PolicyLosses; `clipped` is True where clipping stops the gradient.

  >>> logprobs = jnp.log(jnp.array([[1.0, 2.0, 2.0]]))
  >>> advantages = jnp.array([[1.0, 1.0, -1.0]])
  >>> every = jnp.ones((1, 3), bool)
  >>> result = clipped(logprobs, jnp.zeros((1, 3)), advantages, every, 0.25, 0.25)
  >>> print(result.losses, result.clipped)
  [[-1.   -1.25  2.  ]] [[False  True False]]
  """
  ratios = _token_ratios(logprobs, old_logprobs, advantages, mask)
  return _clipped_surrogate(ratios, masked.keep(advantages, mask), clip_low, clip_high)


def reinforce(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float,
  clip_high: float,
) -> PolicyLosses:
  """Computes −A log π, without ratio or clipping (Williams 1992).

  Args:
    logprobs: [N, R] float32, log π, nats.
    old_logprobs: [N, R] float32, log π_old, for the ratios only.
    advantages: [N, R] float32, A.
    mask: [N, R] bool, the tokens of each response.
    clip_low: unused.
    clip_high: unused.

  Returns:
    PolicyLosses; `clipped` is False everywhere.

  >>> logprobs, every = jnp.array([[-0.5, -2.0]]), jnp.ones((1, 2), bool)
  >>> print(reinforce(logprobs, logprobs, jnp.array([[1.0, -1.0]]), every, 0, 0).losses)
  [[ 0.5 -2. ]]
  """
  del clip_low, clip_high
  ratios = _token_ratios(logprobs, old_logprobs, advantages, mask)
  return PolicyLosses(
    losses=-masked.keep(advantages, mask) * masked.keep(logprobs, mask),
    ratios=ratios,
    clipped=jnp.zeros(logprobs.shape, bool),
  )


def gspo(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float,
  clip_high: float,
) -> PolicyLosses:
  """Computes `clipped` with the ratio of the whole response at each of its tokens.

  The ratio is (π(y|x) / π_old(y|x))^(1/|y|) (GSPO: Zheng et al. 2025,
  arXiv:2507.18071, eqs. 5 – 7).

  Args:
    logprobs: [N, R] float32, log π, nats.
    old_logprobs: [N, R] float32, log π_old.
    advantages: [N, R] float32, A.
    mask: [N, R] bool, the tokens of each response.
    clip_low: ε_low.
    clip_high: ε_high.

  Returns:
    PolicyLosses; the ratios of a response are all the same.

  >>> logprobs = jnp.log(jnp.array([[4.0, 1.0, 9.0]]))
  >>> mask, ones = jnp.array([[True, True, False]]), jnp.ones((1, 3))
  >>> print(gspo(logprobs, jnp.zeros((1, 3)), ones, mask, 0.5, 0.5).losses)
  [[-1.5 -1.5 -0. ]]
  """
  _check_tokens(logprobs, old_logprobs, advantages)
  chex.assert_equal_shape([logprobs, mask])
  tokens = _tokens_of_responses(mask)  # |y| [N, 1]
  log_ratios = jnp.where(mask, logprobs - old_logprobs, 0.0)
  mean = jnp.sum(log_ratios, axis=1, keepdims=True) / tokens
  ratios = finite_exp.exp(jnp.broadcast_to(mean, logprobs.shape))  # the same at each token
  return _clipped_surrogate(ratios, masked.keep(advantages, mask), clip_low, clip_high)


def cispo(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float,
  clip_high: float,
) -> PolicyLosses:
  """Computes −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π.

  The weights are clipped, not the losses, so that every token keeps a gradient
  (CISPO: MiniMax 2025, arXiv:2506.13585, eqs. 4 – 5); sg stops the gradient.

  Args:
    logprobs: [N, R] float32, log π, nats.
    old_logprobs: [N, R] float32, log π_old.
    advantages: [N, R] float32, A.
    mask: [N, R] bool, the tokens of each response.
    clip_low: ε_low.
    clip_high: ε_high.

  Returns:
    PolicyLosses; `clipped` is True where a weight is clipped.

  >>> logprobs, old_logprobs = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
  >>> ones, every = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
  >>> print(cispo(logprobs, old_logprobs, ones, every, 0.5, 0.5).losses)
  [[1.  1.5]]
  """
  ratios = _token_ratios(logprobs, old_logprobs, advantages, mask)
  weights = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)  # [N, R]
  return PolicyLosses(
    losses=-jax.lax.stop_gradient(weights)
    * masked.keep(advantages, mask)
    * masked.keep(logprobs, mask),
    ratios=ratios,
    clipped=weights != ratios,
  )


# The loss of a policy, by the name that a config gives it.
POLICY_LOSSES: dict[str, PolicyLoss] = {
  'clipped': clipped,  # PPO, GRPO, DAPO
  'reinforce': reinforce,  # REINFORCE, RLOO
  'gspo': gspo,
  'cispo': cispo,
}


def clipped_value(
  values: jax.Array,
  old_values: jax.Array,
  returns: jax.Array,
  clip: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes ½ max((V − G)², (clip(V, V_old ± ε) − G)²), G being the returns.

  As in the code of Ziegler et al. 2019 (arXiv:1909.08593).

  Args:
    values: [N, R] float32, V.
    old_values: [N, R] float32, V_old, the values when the responses were
      sampled.
    returns: [N, R] float32, G.
    clip: ε.

  Returns:
    (losses [N, R] float32, where clipping stops the gradient [N, R] bool).

  >>> values, returns = jnp.array([[1.0, 1.0]]), jnp.array([[2.0, 0.0]])
  >>> losses, is_clipped = clipped_value(values, jnp.zeros((1, 2)), returns, 0.5)
  >>> print(losses, is_clipped)
  [[1.125 0.5  ]] [[ True False]]
  """
  _check_tokens(values, old_values, returns)
  clipped_values = jnp.clip(values, old_values - clip, old_values + clip)
  unclipped_losses = (values - returns) ** 2
  clipped_losses = (clipped_values - returns) ** 2
  losses = 0.5 * jnp.maximum(unclipped_losses, clipped_losses)
  return losses, clipped_losses > unclipped_losses


def sampling_ratios(
  old_logprobs: jax.Array,
  sampler_logprobs: jax.Array,
  mask: jax.Array,
  level: str = 'token',
) -> jax.Array:
  """Computes π_old / π_sampler, for responses that another policy sampled.

  Args:
    old_logprobs: [N, R] float32, log π_old: the policy before the update.
    sampler_logprobs: [N, R] float32, log π_sampler: the policy that sampled.
    mask: [N, R] bool.
    level: 'token': each token has its own ratio, which has a low variance and
      ignores that the tokens before it were sampled otherwise too; 'sequence':
      the product over the response, which is unbiased.

  Returns:
    [N, R] float32, 1 outside the mask.

  >>> old = jnp.log(jnp.array([[0.5, 0.5, 1.0]]))
  >>> sampler = jnp.log(jnp.array([[0.25, 1.0, 0.1]]))
  >>> mask = jnp.array([[True, True, False]])
  >>> print(sampling_ratios(old, sampler, mask))
  [[2.  0.5 1. ]]
  >>> print(sampling_ratios(old, sampler, mask, 'sequence'))
  [[1. 1. 1.]]
  """
  chex.assert_rank([old_logprobs, sampler_logprobs, mask], 2)
  chex.assert_equal_shape([old_logprobs, sampler_logprobs, mask])
  chex.assert_type([old_logprobs, sampler_logprobs], float)
  log_ratios = masked.keep(old_logprobs - sampler_logprobs, mask)
  if level == 'sequence':
    totals = jnp.sum(log_ratios, axis=1, keepdims=True)  # [N, 1]
    log_ratios = masked.keep(jnp.broadcast_to(totals, mask.shape), mask)
  return finite_exp.exp(log_ratios)


def truncate_weights(ratios: jax.Array, limit: float) -> jax.Array:
  """Computes the importance weights min(π_old / π_sampler, C).

  Truncated importance sampling (Espeholt et al. 2018, arXiv:1802.01561, section
  4.1).

  Args:
    ratios: [N, R] float32, as `sampling_ratios` returns them.
    limit: C.

  Returns:
    [N, R] float32.

  >>> print(truncate_weights(jnp.array([0.25, 2.0, 8.0]), 3.0))
  [0.25 2.   3.  ]
  """
  return jnp.minimum(ratios, limit)


def mask_weights(ratios: jax.Array, limit: float) -> jax.Array:
  """Computes importance weights that are 0 where π_old / π_sampler is outside [1/C, C].

  What the two policies disagree on teaches nothing. IcePop (Ling team 2025,
  arXiv:2510.18855).

  Args:
    ratios: [N, R] float32, as `sampling_ratios` returns them.
    limit: C, above 1.

  Returns:
    [N, R] float32.

  >>> print(mask_weights(jnp.array([0.25, 2.0, 8.0]), 3.0))
  [0. 2. 0.]
  """
  is_near = (ratios >= 1 / limit) & (ratios <= limit)
  return jnp.where(is_near, ratios, 0.0)


# Name of a rule → (ratios [N, R], limit) → importance weights [N, R].
SAMPLER_WEIGHTS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
  'truncate': truncate_weights,
  'mask': mask_weights,
}


def effective_share(weights: jax.Array, mask: jax.Array) -> jax.Array:
  """Computes (Σ w)² / (n Σ w²), the effective sample size as a share of the n tokens.

  Kong 1992. 1 = all weights are equal.

  Args:
    weights: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    [] float32.

  >>> print(effective_share(jnp.array([[1.0, 1.0, 0.0, 0.0]]), jnp.ones((1, 4), bool)))
  0.5
  """
  squares = masked.total(weights**2, mask) * masked.count(mask)
  return masked.total(weights, mask) ** 2 / jnp.maximum(squares, 1e-8)


def token_mean(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Averages over all tokens of the batch, each of which has the same weight.

  DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 12).

  Args:
    losses: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    (sum, divisor: the number of tokens), [] float32.

  >>> losses = jnp.array([[1.0, 3.0], [6.0, 9.0]])
  >>> total, weight = token_mean(losses, jnp.array([[True, True], [True, False]]))
  >>> print(total, weight)
  10.0 3.0
  """
  _check_losses(losses, mask)
  return masked.total(losses, mask), masked.count(mask)


def sequence_mean(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Averages over the tokens of each response, then over the responses.

  GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 3).

  Args:
    losses: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    (sum, divisor: the number of responses that are not empty), [] float32.

  >>> losses = jnp.array([[1.0, 3.0], [6.0, 9.0]])
  >>> total, weight = sequence_mean(losses, jnp.array([[True, True], [True, False]]))
  >>> print(total, weight)
  8.0 2.0
  """
  _check_losses(losses, mask)
  total = masked.total(losses / _tokens_of_responses(mask), mask)
  return total, _count_responses(mask)


def sequence_sum(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums over the tokens of each response, then averages over the responses.

  It weights log π of whole responses, as RLOO does (Ahmadian et al. 2024,
  arXiv:2402.14740, eq. 8).

  Args:
    losses: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    (sum, divisor: the number of responses that are not empty), [] float32.

  >>> losses = jnp.array([[1.0, 3.0], [6.0, 9.0]])
  >>> total, weight = sequence_sum(losses, jnp.array([[True, True], [True, False]]))
  >>> print(total, weight)
  10.0 2.0
  """
  _check_losses(losses, mask)
  return masked.total(losses, mask), _count_responses(mask)


def constant(losses: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Divides the sum over the batch by N × R, so that no length of response is favoured.

  Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2).

  Args:
    losses: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    (sum, divisor: R times the number of responses that are not empty), []
    float32.

  >>> losses = jnp.array([[1.0, 3.0], [6.0, 9.0]])
  >>> total, weight = constant(losses, jnp.array([[True, True], [True, False]]))
  >>> print(total, weight)
  10.0 4.0
  """
  _check_losses(losses, mask)
  return masked.total(losses, mask), _count_responses(mask) * mask.shape[1]


# How the losses of tokens are combined, by the name that a config gives it.
REDUCTIONS: dict[str, Reduction] = {
  'token_mean': token_mean,  # DAPO
  'sequence_mean': sequence_mean,  # GRPO
  'sequence_sum': sequence_sum,  # RLOO
  'constant': constant,  # Dr. GRPO
}


def _token_ratios(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Computes ρ of each token; 1, without a gradient, outside the mask, whatever stands there."""
  _check_tokens(logprobs, old_logprobs, advantages)
  chex.assert_equal_shape([logprobs, mask])
  return finite_exp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))


def _clipped_surrogate(
  ratios: jax.Array,
  advantages: jax.Array,
  clip_low: float,
  clip_high: float,
) -> PolicyLosses:
  """Computes PPO's clipped surrogate from ratios and advantages [N, R]."""
  clipped_ratios = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
  unclipped_losses = -advantages * ratios  # [N, R]
  clipped_losses = -advantages * clipped_ratios
  return PolicyLosses(
    losses=jnp.maximum(unclipped_losses, clipped_losses),  # a pessimistic bound
    ratios=ratios,
    clipped=clipped_losses > unclipped_losses,
  )


def _tokens_of_responses(mask: jax.Array) -> jax.Array:
  """Counts the tokens of each response, 1 for an empty one: [N, 1] float32."""
  tokens = jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32)
  return jnp.maximum(tokens, 1.0)


def _count_responses(mask: jax.Array) -> jax.Array:
  """Counts the responses that have a token: [] float32."""
  return jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)


def _check_tokens(*arrays: jax.Array) -> None:
  """Asserts that all arrays are floats of one shape [N, R]."""
  chex.assert_rank(list(arrays), 2)
  chex.assert_equal_shape(list(arrays))
  chex.assert_type(list(arrays), float)


def _check_losses(losses: jax.Array, mask: jax.Array) -> None:
  """Asserts that losses [N, R] are floats, and that the mask has the same shape."""
  chex.assert_rank([losses, mask], 2)
  chex.assert_equal_shape([losses, mask])
  chex.assert_type(losses, float)
