"""From rewards to advantages.

Letters: B prompts (or rows), K responses to each prompt, N responses of any
prompts, R tokens of a response.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

# (rewards [B, K] float32, lengths [B, K] int32) → advantages [B, K] float32
GroupAdvantage = Callable[[jax.Array, jax.Array], jax.Array]


def after_end(mask: jax.Array) -> jax.Array:
  """Extends the mask of each response by the position after its end.

  A response of R tokens has no such position; its mask stays as it is.

  Args:
    mask: [B, R] bool, True up to and including the end token.

  Returns:
    [B, R] bool.

  >>> print(after_end(jnp.array([[True, False, False], [True, True, True]])))
  [[ True  True False]
   [ True  True  True]]
  """
  chex.assert_rank(mask, 2)
  chex.assert_type(mask, bool)
  return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))


def place_rewards(
  scores: jax.Array,
  kl: jax.Array,
  mask: jax.Array,
  coefficient: jax.Array | float,
) -> jax.Array:
  """Assigns each token its reward: −β · kl_t, plus the score at the last position.

  The rewards of a response sum to r − β log(π / π_ref) (Ziegler et al. 2019,
  arXiv:1909.08593, section 2), as the log-ratio is a sum over tokens.

  Args:
    scores: [B] float32, r.
    kl: [B, R] float32, KL estimate per token (`divergence.k1`), nats.
    mask: [B, R] bool, the response up to and including its end token, or the
      position after it (`after_end`).
    coefficient: [] float32, β.

  Returns:
    [B, R] float32, 0 outside the mask.

  >>> kl = jnp.array([[0.5, 0.5, 0.5]])
  >>> print(place_rewards(jnp.array([0.75]), kl, jnp.array([[True, True, False]]), 0.1))
  [[-0.05  0.7   0.  ]]
  """
  chex.assert_rank([scores, kl, mask, coefficient], [1, 2, 2, 0])
  chex.assert_equal_shape([kl, mask])
  chex.assert_equal_shape_prefix([scores, kl], 1)
  chex.assert_type([scores, kl, mask], [float, float, bool])
  last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
  penalties = jnp.where(mask, -coefficient * kl, 0.0)  # [B, R]
  return penalties + jnp.where(last, scores[:, None], 0.0)


def gae(
  rewards: jax.Array,
  values: jax.Array,
  mask: jax.Array,
  discount: float,
  gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
  """Computes generalised advantage estimates, and the returns that values are trained on.

  δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γ λ A_{t+1}  (Schulman et al. 2016,
  arXiv:1506.02438, eq. 16). The value after the last token is 0. Positions outside the
  mask are skipped, as if the next position inside followed directly.

  Args:
    rewards: [B, R] float32.
    values: [B, R] float32, V before each token is chosen.
    mask: [B, R] bool.
    discount: γ.
    gae_lambda: λ.

  Returns:
    (advantages, returns = advantages + values), [B, R] float32, 0 outside the
    mask.

  >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]])
  >>> advantages, returns = gae(rewards, values, jnp.array([[True, True]]), 1.0, 0.5)
  >>> print(advantages, returns)  # δ = (−0.25, 0.75)
  [[0.125 0.75 ]] [[0.625 1.   ]]
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  chex.assert_type([rewards, values, mask], [float, float, bool])

  def step_back(carry: tuple[jax.Array, ...], position: tuple[jax.Array, ...]):
    next_advantage, next_value = carry
    reward, value, inside = position
    delta = reward + discount * next_value - value  # δ_t
    advantage = delta + discount * gae_lambda * next_advantage  # A_t
    # positions outside the mask pass on what they got from the next one
    advantage = jnp.where(inside, advantage, next_advantage)
    value = jnp.where(inside, value, next_value)
    return (advantage, value), advantage

  zeros = jnp.zeros(rewards.shape[0])  # A and V after the last token
  _, advantages = jax.lax.scan(
    step_back,
    (zeros, zeros),
    (rewards.T, values.T, mask.T),  # scanned along R
    reverse=True,
  )
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, jnp.where(mask, advantages + values, 0.0)


def _check_group(rewards: jax.Array, lengths: jax.Array) -> None:
  """Asserts that rewards [B, K] are floats, and lengths [B, K] integers."""
  chex.assert_rank([rewards, lengths], 2)
  chex.assert_equal_shape([rewards, lengths])
  chex.assert_type([rewards, lengths], [float, int])


