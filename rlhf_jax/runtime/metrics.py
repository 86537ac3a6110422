"""Writes what a run measures: metrics.jsonl, samples.jsonl, TensorBoard and Weights & Biases.

Each line is one JSON object. A run that resumes at step n first drops the lines
of later steps, so that the files of an interrupted run equal those of an
uninterrupted one, except for the fields `time/…`. Only process 0 writes.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from rlhf_jax import files, json_lines
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts

METRICS = 'metrics.jsonl'  # a line for each step that is logged or evaluated
SAMPLES = 'samples.jsonl'  # a line for each sample of an evaluation


@dataclasses.dataclass(frozen=True)
class RunDescription:
  """How trackers call a run of a stage.

  Attributes:
    name: such as quickstart/ppo.
    group: of the stages of one run, such as quickstart.
    identity: where the run is kept; a resumed run, which has the same, goes on in the
      same curves.
    config: the sections that the stage reads.
  """

  name: str = ''
  group: str = ''
  identity: str = ''
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Writer:
  """Appends metrics and samples to the files of a directory; a context manager.

  On every process but the first it does nothing.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    tensorboard: bool = True,
    wandb_project: str = '',
    resume_step: int = 0,
    described: RunDescription = RunDescription(),
  ):
    """Opens the files.

    Args:
      directory: where the files are; it is created if it is missing.
      tensorboard: whether to write TensorBoard events too.
      wandb_project: a Weights & Biases project to log to; '' = none.
      resume_step: lines that an earlier run wrote after this step are dropped.
      described: how trackers call the run.

    Raises:
      UserError: a file cannot be written, or Weights & Biases is not installed.
    """
    self._files: dict[str, TextIO] = {}
    self._events: Any = None
    self._wandb: Any = None
    if not hosts.is_first_process():
      return
    directory = Path(directory).absolute()
    if wandb_project:
      self._wandb = _start_wandb(wandb_project, directory, described)
    try:
      directory.mkdir(parents=True, exist_ok=True)
      for name in (METRICS, SAMPLES):
        self._files[name] = _open_for_append(directory / name, resume_step)
    except OSError as error:
      raise UserError(f'{directory}: cannot write metrics: {error}') from error
    if tensorboard:
      from rlhf_jax.runtime import event_file  # tensorboardX takes a moment to import

      self._events = event_file.EventFile(directory, purge_step=resume_step + 1)
      if described.config:
        text = json.dumps(described.config, indent=2, default=list)
        # Four blanks make it a block of code in Markdown.
        self._events.write_text(0, 'config', '    ' + text.replace('\n', '\n    '))

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """Writes one line {step, name: value…}; a value that is not finite becomes null.

    Args:
      step: the number of updates made.
      values: the metrics by name.

    Raises:
      UserError: the line cannot be written.
    """
    if not self._files:
      return
    # JSON has no NaN, and plots are better without it.
    finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    self._append(METRICS, {'step': step, **{name: finite.get(name) for name in values}})
    if self._events:
      self._events.write_scalars(step, finite)
    if self._wandb:
      self._wandb.log(finite, step=step)

  def samples(self, step: int, samples: list[dict]) -> None:
    """Writes one line {step, …} for every sample.

    Args:
      step: the number of updates made.
      samples: JSON objects.

    Raises:
      UserError: a line cannot be written.
    """
    if not self._files:
      return
    for sample in samples:
      self._append(SAMPLES, {'step': step, **sample})
    if not samples:
      return
    columns = list(samples[0])
    rows = [[sample.get(column) for column in columns] for sample in samples]
    if self._events:
      self._events.write_text(step, 'samples', _as_markdown(columns, rows))
    if self._wandb:
      import wandb

      table = wandb.Table(columns=columns, data=rows)
      self._wandb.log({'samples': table}, step=step)

  def flush(self) -> None:
    """Waits until all lines are on disk.

    Raises:
      UserError: they cannot be written.
    """
    for file in self._files.values():
      try:
        os.fsync(file.fileno())
      except OSError as error:
        raise UserError(f'{file.name}: cannot write: {error.strerror}') from error

  def close(self) -> None:
    """Closes the files."""
    for file in [*self._files.values(), self._events]:
      with contextlib.suppress(OSError):  # a full disk was reported by the write that failed
        if file:
          file.close()
    if self._wandb:
      self._wandb.finish()

  def __enter__(self) -> 'Writer':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()

  def _append(self, name: str, value: dict) -> None:
    """Appends a line, which other programs can read as soon as this returns."""
    file = self._files[name]
    try:
      file.write(json_lines.format_value(value) + '\n')
      file.flush()
    except OSError as error:
      raise UserError(f'{file.name}: cannot write: {error.strerror}') from error


def _as_markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Returns a table in Markdown."""
  lines = [list(columns), ['---'] * len(columns), *rows]
  cells = [[str(cell).replace('|', '\\|').replace('\n', '<br>') for cell in line] for line in lines]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)


def _start_wandb(project: str, directory: Path, described: RunDescription) -> Any:
  """Starts or resumes the Weights & Biases run of a directory."""
  try:
    import wandb
  except ImportError:
    raise UserError(
      f'wandb_project={project}: wandb is not installed, run: pip install wandb'
    ) from None
  # The id is the same after a resume, so that W&B continues the same curves.
  identity = described.identity or str(directory)
  return wandb.init(
    project=project,
    name=described.name or None,
    group=described.group or None,
    config=dict(described.config),
    dir=str(directory),
    id=hashlib.sha256(identity.encode()).hexdigest()[:16],
    resume='allow',
  )


def _open_for_append(path: Path, last_step: int) -> TextIO:
  """Drops the lines of a file that are from steps after `last_step`, and opens it."""
  if path.exists():
    _drop_later_lines(path, last_step)
  return path.open('a', encoding='utf-8')


def _drop_later_lines(path: Path, last_step: int) -> None:
  """Drops lines of steps after `last_step`, and a line that a killed run left incomplete."""
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    with contextlib.suppress(ValueError, KeyError, TypeError):
      # A line without its end would run into the next one, even if it can be
      # parsed.
      if line.endswith(b'\n') and json.loads(line)['step'] <= last_step:
        kept.append(line)
  with files.replacing(path) as temporary:
    temporary.write_bytes(b''.join(kept))
