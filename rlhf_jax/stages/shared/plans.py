"""Plans of the stages: which programs a step compiles and what stays on the devices.

Each function gives the StagePlan of one kind of stage, on a layout whose devices are
only described. The stages are imported inside the functions, so that a stage may import
this module.

Letters: B prompts, K responses to each, N = B * K, P tokens of a prompt, R of a
response.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.planning import programs, work
from rlhf_jax.planning.programs import Program, StagePlan
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common
from rlhf_jax.types import Params, Prompts, Rankings, Samples, Sequences

_SCORER = 'scorer:'  # replaced by rewards.sources
_SERVERS = ('http://', 'https://')  # replaced by rewards.sources


def plan_stage(context: common.Context) -> StagePlan:
  """Returns the plan of a stage of any kind."""
  return KINDS[context.section.kind](context)


def plan_supervised(context: common.Context) -> StagePlan:
  """Returns the plan of pre-training and supervised fine-tuning."""
  from rlhf_jax.stages.shared import supervised

  section = context.section
  layout = context.layout
  model, optimizer, init = common.open_trainable(context)
  state = init()
  batch = programs.abstract_sequences(layout, section.batch_size, section.max_length)
  step = steps.build(supervised.build_loss(model), optimizer, layout, section.microbatches)
  estimate = work.training(
    model.config,
    layout,
    rows=section.batch_size,
    length=section.max_length,
    head=section.max_length,  # every token is a target
    parts=section.microbatches,
    trained=state.trained,
  )
  lower = functools.partial(step.lower, state, batch)
  return StagePlan(programs.resident(state), [Program('step', lower, estimate)])


def plan_reward(context: common.Context) -> StagePlan:
  """Returns the plan of a reward model's training."""
  from rlhf_jax.stages import reward

  section = context.section
  layout = context.layout
  model, optimizer, init = common.open_trainable(context, head=True)
  state = init()
  batch = _abstract_rankings(context)
  loss = reward.build_loss(model, section.loss)
  step = steps.build(loss, optimizer, layout, section.microbatches)
  estimate = work.training(
    model.config,
    layout,
    rows=section.batch_size * section.responses_per_row,
    length=section.max_length,
    head=0,  # a scalar head has no vocabulary
    parts=section.microbatches,
    trained=state.trained,
  )
  lower = functools.partial(step.lower, state, batch)
  return StagePlan(programs.resident(state), [Program('step', lower, estimate)])


def plan_preference(context: common.Context) -> StagePlan:
  """Returns the plan of preference optimisation on rankings that exist."""
  from rlhf_jax.stages import preference

  section = context.section
  layout = context.layout
  rows = section.batch_size * section.responses_per_row
  length = section.max_length
  model, optimizer, init = common.open_trainable(context)
  state = init()
  batch = _abstract_rankings(context)
  loss = preference.build_loss(model, section)
  step = steps.build(loss, optimizer, layout, section.microbatches)
  plan = StagePlan(programs.resident(state), [])

  arguments = [state, batch]
  if section.reference:
    reference_model, read = common.open_model(context, section.reference)
    reference = read()
    # its logprobs are computed once or at every step; on the devices it stays either way
    plan.resident['reference'] = reference

    def response_logprobs(params: Params, batch: Rankings) -> jax.Array:
      return preference.response_logprobs(reference_model, params, batch)[0]

    lower = functools.partial(jax.jit(response_logprobs).lower, reference, batch)
    estimate = work.forward(reference_model.config, layout, rows, length, head=length)
    plan.programs.append(Program('reference', lower, estimate))
    if section.loss == 'kto':
      arguments.append(programs.abstract_scalar(layout, jnp.float32))  # its anchor

  estimate = work.training(
    model.config,
    layout,
    rows=rows,
    length=length,
    head=length,
    parts=section.microbatches,
    trained=state.trained,
  )
  lower = functools.partial(step.lower, *arguments)
  plan.programs.append(Program('step', lower, estimate))
  return plan