def leave_one_out(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
  """Compares each reward with the mean of the others: r_i − mean_{j ≠ i} r_j.

  RLOO (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8). A constant that is added
  to all rewards of a prompt changes nothing, here and in `above_mean` and
  `standardised`.

  Args:
    rewards: [B, K] float32, K responses to each prompt.
    lengths: [B, K] int32, tokens of each response; unused.

  Returns:
    [B, K] float32, 0 for K = 1.

  >>> print(leave_one_out(jnp.array([[1.0, 2.0, 6.0]]), jnp.array([[4, 4, 9]])))
  [[-3.  -1.5  4.5]]
  """
  # r_i − mean_{j ≠ i} r_j = (r_i − mean_j r_j) K / (K − 1)
  count = rewards.shape[1]
  return above_mean(rewards, lengths) * (count / max(count - 1, 1))


def above_mean(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
  """Compares each reward with the mean of its prompt: r_i − mean_j r_j.

  Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2).

  Args:
    rewards: [B, K] float32.
    lengths: [B, K] int32; unused.

  Returns:
    [B, K] float32.

  >>> print(above_mean(jnp.array([[1.0, 2.0, 6.0]]), jnp.array([[4, 4, 9]])))
  [[-2. -1.  3.]]
  """
  _check_group(rewards, lengths)
  del lengths
  # Without the shift, the advantages of equal rewards would be rounding errors
  # rather than exactly 0, and Adam would magnify their gradients.
  shifted = rewards - rewards[:, :1]
  return shifted - jnp.mean(shifted, axis=1, keepdims=True)


def standardised(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
  """Standardises the rewards of each prompt: (r_i − mean_j r_j) / (std_j r_j + 1e-4).

  The standard deviation divides by K − 1 (GRPO: Shao et al. 2024,
  arXiv:2402.03300, section 4.1.2).

  Args:
    rewards: [B, K] float32.
    lengths: [B, K] int32; unused.

  Returns:
    [B, K] float32, 0 for K = 1.

  >>> print(standardised(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[4, 4, 9]])).round(2))
  [[-1.  0.  1.]]
  """
  centred = above_mean(rewards, lengths)  # [B, K]
  variance = jnp.sum(centred**2, axis=1, keepdims=True) / max(rewards.shape[1] - 1, 1)
  return centred / (jnp.sqrt(variance) + 1e-4)


def batch_baseline(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
  """Compares each reward with the mean of the batch.

  REINFORCE with a baseline (Williams 1992, section 2).

  Args:
    rewards: [B, K] float32.
    lengths: [B, K] int32; unused.

  Returns:
    [B, K] float32, exactly 0 if all rewards are equal.

  >>> print(batch_baseline(jnp.array([[1.0], [2.0]]), jnp.array([[4], [9]])))
  [[-0.5]
   [ 0.5]]
  """
  _check_group(rewards, lengths)
  del lengths
  shifted = rewards - rewards[0, 0]  # so that equal rewards give exactly 0, as above
  return shifted - jnp.mean(shifted)


# The advantages of responses to a prompt, by the name that a config gives them.
GROUP_ADVANTAGES: dict[str, GroupAdvantage] = {
  'leave_one_out': leave_one_out,
  'above_mean': above_mean,
  'standardised': standardised,
  'batch_baseline': batch_baseline,
}


def reward_to_go(rewards: jax.Array) -> jax.Array:
  """Sums the rewards from each token to the end of its response: Σ_{s ≥ t} r_s.

  Args:
    rewards: [N, R] float32, 0 outside the response.

  Returns:
    [N, R] float32.

  >>> print(reward_to_go(jnp.array([[1.0, -2.0, 4.0]])))
  [[3. 2. 4.]]
  """
  chex.assert_rank(rewards, 2)
  chex.assert_type(rewards, float)
  return jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


def overlong_penalty(lengths: jax.Array, limit: int, buffer: int) -> jax.Array:
  """Computes the penalty that is added to the reward of a long response.

  It is 0 up to limit − buffer tokens, and falls linearly to −1 at the limit
  (DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 13).

  Args:
    lengths: [N] int32, tokens.
    limit: the most tokens that a response may have.
    buffer: the number of tokens before the limit over which the penalty grows.

  Returns:
    [N] float32.

  >>> print(overlong_penalty(jnp.array([16, 18, 20]), limit=20, buffer=4))
  [ 0.  -0.5 -1. ]
  """
  chex.assert_rank(lengths, 1)
  chex.assert_type(lengths, int)
  return jnp.clip((limit - buffer - lengths) / buffer, -1.0, 0.0)
