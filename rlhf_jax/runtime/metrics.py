"""Writes what a run measures: metrics.jsonl and samples.jsonl, TensorBoard, and Weights & Biases where asked.

One JSON object a line. A run that resumes at step n first drops what later steps wrote, so that the files of a cut
run equal those of a run left alone, up to the fields `time/…`. Only process 0 writes.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import jax

from rlhf_jax.errors import UserError

FILES = ('metrics.jsonl', 'samples.jsonl')


class Writer:
  """Appends to the files in `directory` from step `resume_step` on; a context manager.

  Raises UserError where a file cannot be written, and where W&B is asked for (`wandb_project`) and not installed.
  """

  def __init__(self, directory, tensorboard: bool = True, wandb_project: str = '', resume_step: int = 0):
    self._files, self._board, self._wandb = [], None, None
    if jax.process_index() > 0:
      return
    directory = Path(directory).absolute()
    if wandb_project:
      try:
        import wandb
      except ImportError:
        raise UserError(f'wandb_project={wandb_project}: wandb is not installed, run: pip install wandb') from None
      run_id = hashlib.sha256(str(directory).encode()).hexdigest()[:16]  # the same after a resume
      self._wandb = wandb.init(project=wandb_project, dir=str(directory), id=run_id, resume='allow')
    try:
      directory.mkdir(parents=True, exist_ok=True)
      for name in FILES:
        _drop_after(directory / name, resume_step)
        self._files.append((directory / name).open('a', encoding='utf-8', errors='replace'))
    except OSError as error:
      raise UserError(f'{directory}: cannot write metrics: {error}') from error
    if tensorboard:
      import tensorboardX
      self._board = tensorboardX.SummaryWriter(str(directory), purge_step=resume_step + 1)

  def metrics(self, step: int, values: dict[str, float]) -> None:
    """One line {step, name: value…}; what is not finite becomes null."""
    if not self._files:
      return
    finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
    self._line(0, {'step': step, **{name: finite.get(name) for name in values}})
    if self._board:
      for name, value in finite.items():
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.log(finite, step=step)

  def samples(self, step: int, samples: list[dict]) -> None:
    """One line {step, …} for every sample."""
    if self._files:
      for sample in samples:
        self._line(1, {'step': step, **sample})

  def flush(self) -> None:
    """Returns when all lines are on disk."""
    for file in self._files:
      os.fsync(file.fileno())

  def close(self) -> None:
    for file in [*self._files, self._board]:
      with contextlib.suppress(OSError):  # a full disk was reported when it refused a line
        if file:
          file.close()
    if self._wandb:
      self._wandb.finish()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def _line(self, which, value):
    file = self._files[which]
    try:
      file.write(json.dumps(value, ensure_ascii=False) + '\n')
      file.flush()
    except OSError as error:
      raise UserError(f'{file.name}: cannot write: {error.strerror}') from error


def _drop_after(path, step):
  """Keeps the lines up to `step`; a torn one goes too."""
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      if line.endswith(b'\n') and json.loads(line)['step'] <= step:
        kept.append(line)
    except (ValueError, KeyError, TypeError):
      pass
  temporary = path.with_suffix('.tmp')
  temporary.write_bytes(b''.join(kept))
  os.replace(temporary, path)