def plan_ppo(context: common.Context) -> StagePlan:
  """Returns the plan of PPO."""
  from rlhf_jax.stages import ppo

  section = context.section
  shapes = abstract_rollout(context, ppo.define(context))
  state = shapes.state
  R = section.sampling.max_new_tokens
  trunks = [Trunk(state.trained, R)]
  if section.value:  # the value model has a trunk of its own, and no vocabulary
    trunks.append(Trunk(state.value_trained, 0))
  pretraining = None
  if section.pretraining_coefficient:
    pretraining = programs.abstract_sequences(
      context.layout,
      section.batch_size * section.num_samples,
      section.pretraining_max_length,
    )
  arguments = (shapes.reference, shapes.sequences, shapes.samples, shapes.scores, pretraining)
  return plan_rollout(context, shapes, trunks, arguments)


def plan_policy_gradient(context: common.Context) -> StagePlan:
  """Returns the plan of a policy gradient without a value model."""
  from rlhf_jax.stages import policy_gradient

  shapes = abstract_rollout(context, policy_gradient.define(context))
  trunks = [Trunk(shapes.state.trained, context.section.sampling.max_new_tokens)]
  arguments = (shapes.reference, shapes.sequences, shapes.samples, shapes.scores)
  return plan_rollout(context, shapes, trunks, arguments)


def plan_online_preference(context: common.Context) -> StagePlan:
  """Returns the plan of preference optimisation on the policy's own responses."""
  from rlhf_jax.stages import online_preference

  section = context.section
  shapes = abstract_rollout(context, online_preference.define(context))
  R = section.sampling.max_new_tokens
  trunks = [Trunk(shapes.state.trained, R)]
  rankings = programs.abstract_rankings(
    context.layout,
    section.batch_size,
    section.num_samples,
    section.max_length + R,
  )
  # rankings bring the reference's logprobs along, so the update takes no reference
  return plan_rollout(context, shapes, trunks, (rankings,))


def plan_responses(context: common.Context) -> StagePlan:
  """Returns the plan of a stage in which models respond to prompts and nothing is trained."""
  section = context.section
  layout = context.layout
  tokenizer = context.tokenizer
  length = getattr(section, 'max_context', section.max_length)  # a critique reads what was said
  num_samples = getattr(section, 'num_samples', 1)
  # nothing is trained, so the policies are all that is resident
  plan = StagePlan({}, [], ['judges and annotators are left out'])
  for name in getattr(section, 'policies', None) or (section.model,):
    model, read = common.open_model(context, name)
    params = read()
    plan.resident[name] = params
    prompts = programs.abstract_prompts(layout, section.batch_size, length)
    generate = sampler.build_sampler(
      model,
      section.sampling,
      (tokenizer.eos_id,),
      tokenizer.pad_id,
      num_samples,
      layout=layout,
    )
    key = programs.abstract_key(layout)
    estimate = work.rollout(
      model.config,
      layout,
      prompts=section.batch_size,
      P=length,
      R=section.sampling.max_new_tokens,
      K=num_samples,
    )
    lower = functools.partial(generate.lower, params, prompts, key)
    plan.programs.append(Program(f'responses of {name}', lower, estimate))
  return plan


KINDS: dict[str, Callable[[common.Context], StagePlan]] = {
  'pretrain': plan_supervised,
  'sft': plan_supervised,
  'reward': plan_reward,
  'preference': plan_preference,
  'ppo': plan_ppo,
  'policy_gradient': plan_policy_gradient,
  'online_preference': plan_online_preference,
  'feedback': plan_responses,
  'critique': plan_responses,
}


# -- stages that learn from their own responses


class Trunk(NamedTuple):
  """A model that the update of a rollout stage trains."""

  trained: Params  # its tree of trained parameters, abstract arrays
  head: int  # places of a row at which its unembedding is applied


