"""The PPO stage: what runs around the compiled step, its plan and its data."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.planning.programs import abstract_sequences, StagePlan
from rlhf_jax.runtime import hosts, loop, optimizers
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.ppo.assessment import assess_tokens, trusts_sampler
from rlhf_jax.stages.ppo.options import check_options, Options
from rlhf_jax.stages.ppo.state import create_state, Definitions, PPOState
from rlhf_jax.stages.ppo.update import train_step
from rlhf_jax.stages.shared import (
  off_policy,
  rollout,
  rollout_metering,
  rollout_plan,
  training,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind, TINY_LOOP
from rlhf_jax.stages.shared.model_store import ModelStore, OpenModel
from rlhf_jax.stages.shared.rollout import (
  RolloutParts,
  ScoredRollout,
)
from rlhf_jax.stages.shared.scores import check_scores, open_scores, Score
from rlhf_jax.types import (
  Array,
  Params,
  Prompts,
  Sequences,
)


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
  meter = rollout_metering.meter_rollout(
    parts.definitions,
    options,
    options.epochs,
    not rollout.is_one_pass(options),
    value_config,
    options.document_places,
    trusts_sampler(parts.definitions, options),
  )
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


def _pretraining_batches(context: Context, options: Options) -> Iterator[Sequences] | None:
  """Returns batches of texts for PPO-ptx; None where its coefficient is 0."""
  if not options.pretraining_coefficient:
    return None
  records = sources.load_records(options.pretraining, options.pretraining_kind, 'train')
  return batches.sequences(
    _encode_pretraining(records, context.tokenizer, options, spread=hosts.spread),
    options.batch_size * options.num_samples,  # rows, as many as responses
    options.pretraining_max_length,
    context.config.seed,
  )


def _encode_pretraining(
  records: Sequence[Any],
  tokenizer: Any,
  options: Options,
  overlong: str = 'drop',
  spread: encode.Spread = map,
) -> Sequence[encode.Example]:
  """Encodes the texts of PPO-ptx as pre-training and SFT do; documents are cut into windows."""
  length = options.pretraining_max_length
  if options.pretraining_kind == 'document':
    return encode.documents(records, tokenizer, length, spread)
  return encode.demonstrations(records, tokenizer, length, overlong, spread=spread)


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  parts = define(context, options)

  def update_arguments(scored: ScoredRollout, reference_params: Params | None) -> tuple:
    if options.document_places:
      rows = options.batch_size * options.num_samples
      documents = abstract_sequences(context.layout, rows, options.document_places)
      scored = scored.replace(pretraining=documents)
    return scored, reference_params

  return rollout_plan.plan_rollout(
    context,
    options,
    parts,
    update_arguments,
    passes=options.epochs,
    has_value_trunk=bool(options.value),
    document_places=options.document_places,
  )


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_texts(records: Sequence[Any], overlong: str) -> Sequence[dict]:
    return list(_encode_pretraining(records, tokenizer, options, overlong))

  uses = rollout.list_data(options, tokenizer)
  if options.pretraining_coefficient:
    kind = options.pretraining_kind
    texts = DataUse('pretraining', options.pretraining, kind, encode_texts, splits=('train',))
    uses.append(texts)
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
