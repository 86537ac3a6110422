"""Online preference optimisation: the policy learns from an order of its own responses.

  minimise E_{x ~ prompts, y_1 … y_K ~ π}[ 1/C(K,2) Σ_{r(y_w) > r(y_l)} ℓ(h_w, h_l) ],
           h_i = log π(y_i|x) / π_ref(y_i|x)

One iteration: the policy responds, a reward or judge orders its responses, DPO or
another pair loss learns from the order, and so on with the new policy (online
DPO: Guo et al. 2024, arXiv:2402.04792, algorithm 1). The losses are those of
stages/preference.py except KTO's, whose anchor needs responses to other prompts.
No gradient flows through the sampling of the responses. Left out: dropout, an
older policy's responses.

The path of a step: `build` → `iterate` → `order_responses`, `train_step` → `preference.loss`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import preference as preference_objectives
from rlhf_jax.objectives import ranking
from rlhf_jax.options import Count
from rlhf_jax.planning.programs import abstract_rankings, StagePlan
from rlhf_jax.runtime import loop, optimizers
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages import preference
from rlhf_jax.stages.preference import loss
from rlhf_jax.stages.shared import (
  rollout,
  rollout_metering,
  rollout_plan,
  training,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import StageKind, TINY_LOOP
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.stages.shared.packing import PackedRows
from rlhf_jax.stages.shared.rollout import (
  RolloutDefinitions,
  RolloutParts,
  ScoredRollout,
)
from rlhf_jax.stages.shared.scores import check_scores, open_scores, Score
from rlhf_jax.types import Array, Params, Prompts, Rankings, Sequences, TrainState

__all__ = [
  'STAGE',
  'Options',
  'build',
  'iterate',
  'loss',
  'order_responses',
  'train_step',
]


@dataclasses.dataclass(frozen=True)
class Options(rollout.RolloutOptions):
  """The section of a stage of online preference optimisation, beside its loss's settings."""

  batch_size: Count = 32  # prompts of a step, over all devices
  num_samples: Count = 2  # responses to each prompt, K
  minibatches: Count = 1  # must stay 1: the responses of a step are one batch
  loss: str = 'dpo'  # a name in preference.PREFERENCE_LOSSES but kto; it brings its settings
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=5e-6,
    schedule='linear',
    final_scale=0.0,
    warmup_steps=10,
  )
  loop: LoopOptions = LoopOptions(steps=200, eval_every=20, save_every=25, log_every=1)
  # The settings of the chosen loss, from keys of the same section
  # (StageKind.choices).
  settings: Any = dataclasses.field(
    default=preference_objectives.DPOSettings(),
    metadata={'in_config': False},
  )


class Evaluated(NamedTuple):
  """The outputs of policy and reference on N responses, before the update.

  The metrics are of the distributions at the sampling temperature, the loss is not.
  """

  logprobs: Array  # [N, R] float32, of the policy, at the sampling temperature
  entropies: Array  # [N, R] float32, likewise
  reference_logprobs: Array  # [N, R] float32, likewise
  anchors: Array  # [N, R] float32, of the reference, at temperature 1


# The pure functions of a step.


def order_responses(
  params: Params,
  reference_params: Params,
  prompts: Prompts,
  scored: ScoredRollout,
  definitions: RolloutDefinitions,
  options: Options,
) -> tuple[Rankings, dict[str, Array]]:
  """Makes rankings of scored responses; the higher score is better, equal scores tie.

  Args:
    params: the policy's parameters.
    reference_params: the reference's.
    prompts: [B, P].
    scored: B * K responses with their scores.
    definitions: the definitions of policy and reference.
    options: the options of the stage.

  Returns:
    Rankings [B, K, P + R] with the reference's log-probabilities, and the metrics of
    the rollout.
  """
  mask = scored.samples.mask  # [N, R]
  scores = rollout.final_scores(scored.samples.ended, scored.scores, options)
  evaluated = evaluate_responses(params, reference_params, scored, definitions, options)
  sums = jnp.sum(jnp.where(mask, evaluated.anchors, 0.0), axis=1)  # [N]
  batch = _rank_responses(prompts, scored, scores, options.num_samples)
  batch = batch.replace(reference_logprobs=sums.reshape(batch.group.shape))
  kl = jnp.where(mask, evaluated.logprobs - evaluated.reference_logprobs, 0.0)  # [N, R]
  metrics = rollout.rollout_metrics(scored, evaluated.logprobs, evaluated.entropies, kl)
  return batch, metrics | {'reward/mean': jnp.mean(scores)}


def evaluate_responses(
  params: Params,
  reference_params: Params,
  scored: ScoredRollout,
  definitions: RolloutDefinitions,
  options: Options,
) -> Evaluated:
  """Runs policy and reference over the responses, before the update.

  The arguments are those of `order_responses`.
  """
  response_length = scored.samples.tokens.shape[1]
  temperature = options.sampling.temperature
  model = definitions.reference_model
  assert model is not None  # this stage always keeps one

  def evaluate_part(sequences: Sequences | PackedRows) -> Evaluated:
    policy = rollout.forward_responses(
      definitions.model, params, sequences, response_length, temperature
    )
    # The compiler runs the reference's trunk once for both.
    at_temperature, at_one = (
      rollout.forward_responses(model, reference_params, sequences, response_length, value)
      for value in (temperature, 1.0)
    )
    return Evaluated(policy.logprobs, policy.entropies, at_temperature.logprobs, at_one.logprobs)

  return rollout.evaluate_in_parts(evaluate_part, scored, definitions, options)