@dataclasses.dataclass(frozen=True)
class RolloutShapes:
  """The arrays of a rollout stage's step, as abstract arrays."""

  parts: Any  # a rollout.RolloutParts, what the stage's step is made of
  state: Any  # the train state
  reference: Params  # the reference's parameters
  prompts: Prompts  # [B, P]
  key: Any  # a random key
  samples: Samples  # the responses, [N, R]
  sequences: Sequences  # prompts with responses, [N, P + R]
  scores: Any  # [N] float32


def abstract_rollout(context: common.Context, parts: Any) -> RolloutShapes:
  """Returns the arrays of a rollout stage's step.

  Args:
    context: the stage's surroundings.
    parts: the stage's RolloutParts.
  """
  section = context.section
  layout = context.layout
  state = parts.init()
  reference = parts.read_reference()
  prompts = programs.abstract_prompts(layout, section.batch_size, section.max_length)
  key = programs.abstract_key(layout)
  # eval_shape drops shardings; the rows of all these lie as a batch does
  samples = jax.eval_shape(parts.generate, state.params, prompts, key)
  samples = programs.abstract_batch(layout, samples)
  sequences = jax.eval_shape(sampler.join_sequences, prompts, samples)
  rows = section.batch_size * section.num_samples
  return RolloutShapes(
    parts=parts,
    state=state,
    reference=reference,
    prompts=prompts,
    key=key,
    samples=samples,
    sequences=programs.abstract_batch(layout, sequences),
    scores=programs.abstract_rows(layout, (rows,), jnp.float32),
  )


def plan_rollout(
  context: common.Context,
  shapes: RolloutShapes,
  trunks: list[Trunk],
  arguments: tuple,
) -> StagePlan:
  """Returns the plan of a stage whose step is rollout, scores and update.

  Args:
    context: the stage's surroundings.
    shapes: the arrays of its step.
    trunks: the models that the update trains, the policy first.
    arguments: of the update, behind the state.
  """
  section = context.section
  config = shapes.parts.model.config
  state = shapes.state
  generate = functools.partial(
    shapes.parts.generate.lower,
    state.params,
    shapes.prompts,
    shapes.key,
  )
  generation = work.rollout(
    config,
    context.layout,
    prompts=section.batch_size,
    P=section.max_length,
    R=section.sampling.max_new_tokens,
    K=section.num_samples,
  )
  plan = StagePlan(
    {**programs.resident(state), 'reference': shapes.reference},
    [Program('rollout', generate, generation)],
  )
  for name in section.reward:
    _add_reward(plan, context, name, shapes)
  update = functools.partial(shapes.parts.update.lower, state, *arguments)
  plan.programs.append(Program('update', update, _estimate_update(context, config, trunks)))
  return plan


