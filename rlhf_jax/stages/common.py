"""What every stage is handed, and how stages find each other's models."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any
import zlib

import jax
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import answers, report
from rlhf_jax.models import card, pretrained, transformer
from rlhf_jax.models.tokenizer import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout, Need


@dataclasses.dataclass(frozen=True)
class Context:
  """A stage's surroundings.

  Attributes:
    config: the whole config.
    name: the stage's section in it.
    workdir: where the run keeps everything.
    layout: mesh and rules.
    tokenizer: one for the whole run.
  """
  config: Any
  name: str
  workdir: Path
  layout: Layout
  tokenizer: Any

  @property
  def section(self):
    return self.config[self.name]

  @property
  def directory(self) -> Path:
    return self.workdir / self.name

  def key(self) -> jax.Array:
    """The stage's root key, from the run's seed and the stage's name."""
    return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(self.name.encode()))


def open_model(context: Context, init: str, head: bool = False):
  """A model by name, and how to read its parameters.

  Args:
    init: 'random' (the shape of config.model), an earlier stage's name, a stage's folder of another run, 'smollm2', a
      .gguf file or a Hugging Face directory.
    head: with a scalar head; a new one where the source has none.

  Returns:
    (Model, read): read() gives sharded parameters, float32.

  Raises:
    UserError: nothing of that name, or it knows fewer tokens than the tokenizer has.
  """
  layout, said = context.layout, context.config.model
  compute = dict(dtype=said.dtype, remat=said.remat, attention=said.attention)
  stage = context.workdir / init if init in context.config.stages else Path(init)
  if init == 'random':
    own = head
    config = transformer.ModelConfig(vocab_size=context.tokenizer.vocab_size, **said.to_dict())
    load = None
  elif (stage / 'model.json').is_file():
    config = transformer.ModelConfig(**json.loads((stage / 'model.json').read_text()))
    own, load = config.head, lambda shapes, shardings: checkpoint.restore_params(stage / 'checkpoints', jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings))
  elif init in context.config.stages:
    raise UserError(f'config.{context.name}: {stage} holds no model yet; is {init!r} an earlier stage that trains one?')
  else:
    source = pretrained.open_pretrained(init)
    config = source.config
    own, load = config.head, lambda shapes, shardings: source.load(shardings)
  if config.vocab_size < context.tokenizer.vocab_size:
    raise UserError(f'config.{context.name}: {init!r} knows {config.vocab_size} tokens, the tokenizer of the run '
                    f'{context.tokenizer.vocab_size}')
  build = lambda head: transformer.build(dataclasses.replace(config, head=head, **compute), layout.constrain,
                                         layout.shards)
  model, source_model = build(head), build(own)

  def read():
    if load is None:
      return _initialise(context, model)
    shapes = jax.eval_shape(source_model.init, jax.random.key(0))
    params = dict(load(shapes, layout.shardings(source_model.axes, shapes)))
    if head and not own:
      params['score'] = _initialise(context, model, 'score')
    elif own and not head:
      del params['score']
    return params

  return model, read


def open_reader(context: Context, name: str):
  """A model that reads text as a judge: (Model, read, its tokenizer), by a name as `init` takes. A stage of this run has
  the run's tokenizer, any other its own."""
  if name not in ('random', *context.config.stages):
    folder = Path(name)
    own = Tokenizer.load(folder.parent / 'tokenizer') if (folder / 'model.json').is_file() else (
        pretrained.open_pretrained(name).tokenizer)
    context = dataclasses.replace(context, tokenizer=own)
  return *open_model(context, name), context.tokenizer


def _initialise(context, model, part=None):
  init = model.init if part is None else lambda key: model.init(key)[part]
  axes = model.axes if part is None else model.axes[part]
  shardings = context.layout.shardings(axes, jax.eval_shape(init, jax.random.key(0)))
  return jax.jit(init, out_shardings=shardings)(jax.random.fold_in(context.key(), 2**31 - 1))


