"""PPO's update: epochs of minibatches, and the losses of policy, value model and documents."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import (
  divergence,
  language_model,
  masked,
  policy_gradient,
)
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.ppo.assessment import (
  assess_rollout,
  evaluate_responses,
  evaluate_samples,
  forward,
  trusts_sampler,
  value_loss_weight,
)
from rlhf_jax.stages.ppo.options import Options
from rlhf_jax.stages.ppo.state import (
  AssessedRollout,
  Definitions,
  Documents,
  Evaluated,
  Forward,
  PPOState,
)
from rlhf_jax.stages.shared import (
  off_policy,
  packing,
  rollout,
)
from rlhf_jax.stages.shared.rollout import ScoredRollout
from rlhf_jax.types import (
  Array,
  merge_params,
  Params,
  Sequences,
)


def train_step(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> tuple[PPOState, dict[str, Array]]:
  """Updates policy and value model from scored responses: assessment, then epochs of minibatches.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: policy, value model, the optimizer's state of both, β, the step and the
      root key.
    scored: N = B * K responses of at most R tokens to prompts of at most P, with
      their scores. If it holds `pretraining` documents, their loss is added (PPO-ptx).
    reference_params: the parameters of the reference; None where no KL counts.
    definitions: the definitions of policy, value model, reference, optimizer and layout.
    options: the options of the stage.

  Returns:
    The next state, and metrics ([] float32 each; docs/metrics.md). A minibatch whose
    loss or gradient is not finite changes nothing.
  """
  update = update_once if rollout.is_one_pass(options) else update_in_minibatches
  (trained, opt_state), metrics, updated = update(
    state, scored, reference_params, definitions, options
  )
  # Where no minibatch changed anything, step and β stay too: the step is made again.
  kl_coefficient = next_kl_coefficient(state.kl_coefficient, metrics, scored, options)
  step = state.step + updated.astype(jnp.int32)
  next_state = state.replace(
    step=step,
    trained=trained['policy'],
    opt_state=opt_state,
    value_trained=trained['value'],
    sampler_trained=off_policy.next_sampler(
      trained['policy'], state.sampler_trained, step, options
    ),
    kl_coefficient=jnp.where(updated, kl_coefficient, state.kl_coefficient),
  )
  return next_state, metrics


def update_once(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> tuple[tuple[Params, Any], dict[str, Array], Array]:
  """Makes the only update of a step, whose forward pass also gives what was before it.

  The results are those of `update_in_minibatches`, which would run policy and
  value model once more.

  The arguments are those of `train_step`.

  Returns:
    ({'policy', 'value'}: the trained parameters, the optimizer's state), metrics, and
    whether they changed, [] bool.
  """
  temperature = options.sampling.temperature
  response_length = scored.samples.tokens.shape[1]
  reference = rollout.reference_logprobs(
    definitions.reference_model,
    reference_params,
    scored.sequences,
    response_length,
    temperature,
  )
  documents = weigh_documents(scored.pretraining, scored.samples.mask)

  def batch_loss(trained: Params, scored: ScoredRollout, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    params = merge_params(trained, _frozen(state))
    now = forward(
      definitions,
      params['policy'],
      params['value'],
      scored.sequences,
      response_length,
      temperature,
    )
    evaluated = jax.lax.stop_gradient(Evaluated(*now, reference))
    assessed, metrics = assess_rollout(scored, evaluated, state.kl_coefficient, options)
    value = loss(now, assessed, options)
    if documents is not None:
      value = steps.add_losses(value, document_loss(params, documents, definitions, options))
    return dataclasses.replace(value, counts=metrics)

  trained = {'policy': state.trained, 'value': state.value_trained}
  trained, opt_state, metrics = steps.update_params(
    batch_loss, definitions.optimizer, trained, state.opt_state, scored, steps.update_key(state)
  )
  metrics['policy/first_ratio'] = metrics['policy/ratio']
  return (trained, opt_state), metrics, steps.update_is_finite(metrics)


def update_in_minibatches(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> tuple[tuple[Params, Any], dict[str, Array], Array]:
  """Assesses the responses, then passes over them in epochs of minibatches.

  The arguments are those of `train_step`.

  Returns:
    ({'policy', 'value'}: the trained parameters, the optimizer's state), metrics, and
    whether any minibatch changed them, [] bool.
  """
  # The policy's log-probabilities are computed again here, unless the sampler's are the same to
  # the bit, so that the first ratio is exactly 1.
  evaluate = evaluate_samples if trusts_sampler(definitions, options) else evaluate_responses
  evaluated = evaluate(state, scored, reference_params, definitions, options)
  assessed, metrics = assess_rollout(scored, evaluated, state.kl_coefficient, options)
  update = functools.partial(
    update_minibatch, frozen=_frozen(state), definitions=definitions, options=options
  )
  trained = {'policy': state.trained, 'value': state.value_trained}
  carry, update_metrics = rollout.epochs_of_minibatches(
    update,
    (trained, state.opt_state),
    assessed,
    steps.update_key(state),
    epochs=options.epochs,
    minibatches=options.minibatches,
    layout=definitions.layout,
    unshuffled=scored.pretraining,
  )
  metrics |= rollout.epoch_metrics(update_metrics)
  return carry, metrics, rollout.made_an_update(update_metrics)


def _frozen(state: PPOState) -> dict[str, Params]:
  """Returns the parameters of policy and value model that are not trained."""
  return {
    'policy': state.frozen.get('params', {}),
    'value': state.frozen.get('value_params', {}),
  }


def next_kl_coefficient(
  coefficient: Array,
  metrics: Mapping[str, Array],
  scored: ScoredRollout,
  options: Options,
) -> Array:
  """Returns β for the next step, [] float32: steered towards `kl_target`, or unchanged."""
  if not options.kl_target or 'kl' not in metrics:
    return coefficient
  episodes = scored.scores.shape[0]  # N; one response is one episode
  return divergence.adapt_kl_coefficient(
    coefficient, metrics['kl'], options.kl_target, options.kl_horizon, episodes
  )


def update_minibatch(
  carry: tuple[Params, Any],
  assessed: AssessedRollout,
  pretraining: Sequences | None,
  key: Array,
  frozen: dict[str, Params],
  definitions: Definitions,
  options: Options,
) -> tuple[tuple[Params, Any], dict[str, Array]]:
  """Makes one optimizer update from a minibatch of responses.

  Args:
    carry: ({'policy', 'value'}: the trained parameters, the optimizer's state).
    assessed: the minibatch.
    pretraining: documents for PPO-ptx; None without.
    key: the random key of this minibatch.
    frozen: {'policy', 'value'}: the parameters beside the trained ones.
    definitions: the definitions of the models, the optimizer and the layout.
    options: the options of the stage.

  Returns:
    The next carry, and metrics ([] float32 each).
  """
  trained, opt_state = carry
  documents = weigh_documents(pretraining, assessed.mask)
  value_weight = value_loss_weight(assessed.mask, assessed.value_mask)
  assessed = assessed.replace(value_weight=value_weight)

  def batch_loss(trained: Params, batch: Any, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    assessed, documents = batch
    return part_loss(merge_params(trained, frozen), assessed, documents, definitions, options)

  batch, packing_metrics = packing.pack_minibatch(assessed, definitions, options, documents)
  trained, opt_state, metrics = steps.update_params(
    batch_loss,
    definitions.optimizer,
    trained,
    opt_state,
    batch,
    key,
    options.microbatches,
  )
  return (trained, opt_state), metrics | packing_metrics


def weigh_documents(documents: Sequences | None, mask: Array) -> Documents | None:
  """Computes the weight of the documents' summed loss beside that of the responses (PPO-ptx).

  The loss is divided by the number of response tokens. With this weight the documents'
  part is a mean over their own tokens, however a minibatch is cut into micro-batches or
  packed: hence it is computed for the whole minibatch, and repeated for each row to be
  cut with the rows.

  Args:
    documents: [n, T]; None without.
    mask: [N, R] bool, the responses.

  Returns:
    The documents with their weight; None without.
  """
  if documents is None:
    return None
  responses = masked.total(1.0, mask)
  targets = masked.total(1.0, documents.loss_mask != 0)
  rows = documents.tokens.shape[0]
  return Documents(documents, jnp.full(rows, responses / jnp.maximum(targets, 1.0)))


def part_loss(
  params: Params,
  assessed: AssessedRollout | None,
  documents: Documents | None,
  definitions: Definitions,
  options: Options,
) -> steps.Loss:
  """Runs the models over a part of a minibatch, and computes its loss.

  Args:
    params: {'policy', 'value'}: complete parameters.
    assessed: n responses; None if the part has none.
    documents: for PPO-ptx; None if the part has none.
    definitions: the definitions of the models.
    options: the options of the stage.

  Returns:
    The sum of `loss` and `document_loss`.
  """
  if assessed is None:
    assert documents is not None  # no part is empty
    return document_loss(params, documents, definitions, options)
  now = forward(
    definitions,
    params['policy'],
    params['value'],
    assessed.sequences,
    assessed.mask.shape[1],  # R
    options.sampling.temperature,
  )
  value = loss(now, assessed, options)
  if trusts_sampler(definitions, options):
    value = off_policy.measure_gap(value, now.logprobs, assessed.logprobs, assessed.mask)
  if documents is None:
    return value
  return steps.add_losses(value, document_loss(params, documents, definitions, options))


def loss(now: Forward, assessed: AssessedRollout, options: Options) -> steps.Loss:
  """Computes the clipped losses of policy and value.

  Args:
    now: the outputs of both models on n responses.
    assessed: these responses, of at most R tokens.
    options: the options of the stage.

  Returns:
    The loss summed over response tokens, and their number; statistics over the same
    tokens.
  """
  mask = assessed.mask  # [n, R] bool
  policy_losses, ratios, policy_clipped = policy_gradient.clipped(
    now.logprobs,
    assessed.logprobs,
    assessed.advantages,
    mask,
    options.clip,  # below 1
    options.clip,  # above 1
  )
  value_losses, value_clipped = policy_gradient.clipped_value(
    masked.keep(now.values, assessed.value_mask),
    masked.keep(assessed.values, assessed.value_mask),
    masked.keep(assessed.returns, assessed.value_mask),
    options.value_clip,
  )
  policy_total = masked.total(policy_losses * assessed.weights, mask)
  value_total = masked.total(value_losses, assessed.value_mask)
  # The sum is divided by the number of response tokens.
  value_part = assessed.value_weight[0] * value_total  # the weight is the same in every row
  objective = policy_total + options.value_coefficient * value_part
  approx_kl = 0.5 * masked.total((now.logprobs - assessed.logprobs) ** 2, mask)
  means = {
    'policy/loss': policy_total,
    'policy/clip_fraction': masked.total(policy_clipped, mask),
    'policy/ratio': masked.total(ratios, mask),
    'policy/approx_kl': approx_kl,
    'policy/entropy': masked.total(now.entropies, mask),
    'value/loss': (value_total, masked.count(assessed.value_mask)),
    'value/clip_fraction': masked.total(value_clipped, mask),
  }
  return steps.Loss(total=objective, weight=masked.total(1.0, mask), means=means)


def document_loss(
  params: Params, documents: Documents, definitions: Definitions, options: Options
) -> steps.Loss:
  """Computes the loss of PPO-ptx.

  Args:
    params: {'policy', …}: complete parameters.
    documents: with their weight.
    definitions: of which the policy's is used.
    options: the options of the stage.

  Returns:
    The loss in units of the summed loss of the responses, to whose tokens it adds none.
  """
  nll = pretraining_nll(params['policy'], documents.rows, definitions.model)
  nll = nll * documents.weight[0]  # the same in every row
  return steps.Loss(
    total=options.pretraining_coefficient * nll,
    weight=jnp.float32(0.0),
    means={'pretraining/loss': nll},
  )


def pretraining_nll(params: Params, documents: Sequences, model: Model) -> Array:
  """Computes the summed negative log-likelihood of documents, [] float32, nats (PPO-ptx)."""
  hidden, _ = model.apply(params, documents.tokens, documents.positions, documents.segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], documents.tokens[:, 1:])
  return language_model.nll(logprobs, documents.loss_mask[:, 1:])[0]
