"""From rewards to advantages."""

import jax
import jax.numpy as jnp


def after_end(mask):
  """The mask [B, R] and the place after its end, where there is one: R tokens at most."""
  return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def place_rewards(scores, kl, mask, coefficient):
  """The reward of each token: −β · kl_t, and the score of the response at the last place of the mask.

  Ziegler et al. 2019, section 2: R = r − β log(π / π_ref), spread over the tokens.

  Args:
    scores: [B] float32.
    kl: [B, R] float32, per-token KL estimate (k1).
    mask: [B, R] bool, the response up to and including its end token (or the place after it: `after_end`).
    coefficient: [] float32, β.

  Returns:
    [B, R] float32, 0 outside the mask.
  """
  last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  return jnp.where(mask, -coefficient * kl, 0.0) + jnp.where(last, scores[:, None], 0.0)


def gae(rewards, values, mask, discount: float, smoothing: float):
  """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

  δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γ λ A_{t+1}; the value after the last token is 0. Places outside the mask
  are stepped over: what stands after them is what follows.

  Args:
    rewards, values: [B, R] float32; values before each token is chosen.
    mask: [B, R] bool.
    discount: γ.
    smoothing: λ.

  Returns:
    (advantages, returns = advantages + values), [B, R] float32, 0 outside the mask.
  """
  def back(carry, now):
    reward, value, inside = now
    next_advantage, next_value = carry
    advantage = reward + discount * next_value - value + discount * smoothing * next_advantage
    advantage = jnp.where(inside, advantage, next_advantage)
    return (advantage, jnp.where(inside, value, next_value)), advantage

  start = (jnp.zeros(rewards.shape[0]), jnp.zeros(rewards.shape[0]))
  _, advantages = jax.lax.scan(back, start, (rewards.T, values.T, mask.T), reverse=True)
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)