def need(config) -> Need:
  """What the models of an experiment ask of a mesh. Shapes are read, weights are not."""
  vocab, made = config.tokenizer.vocab_size, {}
  if config.tokenizer.init != 'train':
    vocab = pretrained.open_pretrained(config.tokenizer.init).tokenizer.vocab_size

  def count(init):
    while init in config.stages:
      init = config[init].init
    if init not in made:
      if init == 'random':
        shape = transformer.ModelConfig(vocab_size=vocab, **config.model.to_dict())
      elif (Path(init) / 'model.json').is_file():
        shape = transformer.ModelConfig(**json.loads((Path(init) / 'model.json').read_text()))
      else:
        shape = pretrained.open_pretrained(init).config
      made[init] = shape, transformer.parameter_count(transformer.build(shape))
    return made[init][1]

  heaviest, rows = 0, []
  for section in (config[name] for name in config.stages if 'optimizer' in config[name]):
    trained = [section.init, *filter(None, [section.get('value', '')])]
    rewards = [name for name in section.get('reward', ()) if ':' not in name]
    frozen = [*filter(None, [section.get('reference', '')]), *rewards]
    heaviest = max(heaviest, 16 * sum(map(count, trained)) + 4 * sum(map(count, frozen)))  # Adam's two, and gradients
    rows += [section.batch_size]
    rows += [section.batch_size * (section.samples if 'minibatches' in section else 1)
             // (section.get('minibatches', 1) * section.microbatches)]
  if len(config.evaluation.models):
    rows.append(config.evaluation.batch_size)
  shapes = [shape for shape, _ in made.values()]
  return Need(max(number for _, number in made.values()), heaviest, math.gcd(*rows),
              math.gcd(*(shape.embed for shape in shapes)),
              math.gcd(*(x for shape in shapes for x in (shape.heads, shape.kv_heads, shape.mlp, shape.vocab_size))))


def trainable(context: Context, head: bool = False):
  """What a supervised stage trains: (model, optimizer, init: () → TrainState). Checks the section's batch first."""
  check_batch(context)
  section = context.section
  model, read = open_model(context, section.init, head)
  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps)
  describe(context, model)
  return model, optimizer, lambda: steps.init_state(read(), optimizer, context.key(), context.layout)


def check_batch(context: Context, rows: int | None = None, parts: int | None = None) -> None:
  """Raises UserError where a batch does not divide over micro-batches and devices."""
  section = context.section
  rows, parts = section.batch_size if rows is None else rows, section.microbatches if parts is None else parts
  ways = context.layout.batch_ways
  if rows < 1 or parts < 1 or rows % parts or rows // parts % ways:
    raise UserError(f'config.{context.name}: a batch of {rows} rows in {parts} parts does not divide over the {ways} '
                    'device(s) of the mesh axes data, fsdp and expert')


def describe(context: Context, model) -> None:
  """Writes model.json into the stage's folder, by which later stages know its shape."""
  context.directory.mkdir(parents=True, exist_ok=True)
  write(context.directory / 'model.json', json.dumps(dataclasses.asdict(model.config), indent=2) + '\n')


def export(context: Context, params) -> None:
  """Leaves the model in the stage's folder as a Hugging Face directory, with a card."""
  said, section = context.config.export, context.section.to_dict()
  config = transformer.ModelConfig(**json.loads((context.directory / 'model.json').read_text()))
  evaluated = [line for line in report.read_metrics(context.directory) if any(key.startswith('eval/') for key in line)]
  results = {key.removeprefix('eval/'): value for key, value in (evaluated or [{}])[-1].items()
             if key.startswith('eval/') and isinstance(value, (int, float))}
  data = {name: ', '.join((value['source'], *map(str, value.get('path', ())))) for name, value in section.items()
          if isinstance(value, dict) and 'source' in value}
  pretrained.export(
      context.directory / 'export', config, params, context.tokenizer, said.dtype, int(said.shard_gigabytes * 10**9),
      card.write(config, context.name, section['kind'], section.get('init', ''), data, results, section))


def build_samples(context: Context, model, prompts):
  """show(state) → a dict {prompt, response} for each of the first few prompts (lists of tokens); the same draw for
  the same prompts at every evaluation, so that texts can be compared."""
  section, tokenizer, layout = context.section, context.tokenizer, context.layout
  chosen = prompts[:section.samples]
  if not chosen:
    return lambda state: []
  answer = answers.build(model, section.sampling, tokenizer, layout)
  rows = -(-len(chosen) // layout.batch_ways) * layout.batch_ways

  def show(state):
    given = answers.complete(answer, state.params, chosen, rows, tokenizer.pad_id, context.key())
    return [{'prompt': tokenizer.core.decode(np.asarray(tokens).tolist()), 'response': texts[0]}
            for tokens, texts in zip(chosen, given.texts)]
  return show


def write(path: Path, text: str) -> None:
  """Writes a small file whole or not at all; only the first process does."""
  if jax.process_index() == 0:
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)
