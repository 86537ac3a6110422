"""Losses of policies and values on sampled tokens; the caller masks and reduces (see `REDUCE`).

Policy losses: (logprobs, old_logprobs, advantages, mask, clip_low, clip_high) → (losses, ratios, held),
all [N, R]: N answers of at most R tokens; `ratios` is ρ = π / π_old, `held` says where a clip holds the gradient back.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.objectives import masked


def clipped(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
  """max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)): PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7) and GRPO; with
  ε_high > ε_low the clip-higher of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 10).

  Args:
    logprobs, old_logprobs, advantages: [N, R] float32.
    mask: [N, R] bool; unused here.
    clip_low, clip_high: ε.

  Returns:
    (losses, ratios, whether the clip holds the gradient back): [N, R] float32, float32, bool.
  """
  del mask
  ratios = jnp.exp(logprobs - old_logprobs)
  free, held = -advantages * ratios, -advantages * jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
  return jnp.maximum(free, held), ratios, held > free


def reinforce(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
  """−A log π (Williams 1992): no ratio, no clip. Args and returns as `clipped`."""
  del mask, clip_low, clip_high
  return -advantages * logprobs, jnp.exp(logprobs - old_logprobs), jnp.zeros(logprobs.shape, bool)


def gspo(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
  """`clipped` with the ratio of the whole answer, (π / π_old)^(1/|y|), at each of its tokens (Zheng et al. 2025,
  arXiv:2507.18071, eqs. 5 – 7). Args and returns as `clipped`."""
  count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
  mean = jnp.sum(jnp.where(mask, logprobs - old_logprobs, 0.0), axis=1, keepdims=True) / count
  return clipped(jnp.broadcast_to(mean, logprobs.shape), 0.0, advantages, mask, clip_low, clip_high)


def cispo(logprobs, old_logprobs, advantages, mask, clip_low: float, clip_high: float):
  """−sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π: clipped weights, and every token keeps a gradient (MiniMax 2025,
  arXiv:2506.13585, eqs. 4 – 5). Args as `clipped`; `held` says where a weight is clipped."""
  del mask
  ratios = jnp.exp(logprobs - old_logprobs)
  weights = jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high)
  return -jax.lax.stop_gradient(weights) * advantages * logprobs, ratios, weights != ratios


POLICY = {'clipped': clipped, 'reinforce': reinforce, 'gspo': gspo, 'cispo': cispo}


def clipped_value(values, old_values, returns, clip: float):
  """½ max((V − R)², (clip(V, V_old ± ε) − R)²), as in the code of Ziegler et al. 2019.

  Args:
    values, old_values, returns: [N, R] float32.
    clip: ε.

  Returns:
    (losses [N, R] float32, whether the clip holds the gradient back [N, R] bool).
  """
  near = jnp.clip(values, old_values - clip, old_values + clip)
  free, held = (values - returns) ** 2, (near - returns) ** 2
  return 0.5 * jnp.maximum(free, held), held > free


def truncated_weights(old_logprobs, sampler_logprobs, mask, limit: float):
  """min(π_old / π_sampler, C), which corrects for answers of an older policy (truncated importance sampling: Espeholt
  et al. 2018, arXiv:1802.01561, section 4.1). [N, R] → [N, R] float32, 0 outside the mask."""
  return jnp.where(mask, jnp.minimum(jnp.exp(old_logprobs - sampler_logprobs), limit), 0.0)


def token_mean(losses, mask):
  """Every token of the batch weighs the same (DAPO, eq. 12). → (sum, what to divide it by), [] float32."""
  return masked.total(losses, mask), masked.total(1.0, mask)


def sequence_mean(losses, mask):
  """The mean of each answer, then of the answers (GRPO, eq. 3)."""
  count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
  return masked.total(losses / count, mask), _answers(mask)


def sequence_sum(losses, mask):
  """The sum of each answer, then the mean of the answers: the gradient of log π of whole answers (RLOO)."""
  return masked.total(losses, mask), _answers(mask)


def constant(losses, mask):
  """The sum over the batch by answers × R, so that no length is favoured (Dr. GRPO, section 3.2)."""
  return masked.total(losses, mask), _answers(mask) * mask.shape[1]


def _answers(mask):
  return jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)


REDUCE = {'token_mean': token_mean, 'sequence_mean': sequence_mean, 'sequence_sum': sequence_sum, 'constant': constant}
