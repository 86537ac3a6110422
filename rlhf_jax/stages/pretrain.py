"""Pre-training: next-token prediction on documents (step 1 of the four).

  minimise −mean_t log p(x_t | x_<t)   over every token of every document but its first

Documents are packed into rows of `max_length` tokens and attend only to
themselves; longer ones are cut into windows. Left out: dropout.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.records import Document
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.evaluation import baselines
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.options import Count, Natural
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.runtime import hosts, loop
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import metering, supervised, training
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

PROMPT_TOKENS = 8  # of a held-out document, which the model continues at each evaluation


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a pre-training stage."""

  init: str = 'random'  # random, an earlier stage, a stage's folder, a Hugging Face directory
  lora: LoraOptions = LoraOptions()  # adapters beside frozen matrices instead of all parameters
  batch_size: Count = 64  # rows of a batch, over all devices
  max_length: Count = 96  # tokens of a row
  microbatches: Count = 1  # parts of a batch, one after the other, to save memory
  eval_records: Count = 200  # held-out documents
  shown_responses: Natural = 4  # texts written at each evaluation
  data: DataOptions = DataOptions()
  sampling: SamplingOptions = SamplingOptions()
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=1e-3,
    weight_decay=0.1,
    b2=0.95,
    warmup_steps=20,
  )
  loop: LoopOptions = LoopOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.shown_responses else {'sampling': 'shown_responses is 0'}


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def build(context: Context, options: Options) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation."""
  tokenizer = context.tokenizer
  trainable = training.open_trainable(context, options)
  definitions = trainable.definitions
  held_out = sources.load_records(options.data, 'document', 'validation')
  held_out = sources.spread_evenly(held_out, options.eval_records)
  documents = sources.load_records(options.data, 'document', 'train')
  length = options.max_length
  examples = encode.documents(documents, tokenizer, length, hosts.spread)
  held_out_examples = encode.documents(held_out, tokenizer, length, hosts.spread)
  # Nats per character, unlike nats per token, can be compared between tokenizers.
  characters = sum(len(document.text) for document in held_out)
  baseline_values = baselines.nats_per_character(documents, held_out)
  measure_loss = supervised.build_evaluation(
    definitions.model,
    context.layout,
    held_out_examples,
    options.batch_size,
    options.max_length,
  )
  beginnings = [example['tokens'][:PROMPT_TOKENS].tolist() for example in held_out_examples]
  show = training.build_show_responses(context, definitions.model, beginnings, options)

  def evaluate(
    state: TrainState,
  ) -> tuple[dict[str, float], list[dict[str, str]]]:
    nats_per_token, tokens = measure_loss(state.params)
    values = {
      'loss': nats_per_token,
      'perplexity': math.exp(min(nats_per_token, 50)),  # finite for an untrained model
      'nats_per_character': nats_per_token * tokens / characters,
    }
    return values | baseline_values, show(state)

  return loop.Training(
    name=context.name,
    init=trainable.init,
    evaluate=evaluate,
    batches=batches.sequences(
      examples,
      options.batch_size,
      options.max_length,
      context.config.seed,
    ),
    step=training.compile_train_step(train_step, definitions, options),
    meter=metering.meter_rows(definitions.model.config, options.batch_size, options.max_length),
  )


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  return supervised.plan(context, context.read_options(STAGE))


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_all(records: Sequence[Document], overlong: str) -> Sequence[dict]:
    del overlong  # documents are cut into windows
    return list(encode.documents(records, tokenizer, options.max_length))

  return [DataUse('data', options.data, 'document', encode_all)]


TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'eval_records': 8,
}
STAGE = StageKind(options=Options, run=run, plan=plan, tiny=TINY, data=list_data)
