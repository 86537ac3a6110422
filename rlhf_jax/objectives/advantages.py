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


def leave_one_out(rewards):
  """r_i − mean_{j ≠ i} r_j of the answers to one prompt (RLOO: Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).

  Args:
    rewards: [B, K] float32, K answers to each prompt.

  Returns:
    [B, K] float32; 0 for K = 1. A constant added to all rewards of a prompt changes nothing, here and in the next two.
  """
  count = rewards.shape[1]
  return above_mean(rewards) * (count / max(count - 1, 1))


def above_mean(rewards):
  """r_i − mean_j r_j (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783, section 3.2). [B, K] → [B, K]; exactly 0 where a
  prompt's rewards are equal, as rounding would be a gradient that Adam magnifies."""
  moved = rewards - rewards[:, :1]
  return moved - jnp.mean(moved, axis=1, keepdims=True)


def standardised(rewards):
  """(r_i − mean_j r_j) / (std_j r_j + 1e-4), the unbiased deviation (GRPO: Shao et al. 2024, arXiv:2402.03300, section
  4.1.2). [B, K] → [B, K], 0 for K = 1."""
  centred = above_mean(rewards)
  deviation = jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / max(rewards.shape[1] - 1, 1))
  return centred / (deviation + 1e-4)


def batch_baseline(rewards):
  """r − the mean of the batch (REINFORCE with a baseline: Williams 1992, section 2). [B, K] → [B, K]; exactly 0 where
  all are equal."""
  moved = rewards - rewards[0, 0]
  return moved - jnp.mean(moved)


def reward_to_go(x):
  """Σ_{s ≥ t} x_s: what a token still has before it. [N, R] → [N, R]."""
  return jnp.cumsum(x[:, ::-1], axis=1)[:, ::-1]


def overlong_penalty(lengths, limit: int, buffer: int):
  """What is added to the reward of a long answer: 0 up to limit − buffer tokens, falling to −1 at the limit (DAPO: Yu et
  al. 2025, arXiv:2503.14476, eq. 13).

  Args:
    lengths: [N] int32, tokens.

  Returns:
    [N] float32.
  """
  return jnp.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)


GROUP = {'leave_one_out': leave_one_out, 'above_mean': above_mean, 'standardised': standardised,
         'batch_baseline': batch_baseline}
