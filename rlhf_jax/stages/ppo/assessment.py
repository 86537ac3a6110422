"""Assesses a rollout before PPO's update: log-probabilities, values, advantages and returns."""

import dataclasses

import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.objectives import (
  advantages,
  masked,
)
from rlhf_jax.stages.ppo.options import Options
from rlhf_jax.stages.ppo.state import AssessedRollout, Definitions, Evaluated, Forward, PPOState
from rlhf_jax.stages.shared import (
  off_policy,
  rollout,
)
from rlhf_jax.stages.shared.packing import PackedRows
from rlhf_jax.stages.shared.rollout import ScoredRollout
from rlhf_jax.types import (
  Array,
  Params,
  Samples,
  Sequences,
)


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
  hidden = policy.hidden  # [N, R, D], or [C, W, D]
  if 'embedding' in value_params:  # a trunk of its own
    hidden = rollout.run_trunk(definitions.value_model, value_params, sequences, response_length)
  values = heads.scalar_scores(value_params, hidden)  # [N, R], or [C, W]
  return Forward(
    policy.logprobs,
    policy.entropies,
    rollout.before_responses(values, sequences),
  )


def evaluate_responses(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> Evaluated:
  """Runs all models over the responses, before the update."""
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

  return rollout.evaluate_in_parts(evaluate_part, scored, definitions, options)


def trusts_sampler(definitions: Definitions, options: Options) -> bool:
  """Tells whether the policy need not be run before the update: `off_policy.trusts_sampler`.

  If the value model is a head on the policy's trunk, that is run for the values anyway.
  """
  return off_policy.trusts_sampler(definitions.model, options) and bool(options.value)


def evaluate_samples(
  state: PPOState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: Definitions,
  options: Options,
) -> Evaluated:
  """Computes what `evaluate_responses` does, with the log-probabilities of the sampler.

  So the policy is not run, and its entropies are not known yet.
  """
  response_length = scored.samples.tokens.shape[1]
  temperature = options.sampling.temperature

  def evaluate_part(sequences: Sequences | PackedRows) -> tuple[Array, Array | None]:
    hidden = rollout.run_trunk(
      definitions.value_model, state.value_params, sequences, response_length
    )
    values = heads.scalar_scores(state.value_params, hidden)  # [N, R], or [C, W]
    reference = rollout.reference_logprobs(
      definitions.reference_model, reference_params, sequences, response_length, temperature
    )
    return rollout.before_responses(values, sequences), reference

  values, reference = rollout.evaluate_in_parts(evaluate_part, scored, definitions, options)
  return Evaluated(scored.samples.logprobs, None, values, reference)


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
