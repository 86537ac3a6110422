"""Next-token prediction."""

from rlhf_jax.objectives import masked


def nll(logprobs, mask):
  """Negative log-likelihood of the masked targets.

  Args:
    logprobs: [B, T] float32, of the targets.
    mask: [B, T], non-zero where a target counts.

  Returns:
    (sum over the targets, their number): [] float32, nats.
  """
  return -masked.total(logprobs, mask != 0), masked.total(1.0, mask != 0)