def _estimate_update(
  context: common.Context,
  config: ModelConfig,
  trunks: list[Trunk],
) -> work.Work:
  """Estimates the update of a rollout stage.

  Every model first reads the responses, and so does the reference; then all that are
  trained are trained at once, in epochs.
  """
  section = context.section
  layout = context.layout
  rows = section.batch_size * section.num_samples
  length = section.max_length + section.sampling.max_new_tokens
  parts = section.minibatches * section.microbatches
  reference_head = section.sampling.max_new_tokens
  # logprobs and values before the update, on which ratios and advantages stand
  before = work.Work()
  for head in (reference_head, *(trunk.head for trunk in trunks)):
    before += work.forward(config, layout, rows // parts, length, head) * parts

  epochs = getattr(section, 'epochs', 1)  # online preference optimisation has one
  trainings = []
  for trunk in trunks:
    training = work.training(config, layout, rows, length, trunk.head, parts, trunk.trained)
    trainings.append(training * epochs)
  # both models keep their activations and gradients, but pass one after the other
  kept = sum(training.kept for training in trainings)
  passing = max(training.held - training.kept for training in trainings)
  together = dataclasses.replace(sum(trainings, work.Work()), held=kept + passing)
  return before + together


def _abstract_rankings(context: common.Context) -> Rankings:
  """Returns a batch of the rankings of a stage."""
  section = context.section
  return programs.abstract_rankings(
    context.layout,
    section.batch_size,
    section.responses_per_row,
    section.max_length,
  )


# -- rewards


def _reward_kind(name: str) -> str:  # replaced by rewards.sources
  """Returns what a reward's name names: model, function, scorer or server."""
  if name.startswith(_SCORER):
    return 'scorer'
  if name.startswith(_SERVERS):
    return 'server'
  return 'function' if ':' in name else 'model'


def _add_reward(
  plan: StagePlan,
  context: common.Context,
  name: str,
  shapes: RolloutShapes,
) -> None:
  """Adds a reward to the plan of a rollout stage: what it keeps and runs on the devices."""
  kind = _reward_kind(name)
  if kind == 'model':
    _add_reward_model(plan, context, name, shapes)
  elif kind == 'scorer':
    _add_scorer(plan, context, name)
  elif kind == 'server':
    plan.notes.append(f'{name} runs on a server')
  else:
    plan.notes.append(f'{name} runs on the hosts')


def _add_reward_model(
  plan: StagePlan,
  context: common.Context,
  name: str,
  shapes: RolloutShapes,
) -> None:
  """Adds a reward model, which reads all sequences in as many parts as the update."""
  from rlhf_jax.stages import reward

  section = context.section
  parts = section.minibatches * section.microbatches
  rows = section.batch_size * section.num_samples
  length = section.max_length + section.sampling.max_new_tokens
  model, read = common.open_model(context, name, head=True)
  params = read()
  plan.resident[_unused_name(plan.resident, 'reward', name)] = params
  score = reward.build_score(model, parts)
  lower = functools.partial(score.lower, params, shapes.prompts, shapes.samples)
  estimate = work.forward(model.config, context.layout, rows // parts, length, head=0) * parts
  plan.programs.append(Program('score', lower, estimate))


def _add_scorer(plan: StagePlan, context: common.Context, name: str) -> None:
  """Adds a language model that grades responses (direct RLAIF).

  Its prompts are texts, whose lengths a plan does not know: they count as the longest
  that it reads, and its options as one token each.
  """
  section = context.section
  layout = context.layout
  options = section.scorer
  model, read, _ = common.open_reader(context, name.removeprefix(_SCORER))
  params = read()
  plan.resident[_unused_name(plan.resident, 'scorer', name)] = params
  # a call's rows are the scorer's own batch, whatever the policy's is
  prompts = programs.abstract_prompts(layout, options.batch_size, options.max_length)
  grade = jax.jit(functools.partial(_next_token_logprobs, model))
  rows = section.batch_size * section.num_samples
  plan.programs.append(
    Program(
      'grade',
      functools.partial(grade.lower, params, prompts),
      work.forward(model.config, layout, options.batch_size, options.max_length, head=1),
      calls=-(-rows // options.batch_size),  # rounded up
    )
  )
  plan.notes.append(
    f'the lengths of what {name} reads: each response counts as {options.max_length} tokens'
  )


def _next_token_logprobs(model: Model, params: Params, prompts: Prompts) -> jax.Array:
  """Returns the logprobs of the token after each prompt, as a scorer computes them.

  Args:
    model: its definition.
    params: its parameters.
    prompts: left-padded, tokens [B, P] int32.

  Returns:
    [B, V] float32.
  """
  positions = sampler.prompt_positions(prompts.mask)
  segment_ids = prompts.mask.astype(jnp.int32)
  hidden, _ = model.apply(params, prompts.tokens, positions, segment_ids)
  return jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[:, -1]))


def _unused_name(resident: dict[str, Any], kind: str, name: str) -> str:
  """Returns the name of a resident tree: its kind, or its own where there are several."""
  return kind if kind not in resident else f'{kind} {name}'
