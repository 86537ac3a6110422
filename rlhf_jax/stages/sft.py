"""Supervised fine-tuning on human demonstrations (step 2 of the four; Ouyang et al. 2022, section 3.5).

  minimise −mean_t log p(y_t | x, y_<t)   over the tokens of the demonstrated response y and its end of turn.
"""

import math

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.generation import sampler
from rlhf_jax.models import lora
from rlhf_jax.runtime import loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common, supervised

DEFAULTS = dict(
    init='pretrain',
    lora=dict(lora.DEFAULTS),  # adapters beside frozen matrices, in place of training all parameters
    batch_size=32,  # rows in a batch, over all devices
    max_length=96,  # tokens in a row
    pack=True,  # several demonstrations in a row
    overlong='drop',  # a demonstration longer than a row: drop (counted), truncate_left (the prompt), error
    microbatches=1,
    eval_records=200,  # held-out demonstrations
    shown_responses=4,  # answers written at each evaluation
    data=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=3e-4, warmup_steps=10),
    loop=dict(loop.DEFAULTS, steps=300),
)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  model, optimizer, init = common.open_trainable(context)
  read = lambda split: sources.load_records(section.data, 'demonstration', split)
  fit = lambda records: encode.demonstrations(records, tokenizer, section.max_length, section.overlong)
  held_out = sources.spread_evenly(read('validation'), section.eval_records)
  measure = supervised.build_evaluation(model, layout, fit(held_out), section.batch_size, section.max_length)
  show = common.build_samples(context, model, [tokenizer.prompt(record.messages) for record in held_out])

  def evaluate(state):
    loss, _ = measure(state.params)
    return {'loss': loss, 'perplexity': math.exp(min(loss, 50))}, show(state)

  return loop.Training(
      name=context.name, init=init, evaluate=evaluate,
      batches=batches.sequences(fit(read('train')), section.batch_size, section.max_length, context.config.seed,
                                pack=section.pack),
      step=steps.build(supervised.build_loss(model), optimizer, layout, section.microbatches))
