"""The clipped losses of PPO (Schulman et al. 2017, arXiv:1707.06347), per token; the caller masks and reduces."""

import jax.numpy as jnp


def clipped_policy(logprobs, old_logprobs, advantages, clip: float):
  """eq. 7, as a loss: max(−A ρ, −A clip(ρ, 1 ± ε)), ρ = π / π_old.

  Args:
    logprobs, old_logprobs, advantages: [B, R] float32.
    clip: ε.

  Returns:
    (losses, ratios, whether the clip holds the gradient back): [B, R] float32, float32, bool.
  """
  ratios = jnp.exp(logprobs - old_logprobs)
  free, held = -advantages * ratios, -advantages * jnp.clip(ratios, 1.0 - clip, 1.0 + clip)
  return jnp.maximum(free, held), ratios, held > free


def clipped_value(values, old_values, returns, clip: float):
  """½ max((V − R)², (clip(V, V_old ± ε) − R)²), as in the code of Ziegler et al. 2019.

  Args:
    values, old_values, returns: [B, R] float32.
    clip: ε.

  Returns:
    (losses [B, R] float32, whether the clip holds the gradient back [B, R] bool).
  """
  near = jnp.clip(values, old_values - clip, old_values + clip)
  free, held = (values - returns) ** 2, (near - returns) ** 2
  return 0.5 * jnp.maximum(free, held), held > free
