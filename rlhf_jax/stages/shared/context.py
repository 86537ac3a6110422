"""Defines the context of a stage: everything that it gets to run with."""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections

from rlhf_jax import options as options_lib
from rlhf_jax import random_keys
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import hosts
from rlhf_jax.runtime.mesh import Layout


class DescribesOptions(Protocol):
  """What `read_options` needs of a StageKind (kind.py, which imports this file)."""

  @property
  def options(self) -> type:
    """The options class of the stage's section."""

  @property
  def choices(self) -> Mapping[str, Mapping[str, type]]:
    """The settings class of every choice, by field."""


@dataclasses.dataclass(frozen=True)
class Context:
  """The context in which a stage runs.

  Attributes:
    config: the whole config of the experiment.
    name: the name of the stage's section in it.
    workdir: the folder in which the run keeps everything.
    layout: the device mesh and the rules that lay arrays on it.
    tokenizer: the tokenizer of the run.
    on_saved: called after each checkpoint, to upload the workdir; None where it is a folder.
    url: where the workdir is kept; '' where it is a folder.
    meet: waits for all processes, which can then read what the first one wrote to the
      workdir; its argument is a name for the place.
  """

  config: ml_collections.ConfigDict
  name: str
  workdir: Path
  layout: Layout
  tokenizer: Tokenizer
  on_saved: Callable[[], None] | None = None
  url: str = ''
  meet: Callable[[str], None] = hosts.barrier

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

  def key(self, purpose: str = '') -> jax.Array:
    """Returns the stage's root key, made of the run's seed and the stage's name.

    Args:
      purpose: if given, the key of this purpose, from the root key. The train state
        has the root key itself, of which updates and rollouts have purposes of theirs.
    """
    root = random_keys.for_purpose(jax.random.key(self.config.seed), self.name)
    return random_keys.for_purpose(root, purpose) if purpose else root

  def read_options(self, stage: DescribesOptions) -> Any:
    """Makes the typed options of the section.

    The rest of the stage reads these options only, never the ConfigDict.

    Args:
      stage: the kind of the stage. The settings of what the section chooses, such as
        a loss, become the field `settings` of the options.

    Returns:
      An instance of `stage.options`.
    """
    section = self.section
    options: Any = options_lib.from_section(stage.options, section)
    for field, settings_classes in stage.choices.items():
      settings: Any = options_lib.from_section(settings_classes[section[field]], section)
      options = dataclasses.replace(options, settings=settings)
    return options  # an instance of stage.options
