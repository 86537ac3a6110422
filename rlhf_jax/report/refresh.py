"""Writes `WORKDIR/report.html`, at the end of a run and while it goes on; never stops it."""

from collections.abc import Mapping
import logging
import os
from pathlib import Path
import time
from typing import Any

from rlhf_jax import files, plain_text
from rlhf_jax.report import page, run_files
from rlhf_jax.runtime import hosts

PAGE = 'report.html'
LEAST_RATIO = 50  # seconds of training for each second of writing: 2%


def write(workdir: str | os.PathLike, results: Mapping[str, Any] | None = None) -> bool:
  """Writes the report of a run; whatever goes wrong is a warning, as training must go on.

  Args:
    workdir: of the run; without a config.json in it, nothing is written.
    results: of a run that is about to write results.json; None to read them.

  Returns:
    Whether it was written.
  """
  workdir = Path(workdir)
  if not (workdir / 'config.json').is_file():
    return False
  try:
    text = page.render_run(run_files.read_run(workdir, results))
    files.write_text(workdir / PAGE, text)
  except Exception as error:  # of any kind: a report is not worth a run
    logging.warning('%s: not written: %s', PAGE, plain_text.describe_error(error))
    return False
  return True


class Refresher:
  """Writes the report again and again, as often as a small share of the time allows."""

  def __init__(self, workdir: str | os.PathLike):
    self._workdir = workdir
    self._next = 0.0  # monotonic time

  def refresh(self) -> None:
    """Writes the report, unless that was done too shortly before; on process 0 only."""
    began = time.monotonic()
    # The others would write the same file.
    if not hosts.is_first_process() or began < self._next:
      return
    write(self._workdir)
    ended = time.monotonic()
    self._next = ended + LEAST_RATIO * (ended - began)
