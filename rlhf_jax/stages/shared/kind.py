"""Defines what a stage registers: all that config, pipeline and planner know of it."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.data.sources import DataOptions
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.stages.shared.context import Context


@dataclasses.dataclass(frozen=True)
class DataUse:
  """Data that a stage reads, so that they can be checked before any stage runs.

  Attributes:
    field: the field of the section that says which data.
    options: its value.
    kind: the kind of records, a key of records.RECORD_TYPES.
    encode: (records, overlong) → the examples of data/encode.py, of those that fit.
    overlong: what the stage does with records that do not fit.
    splits: the splits that are read.
  """

  field: str
  options: DataOptions
  kind: str
  encode: Callable[[Sequence[Any], str], Sequence[dict[str, Any]]]
  overlong: str = 'drop'
  splits: tuple[str, ...] = ('train', 'validation')


def _use_no_data(options: Any, tokenizer: Any) -> list[DataUse]:
  """Is `StageKind.data` of a stage that does not say which data it reads."""
  return []


def _check_nothing(context: Context) -> None:
  """Is `StageKind.check` of a stage without further checks."""


@dataclasses.dataclass(frozen=True)
class StageKind:
  """One kind of stage, as it registers itself.

  Attributes:
    options: the frozen dataclass of its section; the defaults of its fields are the
      config's.
    run: runs the stage in its context; what it leaves is in the stage's folder.
    plan: says what the stage compiles and keeps on the devices, without reading
      anything.
    tiny: changes of the section that make the stage take seconds, as nested dicts.
      `FILE:tiny` applies them to an experiment whose `get_config` has no `tiny` of
      its own.
    choices: fields that choose something with settings of its own. For each field,
      the settings class of every choice; the chosen one's fields become keys of the
      section, so that a loss brings its own settings and those of another loss are
      refused.
    data: (options, tokenizer) → the data that the stage reads.
    files: the names of the data files that it leaves in its folder, for later stages.
    check: checks what neither `plan` nor `data` covers, such as rewards and
      judges, on an abstract layout and before any stage runs; raises UserError.
  """

  options: type  # a frozen dataclass
  run: Callable[[Context], None]  # leaves its results in the folder of the stage
  plan: Callable[[Context], StagePlan]  # on an abstract layout: nothing is computed
  tiny: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  choices: Mapping[str, Mapping[str, type]] = dataclasses.field(default_factory=dict)
  data: Callable[[Any, Any], list[DataUse]] = _use_no_data
  files: tuple[str, ...] = ()
  check: Callable[[Context], None] = _check_nothing


# The loop of every tiny form; it evaluates and saves in the middle and at the end.
TINY_LOOP = {'steps': 4, 'eval_every': 2, 'save_every': 2, 'log_every': 1}
