"""Proximal policy optimisation from a reward (step 4 of the four).

  maximise E_{x ~ prompts, y ~ π}[ r(x, y) − β log π(y|x) / π_ref(y|x) ]
           ( + γ E_{x ~ documents}[ log π(x) ] )

One iteration: the policy responds to prompts, the reward scores the responses,
GAE turns the scores and the KL of each token into advantages, and several epochs
of minibatches update policy and value model. The term in brackets is PPO-ptx.
Sources: Ouyang et al. 2022, section 3.5; Stiennon et al. 2020; details of Huang
et al. 2024, arXiv:2403.17031.

Choices where implementations differ (docs/ppo.md):
  1. The score is placed at the end token, or after it (`score_place`); a response
     without an end token scores `missing_eos_score`.
  2. The probability ratio is relative to logprobs that the training forward pass
     recomputes, so it begins at exactly 1.
  3. GAE skips masked tokens; whitening is over the whole rollout, with the population
     variance.
  4. Value and policy are updated together, with one clipped gradient and one
     optimizer.
  5. Importance weights correct for a sampler that is older (`sampler_every`) or computes
     otherwise than the training forward pass (shared/off_policy.py).
Left out: dropout, an entropy bonus, several rollouts in flight.

The path of a step: `build` → `iterate` → `train_step` → `update_once` or
`update_in_minibatches` → `assess_rollout` → `loss`.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.records import Document
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads, lora
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import (
  advantages,
  divergence,
  language_model,
  masked,
  policy_gradient,
)
from rlhf_jax.options import (
  Count,
  NonNegative,
  Positive,
  PositiveShare,
  Share,
)
from rlhf_jax.planning.programs import abstract_sequences, StagePlan
from rlhf_jax.runtime import hosts, loop, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import (
  off_policy,
  packing,
  rollout,
  rollout_metering,
  rollout_plan,
  training,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind, TINY_LOOP
from rlhf_jax.stages.shared.model_store import ModelStore, OpenModel
from rlhf_jax.stages.shared.off_policy import SamplerState
from rlhf_jax.stages.shared.packing import PackedRows
from rlhf_jax.stages.shared.rollout import (
  RolloutDefinitions,
  RolloutParts,
  ScoredRollout,
)
from rlhf_jax.stages.shared.scores import check_scores, open_scores, Score
from rlhf_jax.types import (
  Array,
  merge_params,
  Params,
  Prompts,
  Samples,
  Sequences,
)


@dataclasses.dataclass(frozen=True)
class Options(off_policy.OffPolicyOptions):
  """The section of a PPO stage."""

  # The model whose trunk and head the value model begins with; '' = a new head on
  # the policy's own trunk.
  value: str = 'reward'
  epochs: Count = 2  # passes over the responses of a step
  kl_coefficient: NonNegative = 0.05  # β, in reward per nat; 0 = no KL and no reference
  kl_target: NonNegative = 0.0  # nats per response to which β is steered; 0 = it stays
  kl_horizon: Positive = 10000.0  # episodes over which a steered β changes by a fifth
  clip: PositiveShare = 0.2  # ε of the probability ratio
  value_clip: Positive = 0.2  # ε of the value's change
  value_coefficient: NonNegative = 0.1  # of the value loss beside the policy's
  discount: Share = 1.0  # γ of GAE
  gae_lambda: Share = 0.95  # λ of GAE
  whiten_rewards: bool = False  # to variance 1 over a rollout; the mean stays
  whiten_advantages: bool = True  # to mean 0 and variance 1 over a rollout
  score_place: str = 'eos'  # eos: at the end token; after_eos: behind it, as in TRL
  # Γ of PPO-ptx, of the loss on `pretraining` documents
  pretraining_coefficient: NonNegative = 0.0
  pretraining_max_length: Count = 96  # tokens of a row of documents
  pretraining: DataOptions = DataOptions()
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=3e-5,
    schedule='linear',
    final_scale=0.0,
    eps=1e-5,
  )
  loop: LoopOptions = LoopOptions(eval_every=20, save_every=25, log_every=1)

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = super().unread()
    if not self.kl_target:
      unread['kl_horizon'] = 'kl_target is 0'
    if not self.kl_coefficient:  # what is steered is multiplied, so it stays 0
      unread |= dict.fromkeys(('kl_target', 'kl_horizon'), 'kl_coefficient is 0')
    if not self.pretraining_coefficient:
      why = 'pretraining_coefficient is 0'
      unread |= dict.fromkeys(('pretraining', 'pretraining_max_length'), why)
    if self.epochs * self.minibatches == 1:
      why = 'a step makes one update, before which nothing has changed'
      unread |= dict.fromkeys(('clip', 'value_clip'), why)
    return unread

  @property
  def keeps_reference(self) -> bool:
    """Whether the KL counts."""
    return self.kl_coefficient > 0


# The types of a step.


@dataclasses.dataclass(frozen=True)
class Definitions(RolloutDefinitions):
  """The definitions that a PPO step is compiled with; they hold no arrays.

  Attributes:
    value_model: the value model's definition; the policy's own if the value is a head
      on its trunk.
  """

  value_model: Model


class PPOState(SamplerState):
  """The train state of policy and value model.

  Attributes:
    value_trained: the trained parameters of the value model; if it shares the policy's
      trunk, only those of its head.
    kl_coefficient: [] float32, β.
  """

  value_trained: dict
  kl_coefficient: Array

  @property
  def value_params(self) -> Params:
    """The complete value model: what is trained and what is frozen."""
    return merge_params(self.value_trained, self.frozen.get('value_params', {}))


class AssessedRollout(flax.struct.PyTreeNode):
  """A rollout with its advantages and returns; N = B * K rows.

  Attributes:
    sequences: prompts and responses, [N, P + R].
    mask: [N, R] bool, the response up to and including its end token.
    value_mask: [N, R] bool, where the value model learns: the mask and the score's
      place.
    logprobs: [N, R] float32, of the policy before the update.
    reference_logprobs: [N, R] float32; None without a reference.
    values: [N, R] float32, of the value model before the update.
    advantages: [N, R] float32.
    returns: [N, R] float32.
    weights: [N, R] float32, importance weights for another sampler.
    value_weight: [N] float32, the same in all rows: response tokens for each
      place in `value_mask`, over the rows that make an update. The loss is
      divided by the number of response tokens; with this weight, the value loss
      is a mean over its own places, however a minibatch is cut into
      micro-batches.
  """

  sequences: Sequences
  mask: Array
  value_mask: Array
  logprobs: Array
  reference_logprobs: Array | None
  values: Array
  advantages: Array
  returns: Array
  weights: Array
  value_weight: Array


class Evaluated(NamedTuple):
  """The outputs of all models on N responses, before the update."""

  logprobs: Array  # [N, R] float32, of the policy
  entropies: Array  # [N, R] float32, of the policy's distributions
  values: Array  # [N, R] float32
  reference_logprobs: Array | None  # [N, R] float32


class Forward(NamedTuple):
  """The outputs of policy and value model on n responses."""

  logprobs: Array  # [n, R] float32
  entropies: Array  # [n, R] float32
  values: Array  # [n, R] float32, at the state before each response token


# The pure functions of a step, in the order in which they are called.


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
  update = update_in_minibatches
  if options.epochs * options.parts == 1 and not options.packed_rows:
    update = update_once
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
  weight = pretraining_weight(scored.samples.mask, scored.pretraining)

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
    value = loss(params, now, assessed, scored.pretraining, weight, definitions, options)
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
  # Recomputed here, not taken from the sampler, so that the first ratio is exactly 1.
  evaluated = evaluate_responses(state, scored, reference_params, definitions, options)
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


def forward(
  definitions: Definitions,
  params: Params,
  value_params: Params,
  sequences: Sequences | PackedRows,
  response_length: int,
  temperature: float,
) -> Forward:
  """Runs policy and value model over prompts with responses.

  Args:
    definitions: the definitions of both models.
    params: the policy's parameters.
    value_params: the value model's parameters; without a trunk of their own they are a
      head on the policy's hidden states.
    sequences: [N, P + R]; or packed rows with N slots.
    response_length: R.
    temperature: the sampling temperature.

  Returns:
    Logprobs, entropies and values, [N, R] float32.
  """
  policy = rollout.forward_responses(
    definitions.model, params, sequences, response_length, temperature
  )
  hidden = policy.hidden  # [N, P + R, D]
  if 'embedding' in value_params:  # a trunk of its own
    hidden = rollout.run_trunk(definitions.value_model, value_params, sequences)
  values = heads.scalar_scores(value_params, hidden)  # [N, P + R]
  return Forward(
    policy.logprobs,
    policy.entropies,
    rollout.before_responses(values, sequences, response_length),
  )


def evaluate_responses(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> Evaluated:
  """Runs all models over the responses, before the update.

  It does so in as many parts as the update has, so that both need the same memory.
  """
  response_length = scored.samples.tokens.shape[1]
  temperature = options.sampling.temperature

  def evaluate_part(sequences: Sequences | PackedRows) -> Evaluated:
    now = forward(
      definitions,
      state.params,
      state.value_params,
      sequences,
      response_length,
      temperature,
    )
    reference = rollout.reference_logprobs(
      definitions.reference_model,
      reference_params,
      sequences,
      response_length,
      temperature,
    )
    return Evaluated(*now, reference)

  return packing.map_responses(
    evaluate_part,
    scored.sequences,
    response_length,
    definitions.model,
    definitions.layout,
    options,
  )


def assess_rollout(
  scored: ScoredRollout,
  evaluated: Evaluated,
  kl_coefficient: Array,
  options: Options,
) -> tuple[AssessedRollout, dict[str, Array]]:
  """Computes advantages and returns from scores, KL and values.

  Args:
    scored: N responses with their scores.
    evaluated: the outputs of the models on them, [N, R].
    kl_coefficient: [] float32, β.
    options: the options of the stage.

  Returns:
    The rollout with advantages and returns, and its metrics.
  """
  samples = scored.samples
  mask = samples.mask  # [N, R] bool
  value_mask = mask
  if options.score_place == 'after_eos':
    value_mask = advantages.after_end(mask)  # one place more: the score is there
  scores = rollout.final_scores(samples.ended, scored.scores, options)  # [N]
  reference = evaluated.reference_logprobs
  kl = rollout.kl_to_reference(evaluated.logprobs, reference, mask)  # [N, R]
  placed_rewards = advantages.place_rewards(scores, kl, value_mask, kl_coefficient)  # [N, R]
  rewards = placed_rewards
  if options.whiten_rewards:
    # The mean stays: shifting it would reward or punish the length of responses.
    rewards = masked.whiten(rewards, value_mask, shift_mean=False)
  advantage, returns = advantages.gae(
    rewards,
    evaluated.values,
    value_mask,
    options.discount,
    options.gae_lambda,
  )
  if options.whiten_advantages:
    advantage = masked.whiten(advantage, mask)

  weights, weight_metrics = off_policy.importance_weights(evaluated.logprobs, samples, options)
  assessed = AssessedRollout(
    sequences=scored.sequences,
    mask=mask,
    value_mask=value_mask,
    logprobs=evaluated.logprobs,
    reference_logprobs=reference,
    values=evaluated.values,
    advantages=advantage,
    returns=returns,
    weights=weights,
    value_weight=value_loss_weight(mask, value_mask),
  )
  metrics = rollout.rollout_metrics(
    scored, evaluated.logprobs, evaluated.entropies, kl if reference is not None else None
  )
  metrics |= weight_metrics
  metrics |= {
    'reward/mean': jnp.mean(jnp.sum(placed_rewards, axis=1)),
    'kl_coefficient': kl_coefficient,
    'value/mean': masked.mean(evaluated.values, value_mask),
    'value/explained_variance': explained_variance(evaluated.values, returns, value_mask),
  }
  return assessed, metrics


def assess_tokens(
  state: PPOState,
  sequences: Sequences,
  samples: Samples,
  scores: Array,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> dict[str, Array]:
  """Computes what the report shows of the tokens of a few responses.

  Advantages are not whitened here, as so few responses say nothing of a rollout's
  mean and variance.

  Args:
    state: policy, value model and β.
    sequences: [n, P + R].
    samples: [n, R].
    scores: [n] float32.
    reference_params: the parameters of the reference.
    definitions: the definitions of the models.
    options: the options of the stage.

  Returns:
    Name → [n, R] float32.
  """
  options = dataclasses.replace(
    options, minibatches=1, microbatches=1, whiten_rewards=False, whiten_advantages=False
  )
  scored = ScoredRollout(sequences, samples, scores)
  evaluated = evaluate_responses(state, scored, reference_params, definitions, options)
  assessed, _ = assess_rollout(scored, evaluated, state.kl_coefficient, options)
  columns = {'logprob': assessed.logprobs, 'advantage': assessed.advantages}
  if assessed.reference_logprobs is not None:
    columns['reference_logprob'] = assessed.reference_logprobs
  return columns


def value_loss_weight(mask: Array, value_mask: Array) -> Array:
  """Computes the response tokens for each place of the value loss.

  Args:
    mask: [n, R] bool.
    value_mask: [n, R] bool.

  Returns:
    [n] float32, the same in all rows, so that it can be cut with the rows.
  """
  places = jnp.maximum(masked.count(value_mask), 1.0)
  return jnp.full(mask.shape[0], masked.count(mask) / places)


def explained_variance(values: Array, returns: Array, mask: Array) -> Array:
  """Computes 1 − Var(returns − values) / Var(returns) over the mask.

  Args:
    values: [N, R] float32.
    returns: [N, R] float32.
    mask: [N, R] bool.

  Returns:
    [] float32; 1 = values are the returns, 0 = no better than a constant.
  """
  errors = returns - values
  unexplained = masked.mean((errors - masked.mean(errors, mask)) ** 2, mask)
  variance = masked.mean((returns - masked.mean(returns, mask)) ** 2, mask)
  return 1.0 - unexplained / jnp.maximum(variance, 1e-8)


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
    pretraining: documents for PPO-ptx, as many as responses; None without.
    key: the random key of this minibatch.
    frozen: {'policy', 'value'}: the parameters beside the trained ones.
    definitions: the definitions of the models, the optimizer and the layout.
    options: the options of the stage.

  Returns:
    The next carry, and metrics ([] float32 each).
  """
  trained, opt_state = carry
  weight = pretraining_weight(assessed.mask, pretraining)
  value_weight = value_loss_weight(assessed.mask, assessed.value_mask)
  assessed = assessed.replace(value_weight=value_weight)

  def batch_loss(trained: Params, batch: Any, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    assessed, pretraining, weight = batch
    params = merge_params(trained, frozen)
    now = forward(
      definitions,
      params['policy'],
      params['value'],
      assessed.sequences,
      assessed.mask.shape[1],  # R
      options.sampling.temperature,
    )
    return loss(params, now, assessed, pretraining, weight, definitions, options)

  # PPO-ptx and packed rows exclude each other, so that documents are None in packed ones
  batch, packing_metrics = packing.pack_minibatch(
    assessed, definitions, options, beside=(pretraining, weight)
  )
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


def pretraining_weight(mask: Array, documents: Sequences | None) -> Array | None:
  """Computes the weight of the documents' summed loss beside that of the responses (PPO-ptx).

  The loss is divided by the number of response tokens. With this weight the documents'
  part is a mean over their own tokens, however a minibatch is cut into micro-batches:
  hence it is computed for the whole minibatch, and repeated for each row to be cut with
  the rows.

  Args:
    mask: [n, R] bool, the responses.
    documents: [n, T]; None without.

  Returns:
    [n] float32, the same in all rows; None without documents.
  """
  if documents is None:
    return None
  responses = masked.total(1.0, mask)
  targets = masked.total(1.0, documents.loss_mask != 0)
  return jnp.full(mask.shape[0], responses / jnp.maximum(targets, 1.0))


def loss(
  params: Params,
  now: Forward,
  assessed: AssessedRollout,
  pretraining: Sequences | None,
  weight: Array | None,
  definitions: Definitions,
  options: Options,
) -> steps.Loss:
  """Computes the clipped losses of policy and value, and of PPO-ptx.

  Args:
    params: {'policy', 'value'}: complete parameters; PPO-ptx runs the policy over documents.
    now: the outputs of both models on n responses.
    assessed: these responses, of at most R tokens.
    pretraining: [n, T] documents for PPO-ptx; None without.
    weight: [n] float32, as `pretraining_weight` returns it; None without.
    definitions: the definitions of the models.
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
  if pretraining is not None and weight is not None:
    nll = pretraining_nll(params['policy'], pretraining, definitions.model)
    nll = nll * weight[0]  # the same in every row
    objective = objective + options.pretraining_coefficient * nll
    means['pretraining/loss'] = nll
  return steps.Loss(total=objective, weight=masked.total(1.0, mask), means=means)


def pretraining_nll(params: Params, documents: Sequences, model: Model) -> Array:
  """Computes the summed negative log-likelihood of documents, [] float32, nats (PPO-ptx)."""
  hidden, _ = model.apply(params, documents.tokens, documents.positions, documents.segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], documents.tokens[:, 1:])
  return language_model.nll(logprobs, documents.loss_mask[:, 1:])[0]


# The stage: what runs around the compiled step.


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def build(context: Context, options: Options) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation."""
  parts = define(context, options)
  train, held_out = rollout.read_prompts(context, options)
  score, score_held_out = open_scores(
    context, parts.store, options, train.records, held_out.records
  )
  value_config = parts.definitions.value_model.config if options.value else None
  meter = rollout_metering.meter_rollout(parts.definitions, options, options.epochs, value_config)
  memory = rollout.memory_of(parts)
  parts, score = rollout_metering.time_phases(meter, parts, score)
  reference_params = parts.read_reference()
  step = functools.partial(
    iterate,
    parts=parts,
    score=score,
    reference_params=reference_params,
    layout=context.layout,
  )
  seed = context.config.seed
  prompts = batches.prompts(train.examples, options.batch_size, seed)
  return loop.Training(
    name=context.name,
    init=parts.init,
    step=step,
    meter=meter,
    memory=memory,
    evaluate=rollout.build_evaluation(
      context,
      options,
      parts,
      reference_params,
      score_held_out,
      held_out,
      functools.partial(assess_tokens, definitions=parts.definitions, options=options),
    ),
    batches=batches.ZippedBatches(prompts, _pretraining_batches(context, options)),
    warn=off_policy.build_warning(options),
  )


def iterate(
  state: PPOState,
  batch: tuple[Prompts, Sequences | None],
  parts: RolloutParts,
  score: Score,
  reference_params: Params | None,
  layout: Layout,
) -> tuple[PPOState, dict[str, Array]]:
  """Makes one iteration of PPO: rollout → scores → update.

  Args:
    state: before the step; its buffers are donated.
    batch: prompts [B, P] as host arrays, and documents for PPO-ptx or None.
    parts: the compiled rollout and train step.
    score: the reward, which may leave the devices to read texts.
    reference_params: the parameters of the reference; None where no KL counts.
    layout: the mesh on which batches are placed.

  Returns:
    The next state, and the metrics of update and reward.
  """
  prompts, pretraining = layout.place(batch)
  samples = parts.generate(state.sampler_params, prompts, rollout.sampling_key(state))
  scores, score_metrics = score(prompts, samples)
  sequences = rollout.join_sequences(prompts, samples)
  scored = ScoredRollout(sequences, samples, scores, pretraining)
  state, metrics = parts.update(state, scored, reference_params)
  return state, {**metrics, **score_metrics}


def define(context: Context, options: Options) -> RolloutParts:
  """Defines the parts of an iteration; data and parameters are read later."""
  check_options(options, context.where)
  rollout.check_batch(context, options)
  store = ModelStore(context, options.lora)
  policy = store.open(options.init, trained=True)
  value = _open_value(context, store, policy, options)
  reference = rollout.open_reference(store, options)
  training.write_model_json(context, policy.model)
  # The learning rate falls with every minibatch, so the schedule counts those.
  updates = options.loop.steps * options.epochs * options.minibatches
  definitions = Definitions(
    model=policy.model,
    value_model=value.model,
    reference_model=reference.model if reference else None,
    optimizer=optimizers.make_optimizer(options.optimizer, updates),  # one for both models
    layout=context.layout,
  )
  return RolloutParts(
    definitions=definitions,
    init=functools.partial(_init_state, context, options, definitions, policy, value),
    generate=rollout.build_generate(context, policy.model, options),
    update=training.compile_train_step(train_step, definitions, options),
    read_reference=rollout.reference_reader(reference),
    store=store,
  )


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for an unknown `score_place` or biased sampling."""
  rollout.check_sampling(options, where)
  off_policy.check_options(options, where)
  if options.packed_rows and options.pretraining_coefficient:
    raise UserError(
      f'{where}.packed_rows: expected 0 beside pretraining_coefficient, as documents are not '
      f'packed with responses; got {options.packed_rows}'
    )
  if options.score_place not in ('eos', 'after_eos'):
    raise UserError(f'{where}.score_place: expected eos or after_eos, got {options.score_place!r}')


def _open_value(
  context: Context, store: ModelStore, policy: OpenModel, options: Options
) -> OpenModel:
  """Opens the value model: one of its own, or a head on the policy's trunk that begins at 0."""
  value = store.open(options.value or options.init, head=True, trained=True)
  if options.value:
    return value

  def read_zero_head() -> Params:
    # Zero, so that values are 0 at first (Ziegler et al. 2019). The trunk that was
    # read with the head is dropped: the policy has it.
    head = value.read()['score']
    shardings = jax.tree.map(lambda leaf: leaf.sharding, head)
    return {'score': context.layout.create(_zeros_like, shardings, head)}

  return dataclasses.replace(value, model=policy.model, read=read_zero_head)


def _zeros_like(tree: Any) -> Any:
  return jax.tree.map(jnp.zeros_like, tree)


def _init_state(
  context: Context,
  options: Options,
  definitions: Definitions,
  policy: OpenModel,
  value: OpenModel,
) -> PPOState:
  """Reads policy and value model, and creates the state before the first step."""
  return create_state(policy.read(), value.read(), definitions, context.key(), options)


def create_state(
  policy: Params,
  value: Params,
  definitions: Definitions,
  key: Array,
  options: Options,
) -> PPOState:
  """Creates the state before the first step.

  Args:
    policy: the policy's sharded parameters. The state takes them over: the first step
      donates their buffers.
    value: those of the value model, likewise.
    definitions: of which optimizer and layout are used.
    key: [] the run's root random key.
    options: of which `kl_coefficient` and `sampler_every` are read.
  """
  layout = definitions.layout
  trained, frozen = lora.split_trainable(policy)
  value_trained, value_frozen = lora.split_trainable(value)
  # One optimizer over both models, so that their gradients are clipped by one norm.
  joint = steps.create_train_state(
    {'policy': trained, 'value': value_trained},
    definitions.optimizer,
    key,
    layout,
  )
  return PPOState(
    step=joint.step,
    trained=trained,
    opt_state=joint.opt_state,
    key=joint.key,
    sampler_trained=off_policy.first_sampler(layout, trained, options),
    value_trained=value_trained,
    frozen={'params': frozen, 'value_params': value_frozen},
    kl_coefficient=layout.create(
      functools.partial(jnp.float32, options.kl_coefficient),
      layout.sharding(),
    ),
  )


def _pretraining_batches(context: Context, options: Options) -> Iterator[Sequences] | None:
  """Returns batches of documents for PPO-ptx; None where its coefficient is 0."""
  if not options.pretraining_coefficient:
    return None
  documents = encode.documents(
    sources.load_records(options.pretraining, 'document', 'train'),
    context.tokenizer,
    options.pretraining_max_length,
    hosts.spread,
  )
  return batches.sequences(
    documents,
    options.batch_size * options.num_samples,  # rows, as many as responses
    options.pretraining_max_length,
    context.config.seed,
  )


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  parts = define(context, options)

  def update_arguments(scored: ScoredRollout, reference_params: Params | None) -> tuple:
    if options.pretraining_coefficient:
      rows = options.batch_size * options.num_samples
      documents = abstract_sequences(context.layout, rows, options.pretraining_max_length)
      scored = scored.replace(pretraining=documents)
    return scored, reference_params

  return rollout_plan.plan_rollout(
    context,
    options,
    parts,
    update_arguments,
    passes=options.epochs,
    has_value_trunk=bool(options.value),
  )


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_documents(records: Sequence[Document], overlong: str) -> Sequence[dict]:
    del overlong  # documents are cut into windows
    return list(encode.documents(records, tokenizer, options.pretraining_max_length))

  uses = rollout.list_data(options, tokenizer)
  if options.pretraining_coefficient:
    documents = DataUse(
      'pretraining', options.pretraining, 'document', encode_documents, splits=('train',)
    )
    uses.append(documents)
  return uses


TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'eval_records': 8,
}
STAGE = StageKind(
  options=Options,
  run=run,
  plan=plan,
  tiny=TINY,
  data=list_data,
  check=check_scores,
)
