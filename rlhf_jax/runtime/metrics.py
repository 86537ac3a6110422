"""Writes what a run measures: metrics.jsonl, samples.jsonl, TensorBoard and Weights & Biases.

There is one JSON object a line. A run that resumes at step n first drops what later
steps wrote, so that the files of an interrupted run equal those of an uninterrupted
one, up to the fields `time/…`. Only process 0 writes.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from rlhf_jax import files, json_lines
from rlhf_jax.errors import UserError
from rlhf_jax.runtime import hosts

METRICS = 'metrics.jsonl'  # a line for each time that something was measured
SAMPLES = 'samples.jsonl'  # a line for each sample of an evaluation


class Writer:
  """Appends metrics and samples to the files of a directory; a context manager.

  On other processes than the first it does nothing.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    tensorboard: bool = True,
    wandb_project: str = '',
    resume_step: int = 0,
  ):
    """Opens the files.

    Args:
      directory: where the files are; it is made where it is missing.
      tensorboard: whether to write TensorBoard events too.
      wandb_project: a Weights & Biases project to log to; '' = none.
      resume_step: what steps after this one wrote before is dropped.

    Raises:
      UserError: a file cannot be written, or Weights & Biases is not installed.
    """
    self._files: dict[str, TextIO] = {}
    self._board: Any = None
    self._wandb: Any = None
    if not hosts.is_first_process():
      return
    directory = Path(directory).absolute()
    if wandb_project:
      self._wandb = _start_wandb(wandb_project, directory)
    try:
      directory.mkdir(parents=True, exist_ok=True)
      for name in (METRICS, SAMPLES):
        self._files[name] = _open_at(directory / name, resume_step)
    except OSError as error:
      raise UserError(f'{directory}: cannot write metrics: {error}') from error
    if tensorboard:
      import tensorboardX  # takes a moment

      self._board = tensorboardX.SummaryWriter(str(directory), purge_step=resume_step + 1)

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """Writes one line {step, name: value…}; a value that is not finite becomes null.

    Raises:
      UserError: the line cannot be written, as of the other method.
    """
    if not self._files:
      return
    # JSON has no NaN, and plots are better off without.
    finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    self._append(METRICS, {'step': step, **{name: finite.get(name) for name in values}})
    if self._board:
      for name, value in finite.items():
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(finite, step=step)

  def samples(self, step: int, samples: list[dict]) -> None:
    """Writes one line {step, …} for every sample."""
    if not self._files:
      return
    for sample in samples:
      self._append(SAMPLES, {'step': step, **sample})

  def flush(self) -> None:
    """Returns when all lines are on disk."""
    for file in self._files.values():
      os.fsync(file.fileno())

  def close(self) -> None:
    """Closes the files."""
    for file in [*self._files.values(), self._board]:
      with contextlib.suppress(OSError):  # a full disk was reported when it refused a line
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


def _start_wandb(project: str, directory: Path) -> Any:
  """Starts or resumes the Weights & Biases run of a directory."""
  try:
    import wandb
  except ImportError:
    raise UserError(
      f'wandb_project={project}: wandb is not installed, run: pip install wandb'
    ) from None
  # The same after a resume, so that W&B continues the same curves.
  run_id = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
  return wandb.init(project=project, dir=str(directory), id=run_id, resume='allow')


def _open_at(path: Path, step: int) -> TextIO:
  """Opens a file to append to it, after dropping the lines of steps after `step`."""
  if path.exists():
    _drop_after(path, step)
  return path.open('a', encoding='utf-8')


def _drop_after(path: Path, step: int) -> None:
  """Keeps the lines up to `step`; a line that a killed run left incomplete goes too."""
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    with contextlib.suppress(ValueError, KeyError, TypeError):
      # A line without its end would run into the next one, even if it can be
      # parsed.
      if line.endswith(b'\n') and json.loads(line)['step'] <= step:
        kept.append(line)
  with files.replacing(path) as temporary:
    temporary.write_bytes(b''.join(kept))
