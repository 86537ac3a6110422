"""Models at rest, by name: a stage of this run, a stage's folder of another run, a Hugging Face directory, a directory of
PEFT adapters, a .gguf file, 'smollm2'. Their shapes are known at once, their parameters are read when asked for."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Callable

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.interop import peft_io, pretrained
from rlhf_jax.models import lora, quantised, transformer
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.mesh import MeshNeed
from rlhf_jax.types import merge_params


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A model at rest.

  Attributes:
    config: its shape.
    load: (shapes, shardings: trees that may have more leaves) → the parameters it holds; its adapters only, where it has
      a base.
    tokenizer: () → its own, None where there is none.
    base: what its adapters stand on, a ModelSource; None where it is whole.
    name: what it is known by, wherever it is named from.
  """
  config: transformer.ModelConfig
  load: Callable[..., Any]
  tokenizer: Callable[[], Any]
  name: str
  base: 'ModelSource | None' = None


def find_model(name: str, workdir=None, stages=()) -> ModelSource:
  """The model of a name.

  Args:
    name: see above.
    workdir, stages: of the run, for names of its stages.

  Raises:
    UserError: nothing of that name, or nothing that can be read.
  """
  folder = Path(workdir) / name if name in stages else Path(name)
  place = os.path.abspath(folder)
  if (folder / 'model.json').is_file():
    said = json.loads((folder / 'model.json').read_text())
    base = said.pop('base_model', '')
    config = transformer.ModelConfig(**said)

    def load(shapes, shardings):
      leaves = traverse_util.flatten_dict(jax.tree.map(
          lambda one, sharding: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding), shapes, shardings))
      if base:
        leaves = {path: leaf for path, leaf in leaves.items() if lora.is_adapter(path)}
      return checkpoint.restore_params(folder / 'checkpoints', traverse_util.unflatten_dict(leaves))
    return ModelSource(config, load, lambda: Tokenizer.load(folder.parent / 'tokenizer'), place,
                  find_model(str(folder / base) if base.startswith('..') else base) if base else None)
  if name in stages:
    raise UserError(f'{folder} holds no model yet; is {name!r} an earlier stage that trains one?')
  if (folder / peft_io.CONFIG).is_file():
    base = find_model(peft_io.base_model_of(folder))
    config = peft_io.adapter_model_config(folder, base.config)
    tokenizer = (lambda: Tokenizer.load(folder)) if (folder / 'tokenizer.json').is_file() else base.tokenizer
    return ModelSource(config, lambda shapes, shardings: peft_io.load_adapters(folder, config, shardings), tokenizer, place, base)
  if (folder / 'config.json').is_file() and not (folder / 'tokenizer.json').is_file():
    config = pretrained.read_config(folder)
    return ModelSource(config, lambda shapes, shardings: pretrained.load_parameters(folder, config, shardings), lambda: None, place)
  found = pretrained.open_pretrained(name)
  return ModelSource(found.config, lambda shapes, shardings: found.load(shardings), lambda: found.tokenizer,
                name if name == pretrained.SMOLLM2 else place)


def adapter_base_name(name: str, workdir, stages) -> str:
  """What adapters on this model stand on, as model.json says it: a neighbour of the stage's folder, or a name."""
  source = find_model(name, workdir, stages)
  base = (source.base or source).name
  near = os.path.dirname(base) == os.path.abspath(workdir)
  return f'../{os.path.basename(base)}' if near else base


def with_adapters(config, wanted, where: str):
  """The shape of a model that is trained as a section's `lora` says.

  Raises:
    UserError: it has other adapters.
  """
  if not wanted or not wanted.rank:
    return dataclasses.replace(config, lora_rank=0, lora_targets=(), base='float32')
  targets = tuple(name for name in config.matrices if name in wanted.targets or not wanted.targets)
  unknown = [name for name in wanted.targets if name not in targets]
  if unknown:
    raise UserError(f'{where}: targets: expected some of {", ".join(config.matrices)}, got {", ".join(unknown)}')
  new = dict(lora_rank=wanted.rank, lora_alpha=float(wanted.alpha), lora_targets=targets)
  has = {name: getattr(config, name) for name in new}
  if config.lora_rank and has != new:
    raise UserError(f'{where} has adapters of {has}, expected {new}; say the same, or begin with its export, in which they '
                    'are added to the matrices')
  return dataclasses.replace(config, **new, base=wanted.base)


