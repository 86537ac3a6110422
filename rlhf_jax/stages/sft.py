"""Supervised fine-tuning on human demonstrations (step 2 of the four).

  minimise −mean_t log p(y_t | x, y_<t)   over the tokens of the demonstrated response y

The response's end of turn is a target too, so that the model learns to stop.
Source: Ouyang et al. 2022, section 3.5. Left out: dropout.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.records import Demonstration
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.options import Count, Natural
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.runtime import hosts, loop
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import metering, response_judge, supervised, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind, TINY_LOOP
from rlhf_jax.stages.shared.supervised import loss, train_step
from rlhf_jax.types import TrainState

# loss and train_step are those of all stages that learn from packed rows.
__all__ = [
  'STAGE',
  'Options',
  'build',
  'loss',
  'plan',
  'run',
  'train_step',
]


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a supervised fine-tuning stage."""

  init: str = 'pretrain'  # random, an earlier stage, a stage's folder, a Hugging Face directory
  lora: LoraOptions = LoraOptions()  # adapters beside frozen matrices instead of all parameters
  batch_size: Count = 32  # rows of a batch, over all devices
  max_length: Count = 96  # tokens of a row
  pack: bool = True  # several demonstrations in a row
  # What is done with a demonstration longer than a row: drop (they are counted),
  # truncate_left (the prompt loses its beginning) or error.
  overlong: str = 'drop'
  targets: str = 'last'  # what is learned: the last response, or all that the assistant says
  microbatches: Count = 1  # parts of a batch, one after the other, to save memory
  eval_records: Count = 200  # held-out demonstrations
  shown_responses: Natural = 4  # responses written at each evaluation
  data: DataOptions = DataOptions()
  sampling: SamplingOptions = SamplingOptions()
  optimizer: OptimizerOptions = OptimizerOptions(learning_rate=3e-4, warmup_steps=10)
  loop: LoopOptions = LoopOptions(steps=300)

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.shown_responses else {'sampling': 'shown_responses is 0'}


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def build(
  context: Context,
  options: Options,
  step: Callable[..., tuple[TrainState, dict]] = train_step,
) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation.

  Args:
    context: the context of the stage.
    options: its section.
    step: the train step, un-jitted. A stage with another loss on the same data brings its own.
  """
  tokenizer = context.tokenizer
  trainable = training.open_trainable(context, options)
  definitions = trainable.definitions

  def encode_all(records: Sequence[Demonstration]) -> list[dict]:
    return encode.demonstrations(
      records,
      tokenizer,
      options.max_length,
      options.overlong,
      options.targets,
      hosts.spread,
    )

  held_out = sources.load_records(options.data, 'demonstration', 'validation')
  held_out = sources.spread_evenly(held_out, options.eval_records)
  measure_loss = supervised.build_evaluation(
    definitions.model,
    context.layout,
    encode_all(held_out),
    options.batch_size,
    options.max_length,
  )
  prompts = [tokenizer.prompt(record.messages, record.tools) for record in held_out]
  asked = [response_judge.as_prompt(record) for record in held_out]
  show = training.build_show_responses(context, definitions.model, prompts, options, asked)

  def evaluate(
    state: TrainState,
  ) -> tuple[dict[str, float], list[dict[str, str]]]:
    nats_per_token, _ = measure_loss(state.params)
    perplexity = math.exp(min(nats_per_token, 50))  # finite for an untrained model
    return {'loss': nats_per_token, 'perplexity': perplexity}, show(state)

  return loop.Training(
    name=context.name,
    init=trainable.init,
    evaluate=evaluate,
    batches=batches.sequences(
      encode_all(sources.load_records(options.data, 'demonstration', 'train')),
      options.batch_size,
      options.max_length,
      context.config.seed,
      pack=options.pack,
    ),
    step=training.compile_train_step(step, definitions, options),
    meter=metering.meter_rows(definitions.model.config, options.batch_size, options.max_length),
  )


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  return supervised.plan(context, context.read_options(STAGE))


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_all(records: Sequence[Demonstration], overlong: str) -> list[dict]:
    return encode.demonstrations(records, tokenizer, options.max_length, overlong, options.targets)

  return [DataUse('data', options.data, 'demonstration', encode_all, options.overlong)]


TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'eval_records': 8,
}
STAGE = StageKind(options=Options, run=run, plan=plan, tiny=TINY, data=list_data)
