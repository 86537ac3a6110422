"""What every stage is handed, and how stages find each other's models."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import report
from rlhf_jax.generation import responses
from rlhf_jax.interop import card, peft_io, pretrained
from rlhf_jax.models import lora, quantised, transformer
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import model_sources


@dataclasses.dataclass(frozen=True)
class Context:
  """A stage's surroundings.

  Attributes:
    config: the whole config.
    name: the stage's section in it.
    workdir: where the run keeps everything.
    layout: mesh and rules.
    tokenizer: one for the whole run.
    bases: frozen parameters that several models of a stage share, by name.
  """
  config: Any
  name: str
  workdir: Path
  layout: Layout
  tokenizer: Any
  bases: dict = dataclasses.field(default_factory=dict)

  @property
  def section(self):
    return self.config[self.name]

  @property
  def lora(self):
    """The section's adapters; None where it trains nothing."""
    return self.section.get('lora') if self.name in self.config else None

  @property
  def directory(self) -> Path:
    return self.workdir / self.name

  def key(self) -> jax.Array:
    """The stage's root key, from the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(self.name.encode()))


def open_model(context: Context, init: str, head: bool = False, trained: bool = False):
  """A model by name, and how to read its parameters.

  A model that is trained with adapters (the section's `lora`) goes on with those that `init` has, or begins with new ones;
  one that is trained without has its adapters added to its matrices first. In a stage with adapters all models that stand
  on one base share its arrays.

  Args:
    init: 'random' (the shape of config.model), or a name as model_sources.find_model takes it; also an earlier stage's.
    head: with a scalar head; a new one where the source has none.
    trained: the stage trains it.

  Returns:
    (Model, read): read() gives sharded parameters, float32 but for a frozen base.

  Raises:
    UserError: nothing of that name, it knows fewer tokens than the tokenizer has, or other adapters than the section's.
  """
  said, layout, wanted = context.config.model, context.layout, context.lora
  adapted = bool(wanted and wanted.rank)
  if init == 'random':
    source, config = None, model_sources.random_shape(context.config, context.tokenizer.vocab_size)
    if adapted and trained:
      raise UserError(f'config.{context.name}.lora: adapters stand on a model that stays, but init is random')
  else:
    source = model_sources.find_model(init, context.workdir, context.config.stages)
    config = source.config
  if config.vocab_size < context.tokenizer.vocab_size:
    raise UserError(f'config.{context.name}: {init!r} knows {config.vocab_size} tokens, the tokenizer of the run '
                    f'{context.tokenizer.vocab_size}')
  if trained:
    config = model_sources.with_adapters(config, wanted, f'config.{context.name}.lora: {init!r}')
  elif adapted:
    config = dataclasses.replace(config, base=wanted.base)
  config = dataclasses.replace(config, head=head, dtype=said.dtype, remat=said.remat, attention=said.attention)
  model = transformer.build_model(config, layout)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  shardings = layout.shardings(model.axes, shapes)
  if config.base in quantised.SMALL and layout.rollout_tensor:
    raise UserError(f'config.mesh.rollout_tensor: expected 0 where lora.base is {config.base}')

  def read():
    if layout.abstract and not adapted:
      return layout.create(model.init, shardings, jax.random.key(0))
    shared = adapted or (source is not None and bool(source.base) and not trained)
    params = model_sources.read_parameters(source, layout, config.base, context.bases if shared else {}) if source else {}
    if trained and source and source.config.lora_rank and not config.lora_rank:
      params = jax.jit(functools.partial(lora.merge_adapters, source.config))(params)
    if trained and adapted and 'score' in params:  # a base's head may be another model's too, and steps give it up
      params = {**params, 'score': copy_tree(layout, params['score'])}
    return model_sources.complete_parameters(params, model.init, shardings, layout, jax.random.fold_in(context.key(), 2**31 - 1))

  return model, read


def copy_tree(layout, tree):
  """A tree of arrays again, in memory of its own."""
  return layout.create(lambda tree: jax.tree.map(jnp.copy, tree), jax.tree.map(lambda leaf: leaf.sharding, tree), tree)


def open_reader(context: Context, name: str):
  """A model that reads text as a judge: (Model, read, its tokenizer), by a name as `init` takes. A stage of this run has
  the run's tokenizer, any other its own."""
  if name not in ('random', *context.config.stages):
    context = dataclasses.replace(context, tokenizer=model_sources.find_model(name).tokenizer())
  return *open_model(context, name), context.tokenizer


def init_state(context: Context, params, optimizer):
  """The TrainState of a stage: what `params` has to train, and the rest of it frozen."""
  trained, frozen = lora.split_trainable(params)
  return steps.create_train_state(trained, optimizer, context.key(), context.layout, frozen)


def open_trainable(context: Context, head: bool = False):
  """What a supervised stage trains: (model, optimizer, init: () → TrainState). Checks the section's batch first."""
  check_batch(context)
  section = context.section
  model, read = open_model(context, section.init, head, trained=True)
  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps)
  write_model_json(context, model)
  return model, optimizer, lambda: init_state(context, read(), optimizer)


