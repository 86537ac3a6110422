"""Plans the stages that learn from the policy's own responses: rollout, scores, update."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.generation import sampler
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_batch,
  abstract_key,
  abstract_prompts,
  abstract_rows,
  Program,
  resident,
  StagePlan,
)
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import packing, reward_plan
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.rollout import list_models, RolloutParts, ScoredRollout
from rlhf_jax.types import Params

# (scored rollout, reference parameters) → arguments of the update, after the state
UpdateArguments = Callable[[ScoredRollout, Params | None], tuple]


def _scored_and_reference(scored: ScoredRollout, reference_params: Params | None) -> tuple:
  return scored, reference_params


def plan_rollout(
  context: Context,
  options: Any,
  parts: RolloutParts,
  update_arguments: UpdateArguments = _scored_and_reference,
  *,
  passes: int = 1,
  has_value_trunk: bool = False,
  document_places: int = 0,
) -> StagePlan:
  """Plans one iteration: its programs, and what it keeps on the devices.

  Args:
    context: the context of the stage, on an abstract layout.
    options: a RolloutOptions.
    parts: the parts of the iteration.
    update_arguments: what the update takes beside the state.
    passes: how often the update reads the responses of a step.
    has_value_trunk: a value model with a trunk of its own is trained too.
    document_places: of a row of documents, of which the update reads one for each response.

  Returns:
    The plan, with the programs rollout, score (for each reward) and update.
  """
  layout = context.layout
  state = parts.init()  # abstract arrays, like all that follow
  generate: Any = parts.generate  # one jitted function, as the layout is abstract
  reference_params = parts.read_reference()
  residents = resident(state)
  if reference_params is not None:
    residents = {**residents, 'reference': reference_params}
  prompts = abstract_prompts(layout, options.batch_size, options.max_length)
  key = abstract_key(layout)
  samples = abstract_batch(layout, jax.eval_shape(generate, state.params, prompts, key))
  sequences = abstract_batch(layout, jax.eval_shape(sampler.join_sequences, prompts, samples))
  responses = options.batch_size * options.num_samples  # N
  scores = abstract_rows(layout, (responses,), jnp.float32)
  arguments = update_arguments(ScoredRollout(sequences, samples, scores), reference_params)
  lower_rollout = functools.partial(generate.lower, state.params, prompts, key)
  rollout_program = Program('rollout', lower_rollout, _rollout_work(layout, options, parts))
  plan = StagePlan(residents, [rollout_program], [])
  for name in options.reward:
    reward_plan.add_reward(plan, layout, parts.store, options, name, prompts, samples)
  update_estimate = _update_work(
    context,
    options,
    parts,
    state,
    passes=passes,
    has_value_trunk=has_value_trunk,
    document_places=document_places,
  )
  update = functools.partial(parts.update.lower, state, *arguments)
  plan.programs.append(Program('update', update, update_estimate))
  return plan


def _rollout_work(layout: Layout, options: Any, parts: RolloutParts) -> work.Work:
  """Estimates the rollout: prefill of all prompts, then decoding to the longest response."""
  return work.rollout(
    parts.definitions.model.config,
    layout,
    options.batch_size,
    options.max_length,
    options.sampling.max_new_tokens,
    options.num_samples,
  )


def _update_work(
  context: Context,
  options: Any,
  parts: RolloutParts,
  state: Any,
  *,
  passes: int,
  has_value_trunk: bool,
  document_places: int,
) -> work.Work:
  """Estimates the update: all forwards before it, then forward and backward of what is trained."""
  config = parts.definitions.model.config
  layout = context.layout
  new_tokens = options.sampling.max_new_tokens
  responses = options.batch_size * options.num_samples
  # Each minibatch is computed in parts of its own.
  minibatches = options.minibatches
  places = options.max_length + new_tokens
  sharing = packing.plan_sharing(
    range(responses // minibatches),
    places,
    options.num_samples,
    list_models(parts.definitions),
    layout,
    new_tokens,
    complete=minibatches == 1,
  )
  microbatches, rows, length = packing.divide(
    responses // minibatches, options.microbatches, options.packed_rows, places, sharing
  )
  count = minibatches * microbatches
  # The trained trunks, each with the number of places whose vocabulary is computed: the
  # response's for the policy, all in packed rows, none for a value model.
  logits = length if options.packed_rows else new_tokens
  trunks = [(state.trained, logits)]
  if has_value_trunk:
    trunks.append((state.value_trained, 0))
  before = work.Work()
  # The reference's forward, and those of the trained models before the update.
  forwards = [places for _, places in trunks]
  if parts.definitions.reference_model is not None:
    forwards.append(logits)
  for head_places in forwards:
    before = before + work.forward(config, layout, rows, length, head_places) * count
  trainings = []
  for params, head_places in trunks:
    one_pass = work.training(
      config,
      layout,
      rows * count,
      length,
      head_places,
      count,
      params,
    )
    trainings.append(one_pass * passes)
  if document_places:  # their gradients are added to the policy's
    one_pass = work.training(
      config, layout, rows * count, document_places, document_places, count, trained={}
    )
    trainings.append(one_pass * passes)
  # What both models save for their backward passes is in memory at once; the rest
  # is not.
  saved = sum(training.saved for training in trainings)
  peak = saved + max(training.temporary - training.saved for training in trainings)
  total = sum(trainings, work.Work())
  return before + dataclasses.replace(total, temporary=peak)