def _rank_responses(
  prompts: Prompts, scored: ScoredRollout, scores: Array, num_samples: int
) -> Rankings:
  """Orders the K responses to each prompt by their scores; reference logprobs are left at 0."""
  K = num_samples
  B = len(scores) // K
  prompt_length = prompts.tokens.shape[1]  # P
  sequences = scored.sequences

  def group(x: Array) -> Array:  # [B * K, …] → [B, K, …]
    return x.reshape(-1, K, *x.shape[1:])

  return Rankings(
    tokens=group(sequences.tokens),
    positions=group(sequences.positions),
    segment_ids=group(sequences.segment_ids),
    group=jnp.ones((B, K), jnp.int32),  # each row is one prompt
    ranks=ranking.from_scores(group(scores)),
    index=jnp.repeat(prompts.index, K).reshape(-1, K),
    # Prompts are left-padded, so all responses begin at one place.
    begins=jnp.full((B, K), prompt_length, jnp.int32),
    confidence=jnp.ones((B, K), jnp.float32),  # a reward is not in doubt
    reference_logprobs=jnp.zeros((B, K), jnp.float32),
  )


def train_step(
  state: TrainState,
  batch: Rankings,
  definitions: RolloutDefinitions,
  options: Options,
) -> tuple[TrainState, dict[str, Array]]:
  """Makes one update of the policy from rankings of its own responses.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: the policy, the optimizer's state, the step and the root key.
    batch: rankings [B, K, P + R] of `order_responses`.
    definitions: the definitions of the policy, its optimizer and the layout.
    options: the options of the stage, with the loss and its settings.

  Returns:
    The next state, and the metrics of preference.train_step.
  """
  return preference.train_step(state, batch, definitions=definitions, options=options)


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
  meter = rollout_metering.meter_rollout(parts.definitions, options)
  memory = rollout.memory_of(parts)
  parts, score = rollout_metering.time_phases(meter, parts, score)
  reference_params = parts.read_reference()
  order = jax.jit(
    functools.partial(order_responses, definitions=parts.definitions, options=options)
  )
  step = functools.partial(
    iterate,
    parts=parts,
    score=score,
    order=order,
    reference_params=reference_params,
    layout=context.layout,
  )
  return loop.Training(
    name=context.name,
    init=parts.init,
    step=step,
    meter=meter,
    memory=memory,
    evaluate=rollout.build_evaluation(
      context, options, parts, reference_params, score_held_out, held_out
    ),
    batches=batches.prompts(train.examples, options.batch_size, context.config.seed),
  )


def iterate(
  state: TrainState,
  batch: Prompts,
  parts: RolloutParts,
  score: Score,
  order: Callable[..., tuple[Rankings, dict[str, Array]]],
  reference_params: Params,
  layout: Layout,
) -> tuple[TrainState, dict[str, Array]]:
  """Makes one iteration: rollout → scores → order → update.

  Args:
    state: before the step; its buffers are donated.
    batch: prompts [B, P] as host arrays.
    parts: the compiled rollout and train step.
    score: the reward, which may leave the devices to read texts.
    order: the compiled `order_responses`.
    reference_params: the parameters of the reference.
    layout: the mesh on which batches are placed.

  Returns:
    The next state, and the metrics of update, rollout and reward.
  """
  prompts = layout.place(batch)
  samples = parts.generate(state.params, prompts, rollout.sampling_key(state))
  scores, score_metrics = score(prompts, samples)
  scored = ScoredRollout(rollout.join_sequences(prompts, samples), samples, scores)
  rankings, metrics = order(state.params, reference_params, prompts, scored)
  state, update_metrics = parts.update(state, rankings)
  return state, {**update_metrics, **metrics, **score_metrics}


def define(context: Context, options: Options) -> RolloutParts:
  """Defines the parts of an iteration; data and parameters are read later."""
  check_options(options, context.where)
  rollout.check_batch(context, options, together=options.num_samples)
  store = ModelStore(context, options.lora)
  policy = store.open(options.init, trained=True)
  reference = store.open(options.reference)
  training.write_model_json(context, policy.model)
  optimizer = optimizers.make_optimizer(options.optimizer, options.loop.steps)
  definitions = RolloutDefinitions(
    model=policy.model,
    reference_model=reference.model,
    optimizer=optimizer,
    layout=context.layout,
  )

  def init() -> TrainState:
    return training.create_state(context, policy.read(), optimizer)

  return RolloutParts(
    definitions=definitions,
    init=init,
    generate=rollout.build_generate(context, policy.model, options),
    update=training.compile_train_step(train_step, definitions, options),
    read_reference=reference.read,
    store=store,
  )


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for a loss or settings that do not fit."""
  preference.check_options(options, where)
  if preference_objectives.PREFERENCE_LOSSES[options.loss].single_responses:
    raise UserError(f'{where}.loss: {options.loss} is for the stage `preference` only')
  if not options.sampling.temperature:
    raise UserError(
      f'{where}.sampling.temperature: expected more than 0, as greedy responses to a prompt are '
      'all the same'
    )
  if options.num_samples < 2 or options.minibatches != 1:
    raise UserError(
      f'{where}: expected num_samples from 2 and minibatches 1, got {options.num_samples} and '
      f'{options.minibatches}'
    )


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  length = options.max_length + options.sampling.max_new_tokens  # P + R

  def update_arguments(scored: ScoredRollout, reference_params: Params | None) -> tuple:
    del (
      scored,
      reference_params,
    )  # the update takes rankings, which hold the reference's logprobs
    rankings = abstract_rankings(context.layout, options.batch_size, options.num_samples, length)
    return (rankings,)

  return rollout_plan.plan_rollout(context, options, define(context, options), update_arguments)


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
  choices={'loss': preference.LOSS_SETTINGS},
  data=rollout.list_data,
  check=check_scores,
)
