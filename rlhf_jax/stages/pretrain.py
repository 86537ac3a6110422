"""Pre-training: next-token prediction on documents (step 1 of the four).

  minimise −mean_t log p(x_t | x_<t)   over every token of every document but its first.

Documents are packed into rows of `length` without seeing each other; longer ones are cut into windows.
"""

import math

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.evaluation import baselines
from rlhf_jax.generation import sampler
from rlhf_jax.models import lora
from rlhf_jax.runtime import loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common, supervised

DEFAULTS = dict(
    init='random',  # 'random', an earlier stage, a stage's folder or a Hugging Face directory
    lora=dict(lora.DEFAULTS),  # adapters beside frozen matrices, in place of training all parameters
    batch_size=64,  # rows in a batch, over all devices
    max_length=96,  # tokens in a row
    microbatches=1,  # parts of a batch, one after the other, to save memory
    eval_records=200,  # held-out documents
    shown_responses=4,  # texts written at each evaluation
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=1e-3, weight_decay=0.1, b2=0.95, warmup_steps=20),
    loop=dict(loop.DEFAULTS),
)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  model, optimizer, init = common.open_trainable(context)
  held_out = sources.spread_evenly(sources.load_records(section.data, 'document', 'validation'), section.eval_records)
  train = sources.load_records(section.data, 'document', 'train')
  examples = encode.documents(train, tokenizer, section.max_length)
  held_out_examples = encode.documents(held_out, tokenizer, section.max_length)
  characters = sum(len(record.text) for record in held_out)
  compared = baselines.nats_per_character(train, held_out)
  measure = supervised.build_evaluation(model, layout, held_out_examples, section.batch_size, section.max_length)
  show = common.build_samples(context, model, [example['tokens'][:8] for example in held_out_examples])

  def evaluate(state):
    loss, count = measure(state.params)
    values = {'loss': loss, 'perplexity': math.exp(min(loss, 50)), 'nats_per_character': loss * count / characters}
    return values | compared, show(state)

  return loop.Training(
      name=context.name, init=init, evaluate=evaluate,
      batches=batches.sequences(examples, section.batch_size, section.max_length, context.config.seed),
      step=steps.build(supervised.build_loss(model), optimizer, layout, section.microbatches))
