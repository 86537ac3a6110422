"""Next-token prediction on packed rows, for pre-training and supervised fine-tuning.

  minimise −mean_t log p(x_t | x_<t)   over the target tokens of the whole batch

The loss mask says which tokens are targets. The mean is over all of them, however
the batch is cut into micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import language_model, masked
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_sequences,
  Program,
  resident,
  StagePlan,
)
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.training import Definitions
from rlhf_jax.types import Params, Sequences, TrainState


def loss(params: Params, batch: Sequences, model: Model) -> steps.Loss:
  """Computes the negative log-likelihood of the target tokens.

  Args:
    params: the model's parameters.
    batch: B rows of T tokens.
    model: the model's definition.

  Returns:
    The sum over target tokens, in nats, and their number; the mean entropy; the
    tokens read.
  """
  hidden, _ = model.apply(  # [B, T, D]
    params,
    batch.tokens,
    batch.positions,
    batch.segment_ids,
  )
  # The state at a token predicts the next one.
  logprobs, entropies = heads.token_logprobs(model, params, hidden[:, :-1], batch.tokens[:, 1:])
  mask = batch.loss_mask[:, 1:]  # [B, T - 1]
  total, weight = language_model.nll(logprobs, mask)
  return steps.Loss(
    total=total,
    weight=weight,
    means={'entropy': masked.total(entropies, mask != 0)},
    counts={'tokens': masked.total(1.0, batch.segment_ids > 0)},
  )


def train_step(
  state: TrainState,
  batch: Sequences,
  definitions: Definitions,
  options: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Makes one update of next-token prediction.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: the parameters, the optimizer's state, the step and the root key.
    batch: B rows of T tokens; the loss mask says which tokens are targets.
    definitions: the definitions of the model, its optimizer and the layout.
    options: the stage's options, of which `microbatches` is read: B is a multiple of
      it.

  Returns:
    The next state, and metrics ([] float32 each): loss and entropy in nats per target
    token, tokens, and the norms of gradient, update and parameters.
  """

  def batch_loss(params: Params, batch: Sequences, key: jax.Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    return loss(params, batch, definitions.model)

  return steps.gradient_step(
    batch_loss,
    definitions.optimizer,
    state,
    batch,
    microbatches=options.microbatches,
  )


def build_evaluation(
  model: Model,
  layout: Layout,
  examples: Sequence[Mapping[str, np.ndarray]],
  batch_size: int,
  max_length: int,
) -> Callable[[Params], tuple[float, float]]:
  """Builds the measurement of the loss on held-out examples, each in a row of its own.

  Args:
    model: the model's definition.
    layout: how batches lie on the mesh.
    examples: encoded examples, see data/encode.py.
    batch_size: rows at once.
    max_length: tokens in a row.

  Returns:
    evaluate(params) → (mean nats per target token, number of target tokens).
  """

  @jax.jit
  def sums(params: Params, batch: Sequences) -> jax.Array:
    value = loss(params, batch, model)
    return jnp.stack([value.total, value.weight])  # [2], one transfer to the host

  def evaluate(params: Params) -> tuple[float, float]:
    total = np.zeros(2)  # float64: thousands of float32 sums are added
    for batch in batches.sequences_once(examples, batch_size, max_length):
      total += np.asarray(sums(params, layout.place(batch)), np.float64)
    return total[0] / max(total[1], 1.0), total[1]

  return evaluate


def plan(
  context: Context,
  options: Any,
  step: Callable[..., tuple[TrainState, dict]] = train_step,
) -> StagePlan:
  """Plans the step of a stage that learns from packed rows.

  Args:
    context: the context of the stage, on an abstract layout.
    options: the stage's options.
    step: the train step, un-jitted.
  """
  trainable = training.open_trainable(context, options)
  state = trainable.init()
  definitions = trainable.definitions
  batch = abstract_sequences(context.layout, options.batch_size, options.max_length)
  compiled = training.compile_train_step(step, definitions, options)
  estimate = work.training(
    definitions.model.config,
    context.layout,
    options.batch_size,
    options.max_length,
    options.max_length,  # the vocabulary is computed at every place
    options.microbatches,
    state.trained,
  )
  lower = functools.partial(compiled.lower, state, batch)
  program = Program('step', lower, estimate)
  return StagePlan(resident(state), [program], [])
