"""Finds models by name, wherever they are stored.

A name is a stage of this run, a stage of another run (WORKDIR/STAGE or WORKDIR:STAGE,
with @STEP behind it for one of its checkpoints), a Hugging Face directory, a directory
of PEFT adapters, one of these two on the hub ('ORG/NAME') or by URL, a `.gguf` file or
'smollm2'. A model's shape is known at once; its parameters are read when they are asked
for.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from flax import traverse_util
import jax

from rlhf_jax import fingerprints, hub
from rlhf_jax.errors import UserError
from rlhf_jax.interop import peft_io, pretrained, safetensors_io
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import lora
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import checkpoint
from rlhf_jax.types import Params

# In a stage's folder: the shape of its model, and the base of its adapters.
MODEL_JSON = 'model.json'
# In a stage's folder once it is done: its seconds, and the checkpoint that it ended with.
FINISHED = 'finished.json'


@dataclasses.dataclass(frozen=True)
class ModelSource:
  """A stored model, of which only the shape was read.

  Attributes:
    config: the shape of the model.
    load: (shapes, shardings) → the stored parameters. Both trees may have more
      leaves than the source. For a model with a base it loads the adapters only.
    tokenizer: () → its own tokenizer; None where it has none.
    name: a name by which it is found from any folder.
    base: the model that its adapters stand on; None where it is complete.
  """

  config: ModelConfig
  load: Callable[[Any, Any], Params]
  tokenizer: Callable[[], Tokenizer | None]
  name: str
  base: 'ModelSource | None' = None


def find_model(
  name: str,
  workdir: str | os.PathLike | None = None,
  stages: Sequence[str] = (),
) -> ModelSource:
  """Finds a model by its name.

  Args:
    name: a stage, a folder, a file or 'smollm2', as the head of this file lists them.
    workdir: the folder of the run, for names of its stages.
    stages: the names of the run's stages.

  Returns:
    Its source. No parameters are read yet.

  Raises:
    UserError: nothing has this name, or it cannot be read.
  """
  name = _with_slash(name)
  folder = Path(name)
  if name in stages and workdir is not None:
    folder = Path(workdir) / name
  if (folder / MODEL_JSON).is_file():
    return _stage_source(folder)
  stage, _, step = name.rpartition('@')
  if step.isdecimal() and (Path(stage) / MODEL_JSON).is_file():
    return _stage_source(Path(stage), int(step))
  if name in stages:
    raise UserError(f'{folder} holds no model yet; is {name!r} an earlier stage that trains one?')
  _check_stage_of_run(folder)
  local_name = hub.find_model_folder(name)
  source = _foreign_source(local_name)
  return source if local_name == name else dataclasses.replace(source, name=name)


def _with_slash(name: str) -> str:
  """Returns WORKDIR/STAGE for WORKDIR:STAGE; other names as they are."""
  workdir, colon, stage = name.rpartition(':')
  if colon and not Path(name).exists() and _is_workdir(Path(workdir)):
    return f'{workdir}/{stage}'
  return name


def _is_workdir(folder: Path) -> bool:
  return (folder / 'started.json').is_file()


def _check_stage_of_run(folder: Path) -> None:
  """Raises UserError for the workdir of a run, and for what is no stage of it that has a model."""
  run = folder if _is_workdir(folder) else folder.parent
  if not _is_workdir(run) or (folder != run and (folder / 'config.json').is_file()):
    return
  names = sorted(path.parent.name for path in run.glob(f'*/{MODEL_JSON}'))
  found = ', '.join(str(run / name) for name in names) or 'none yet'
  what = 'is the folder of a whole run' if folder == run else 'holds no model'
  raise UserError(f'{folder}: {what}; the stages with a model are {found}')


def check_weights(name: str) -> None:
  """Raises UserError if a Hugging Face directory has no weights that can be read."""
  folder = Path(name)
  if _is_workdir(folder) or (folder / MODEL_JSON).is_file():
    return
  if (folder / 'config.json').is_file():
    safetensors_io.open_weights(folder)  # reads their list only


def _foreign_source(name: str) -> ModelSource:
  """Returns a model that no stage has made: a directory, a file or 'smollm2'."""
  folder = Path(name)
  if (folder / peft_io.CONFIG).is_file():
    return _adapter_source(folder)
  # A stage reads with the run's tokenizer, so a directory may come without its own;
  # open_pretrained, for all other names, needs one.
  if (folder / 'config.json').is_file() and not (folder / 'tokenizer.json').is_file():
    return _bare_source(folder)
  return _pretrained_source(name)


def adapter_base_name(name: str, workdir: Path, stages: Sequence[str]) -> str:
  """Returns the base of a model's adapters as model.json names it.

  A base beside the stage's folder is named relative to it, so that a workdir can be
  moved.
  """
  source = find_model(name, workdir, stages)
  base = source.base if source.base is not None else source
  is_neighbour = os.path.dirname(base.name) == os.path.abspath(workdir)
  return f'../{os.path.basename(base.name)}' if is_neighbour else base.name


def _stage_source(folder: Path, step: int | None = None) -> ModelSource:
  """Returns the model of a stage's folder: of a finished stage its last checkpoint and no other.

  Of a stage that is still training the newest good checkpoint is read.

  Args:
    folder: of the stage.
    step: of a checkpoint that is read instead.
  """
  kept = folder / 'checkpoints'
  if step is not None and not (kept / str(step)).is_dir():
    steps = sorted(int(path.name) for path in kept.glob('*') if path.name.isdecimal())
    known = ', '.join(map(str, steps)) or 'none'
    raise UserError(f'{folder}@{step}: no such checkpoint; kept are {known} (loop.keep)')
  values = fingerprints.read_json(folder / MODEL_JSON)
  base_name = values.pop('base_model', '')
  base = None
  if base_name:
    # '../NAME' is a stage beside this one, see adapter_base_name.
    is_neighbour = base_name.startswith('..')
    base = find_model(str(folder / base_name) if is_neighbour else base_name)

  def load(shapes: Any, shardings: Any) -> Params:
    # Of a model with adapters the checkpoint holds no base: it is read from its own
    # source.
    return _restore(folder, shapes, shardings, base is not None, step)

  def load_tokenizer() -> Tokenizer | None:
    directory = folder.parent / 'tokenizer'  # one for all stages of a run
    return Tokenizer.load(directory) if directory.is_dir() else None

  return ModelSource(
    config=_shape_of(values, folder / MODEL_JSON),
    load=load,
    tokenizer=load_tokenizer,
    name=os.path.abspath(folder),
    base=base,
  )


def _shape_of(values: dict[str, Any], path: Path) -> ModelConfig:
  """Returns the shape that a model.json holds."""
  try:
    return ModelConfig(**values)
  except TypeError as error:  # keys of another version
    raise UserError(f'{path}: not a shape of this version ({error})') from None


def _restore(
  folder: Path, shapes: Any, shardings: Any, adapters_only: bool, step: int | None
) -> Params:
  """Restores a stage's parameters with the given shapes and shardings."""

  def abstract(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

  leaves = traverse_util.flatten_dict(jax.tree.map(abstract, shapes, shardings))
  if adapters_only:
    leaves = {path: leaf for path, leaf in leaves.items() if lora.is_adapter(path)}
  finished = folder / FINISHED
  expected = fingerprints.read_json(finished)['checkpoint'] if finished.is_file() else None
  if step is not None:
    expected = {'step': step}  # whatever its fingerprint; its arrays' own are checked
  return checkpoint.restore_params(
    folder / 'checkpoints', traverse_util.unflatten_dict(leaves), expected
  )


def _adapter_source(folder: Path) -> ModelSource:
  """Returns a directory of PEFT adapters, on the base that its configuration names."""
  base = find_model(peft_io.base_model_of(folder))
  config = peft_io.adapter_model_config(folder, base.config)

  def load(shapes: Any, shardings: Any) -> Params:
    del shapes  # known from the configuration
    return peft_io.load_adapters(folder, config, shardings)

  tokenizer = base.tokenizer  # where the adapters bring none of their own
  if (folder / 'tokenizer.json').is_file():
    tokenizer = functools.partial(_load_adapter_tokenizer, folder, base)
  return ModelSource(
    config=config,
    load=load,
    tokenizer=tokenizer,
    name=os.path.abspath(folder),
    base=base,
  )


def _load_adapter_tokenizer(folder: Path, base: ModelSource) -> Tokenizer:
  """Loads the tokenizer beside adapters; the ends of sequence stand beside their base, mostly."""
  tokenizer = Tokenizer.load(folder)
  base_tokenizer = base.tokenizer()
  if tokenizer.end_ids or base_tokenizer is None:
    return tokenizer
  if tokenizer.find_difference(base_tokenizer) is not None:
    return tokenizer
  return tokenizer.with_end_ids(base_tokenizer.end_ids)


def _bare_source(folder: Path) -> ModelSource:
  """Returns a Hugging Face directory that brings no tokenizer."""
  config = pretrained.read_config(folder)

  def load(shapes: Any, shardings: Any) -> Params:
    del shapes  # known from config.json
    return pretrained.load_parameters(folder, config, shardings)

  return ModelSource(
    config=config,
    load=load,
    tokenizer=_no_tokenizer,
    name=os.path.abspath(folder),
  )


def _no_tokenizer() -> None:
  return None


def _pretrained_source(name: str) -> ModelSource:
  """Returns a Hugging Face directory, a `.gguf` file or SmolLM2."""
  model = pretrained.open_pretrained(name)
  full_name = os.path.abspath(name)
  if name == pretrained.SMOLLM2:
    full_name = name  # comes with a package, so it has no path to keep

  def load(shapes: Any, shardings: Any) -> Params:
    del shapes  # known from the file
    return model.load(shardings)

  return ModelSource(
    config=model.config,
    load=load,
    tokenizer=lambda: model.tokenizer,
    name=full_name,
  )