def read_parameters(source: ModelSource, layout, base: str, kept: dict):
  """The parameters of a source, adapters beside their base.

  Args:
    base: how a base is kept: see quantised.py.
    kept: bases that were read, by name; this one is added.
  """
  def whole(source):
    model = transformer.build_model(source.config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = layout.shardings(model.axes, shapes)
    if not layout.abstract:
      return dict(source.load(shapes, shardings))
    held = layout.create(model.init, shardings, jax.random.key(0))
    return lora.split_trainable(held)[0] if source.base else held

  bottom = source.base or source
  if (bottom.name, base) not in kept:
    kept[bottom.name, base] = quantised.keep(whole(bottom), base, layout.create)
  return merge_params(whole(source), kept[bottom.name, base]) if source.base else dict(kept[bottom.name, base])


def complete_parameters(params, init, shardings, layout, key=None):
  """The leaves that a model has: those of params, new ones where there are none.

  Raises:
    UserError: a leaf would be new, and there is no key.
  """
  have = traverse_util.flatten_dict(params)
  places = traverse_util.flatten_dict(shardings)
  new = [path for path in places if path not in have]
  if new and key is None:
    raise UserError(f'the model lacks {", ".join(map(".".join, new[:3]))}')
  if new:
    made = layout.create(lambda key: [traverse_util.flatten_dict(init(key))[path] for path in new],
                       [places[path] for path in new], key)
    have |= dict(zip(new, made))
  return traverse_util.unflatten_dict({path: have[path] for path in places})


def random_shape(config, vocab_size: int):
  """The shape of a model that starts at random."""
  return transformer.ModelConfig(vocab_size=vocab_size, **config.model.to_dict())


def mesh_need(config) -> MeshNeed:
  """What the models of an experiment ask of a mesh. Shapes are read, weights are not."""
  vocab, made = config.tokenizer.vocab_size, {}
  if config.tokenizer.init != 'train':
    vocab = pretrained.open_tokenizer(config.tokenizer.init).vocab_size

  def count(init):
    while init in config.stages:
      init = config[init].init
    if init not in made:
      shape = random_shape(config, vocab) if init == 'random' else find_model(init).config
      made[init] = shape, transformer.parameter_count(transformer.build_model(shape))
    return made[init][1]

  heaviest, rows, movable = 0, [], True
  for section in (config[name] for name in config.stages if 'optimizer' in config[name]):
    trained = [section.init, *filter(None, [section.get('value', '')])]
    rewards = [name for name in section.get('reward', ()) if ':' not in name]
    frozen = [*filter(None, [section.get('reference', '')]), *rewards]
    if 'lora' in section and section.lora.rank:  # one base for all, and only adapters have gradients and moments
      state = quantised.BYTES[section.lora.base] * max(map(count, [*trained, *frozen]))
      movable &= section.lora.base not in quantised.SMALL
    else:
      state = 16 * sum(map(count, trained)) + 4 * sum(map(count, frozen))
    heaviest = max(heaviest, state)
    rows += [section.batch_size]
    rows += [section.batch_size * (section.num_samples if 'minibatches' in section else 1)
             // (section.get('minibatches', 1) * section.microbatches)]
  if len(config.evaluation.models):
    rows.append(config.evaluation.batch_size)
  shapes = [shape for shape, _ in made.values()]
  largest = max(number for _, number in made.values())
  return MeshNeed(largest, heaviest, largest * jnp.dtype(config.model.dtype).itemsize * movable, math.gcd(*rows),
              math.gcd(*(shape.embed for shape in shapes)),
              math.gcd(*(x for shape in shapes for x in (shape.heads, shape.kv_heads, shape.mlp, shape.vocab_size))))
