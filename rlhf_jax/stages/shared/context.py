"""What every stage is handed."""

import dataclasses
from pathlib import Path
from typing import Any
import zlib

import jax
import ml_collections

from rlhf_jax import options as options_lib
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime.mesh import Layout


@dataclasses.dataclass(frozen=True)
class Context:
  """The surroundings of a stage.

  Attributes:
    config: the whole config of the experiment.
    name: the name of the stage's section in it.
    workdir: the folder in which the run keeps everything.
    layout: the device mesh and the rules that lay arrays on it.
    tokenizer: the tokenizer of the run.
  """

  config: ml_collections.ConfigDict
  name: str
  workdir: Path
  layout: Layout
  tokenizer: Tokenizer

  @property
  def section(self) -> ml_collections.ConfigDict:
    """The stage's part of the config."""
    return self.config[self.name]

  @property
  def where(self) -> str:
    """The section's name as error messages give it."""
    return f'config.{self.name}'

  @property
  def directory(self) -> Path:
    """The stage's folder."""
    return self.workdir / self.name

  def key(self) -> jax.Array:
    """Returns the stage's root key, made of the run's seed and the stage's name."""
    root = jax.random.key(self.config.seed)
    return jax.random.fold_in(root, zlib.crc32(self.name.encode()))

  def read_options(self, options_class: type, settings_class: type | None = None) -> Any:
    """Makes the typed options of the section; nothing below the stage reads the ConfigDict.

    Args:
      options_class: the stage's options.
      settings_class: the settings of what the section chose, such as a loss; they become the
        field `settings` of the options.
    """
    options = options_lib.from_section(options_class, self.section)
    if settings_class is None:
      return options
    settings = options_lib.from_section(settings_class, self.section)
    return dataclasses.replace(options, settings=settings)
