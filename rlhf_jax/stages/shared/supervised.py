"""What pre-training and supervised fine-tuning share: next-token prediction on packed rows, −mean log p(target).

The mean is over the targets of the whole batch (the loss mask says which tokens are targets), however it is cut into
micro-batches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.models import heads
from rlhf_jax.objectives import language_model, masked
from rlhf_jax.runtime import step as steps
from rlhf_jax.types import Sequences


def build_loss(model):
  """loss(params, Sequences, key) → Loss, over target tokens."""
  def loss(params, batch: Sequences, key) -> steps.Loss:
    del key
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    logprobs, entropies = heads.token_logprobs(model, params, hidden[:, :-1], batch.tokens[:, 1:])
    mask = batch.loss_mask[:, 1:]
    total, weight = language_model.nll(logprobs, mask)
    return steps.Loss(total, weight, {'entropy': masked.total(entropies, mask != 0)},
                      {'tokens': masked.total(1.0, batch.segment_ids > 0)})
  return loss


def build_evaluation(model, layout, examples, batch_size, length):
  """evaluate(params) → (mean nats per target, number of targets) over held-out examples, one a row."""
  loss = build_loss(model)

  @jax.jit
  def sums(params, batch):
    value = loss(params, batch, None)
    return jnp.stack([value.total, value.weight])

  def evaluate(params):
    found = sum(np.asarray(sums(params, layout.place(batch)), np.float64)
                for batch in batches.sequences_once(examples, batch_size, length))
    return found[0] / max(found[1], 1.0), found[1]
  return evaluate
