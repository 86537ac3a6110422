"""What every stage is handed, and how stages find each other's models."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.errors import UserError
from rlhf_jax.models import pretrained, transformer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.mesh import Layout


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
    """The stage's root key: of the run's seed and the stage's place in it."""
    return jax.random.fold_in(jax.random.key(self.config.seed), list(self.config.stages).index(self.name))


def load(context: Context, init: str, head: bool = False):
  """A model and its sharded parameters.

  Args:
    init: 'random' (the shape of config.model), an earlier stage's name, a stage's folder of another run, 'smollm2', a
      .gguf file or a Hugging Face directory.
    head: with a scalar head; a new one where the source has none.

  Returns:
    (Model, params), parameters float32.

  Raises:
    UserError: nothing of that name.
  """
  layout, tokenizer = context.layout, context.tokenizer
  stage = context.workdir / init if init in context.config.stages else Path(init)
  compute = dict(dtype=context.config.model.dtype, remat=context.config.model.remat)
  if init == 'random':
    shape = context.config.model.to_dict()
    config = transformer.ModelConfig(vocab_size=tokenizer.vocab_size, head=head, **shape)
    model = transformer.build(config, layout.constrain)
    return model, _initialise(context, model)
  if (stage / 'model.json').is_file():
    config = transformer.ModelConfig(**{**json.loads((stage / 'model.json').read_text()), **compute})
    read = lambda shardings, shapes: checkpoint.restore_params(stage / 'checkpoints', jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings))
  else:
    source = pretrained.find(init)
    config = dataclasses.replace(pretrained.read_config(source), **compute)
    read = lambda shardings, shapes: pretrained.load(source, config, shardings)
  if config.vocab_size < tokenizer.vocab_size:
    raise UserError(f'config.{context.name}: {init!r} knows {config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}')
  model = transformer.build(config, layout.constrain)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  params = read(layout.shardings(model.axes, shapes), shapes)
  if head == config.head:
    return model, params
  model = transformer.build(dataclasses.replace(config, head=head), layout.constrain)
  if head:
    return model, {**params, 'score': _initialise(context, model, 'score')}
  return model, {name: leaf for name, leaf in params.items() if name != 'score'}


def _initialise(context, model, part=None):
  init = model.init if part is None else lambda key: model.init(key)[part]
  axes = model.axes if part is None else model.axes[part]
  shardings = context.layout.shardings(axes, jax.eval_shape(init, jax.random.key(0)))
  return jax.jit(init, out_shardings=shardings)(jax.random.fold_in(context.key(), 2**31 - 1))


def describe(context: Context, model) -> None:
  """Writes model.json into the stage's folder, by which later stages know its shape."""
  context.directory.mkdir(parents=True, exist_ok=True)
  write(context.directory / 'model.json', json.dumps(dataclasses.asdict(model.config), indent=2) + '\n')


def write(path: Path, text: str) -> None:
  """Writes a small file whole or not at all; only the first process does."""
  if jax.process_index() == 0:
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)
