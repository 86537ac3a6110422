"""The loss of next-token prediction."""

import chex
import jax

from rlhf_jax.objectives import masked


def nll(logprobs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sums the negative log-likelihood −Σ_t log π(y_t | y_<t) over the targets in the mask.

  Args:
    logprobs: [B, T] float32, log-probabilities of the targets, nats.
    mask: [B, T] bool or numeric, non-zero where a target counts.

  Returns:
    (sum over the targets, number of targets), [] float32, nats.

  >>> import jax.numpy as jnp
  >>> total, targets = nll(jnp.array([[-0.5, -1.5, -9.0]]), jnp.array([[1.0, 1.0, 0.0]]))
  >>> print(total, targets)
  2.0 2.0
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask])
  chex.assert_type(logprobs, float)
  targets = mask != 0
  return -masked.total(logprobs, targets), masked.count(targets)