def check_batch(context: Context, rows: int | None = None, parts: int | None = None) -> None:
  """Raises UserError where a batch does not divide over micro-batches and devices."""
  section = context.section
  rows, parts = section.batch_size if rows is None else rows, section.microbatches if parts is None else parts
  ways = context.layout.batch_shards
  if rows < 1 or parts < 1 or rows % parts or rows // parts % ways:
    raise UserError(f'config.{context.name}: a batch of {rows} rows in {parts} parts does not divide over the {ways} '
                    'device(s) of the mesh axes data, fsdp and expert')


def write_model_json(context: Context, model) -> None:
  """Writes model.json into the stage's folder, by which later stages know its shape, and the base of its adapters."""
  context.directory.mkdir(parents=True, exist_ok=True)
  base = model_sources.adapter_base_name(context.section.init, context.workdir, context.config.stages) if model.config.lora_rank else ''
  write_text(context.directory / 'model.json', json.dumps({**dataclasses.asdict(model.config), 'base_model': base}, indent=2) + '\n')


def export(context: Context, params) -> None:
  """Leaves the model in the stage's folder as a Hugging Face directory, with a card: `export`. Adapters are left in PEFT's
  format, `adapter`, and added to their matrices for the export (unless export.merged is False)."""
  said, section = context.config.export, context.section.to_dict()
  source = model_sources.find_model(context.name, context.workdir, context.config.stages)
  config = source.config
  evaluated = [line for line in report.read_metrics(context.directory) if any(key.startswith('eval/') for key in line)]
  results = {key.removeprefix('eval/'): value for key, value in (evaluated or [{}])[-1].items()
             if key.startswith('eval/') and isinstance(value, (int, float))}
  data = {name: ', '.join((value['source'], *map(str, value.get('path', ())))) for name, value in section.items()
          if isinstance(value, dict) and 'source' in value}
  text = card.write_card(config, context.name, section['kind'], section.get('init', ''), data, results, section)
  text = text.replace(str(context.workdir), '{workdir}')  # a card travels, a path does not
  if config.lora_rank:
    base = Path(source.base.name)
    peft_io.save_adapters(context.directory / 'adapter', config, params,
                 str(base / 'export' if (base / 'model.json').is_file() else base), said.dtype, text, context.tokenizer)
    if not said.merged:
      return
    params = jax.jit(functools.partial(lora.merge_adapters, config))(params)
    config = model_sources.with_adapters(config, None, '')
  pretrained.export_model(context.directory / 'export', config, params, context.tokenizer, said.dtype,
                    int(said.shard_gigabytes * 10**9), text)


def build_samples(context: Context, model, prompts):
  """show(state) → a dict {prompt, response} for each of the first few prompts (lists of tokens); the same draw for
  the same prompts at every evaluation, so that texts can be compared."""
  section, tokenizer, layout = context.section, context.tokenizer, context.layout
  chosen = prompts[:section.shown_responses]
  if not chosen:
    return lambda state: []
  answer = responses.build_responder(model, section.sampling, tokenizer, layout)
  rows = -(-len(chosen) // layout.batch_shards) * layout.batch_shards

  def show(state):
    given = responses.complete_prompts(answer, state.params, chosen, rows, tokenizer.pad_id, context.key())
    return [{'prompt': tokenizer.core.decode(np.asarray(tokens).tolist()), 'response': texts[0]}
            for tokens, texts in zip(chosen, given.texts)]
  return show


def write_text(path: Path, text: str) -> None:
  """Writes a small file whole or not at all; only the first process does."""
  if jax.process_index() == 0:
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)
