"""Writes the report of one run or of several: `python -m rlhf_jax.report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys
import time

from rlhf_jax.commands import arguments, failures
from rlhf_jax.errors import UserError

_DESCRIPTION = """\
Writes the report of a run, finished or not, as one HTML file that needs nothing else.
Of several runs it is a comparison; those that differ in their seed only are averaged.

  python -m rlhf_jax.report runs/quickstart
  python -m rlhf_jax.report runs/seed0 runs/seed1 runs/other --output=comparison.html
  python -m rlhf_jax.report runs/quickstart --follow
"""
_EPILOG = """\
Each run also writes its own report, WORKDIR/report.html, at every evaluation and at its
end. Exit codes: 0 done, 2 a mistake in the arguments or a workdir, 130 interrupted.
"""
SECONDS = 5.0  # between two looks at the files of a run that is followed
PAGE = 'report.html'  # of one run, in its workdir
COMPARISON = Path('comparison.html')  # of several runs, in the current folder


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.report', _DESCRIPTION, _EPILOG)
  parser.add_argument(
    'workdirs',
    metavar='WORKDIR',
    nargs='+',
    help='folders of runs, or the URLs where they are kept',
  )
  parser.add_argument(
    '--output',
    metavar='FILE',
    type=Path,
    help=f'the page to write (default: {PAGE} in the workdir; of several runs {COMPARISON})',
  )
  parser.add_argument(
    '--follow',
    action='store_true',
    help='write the page again whenever a run has written something, until Ctrl-C; the page loads '
    'itself again',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(argv)  # --help exits here
  return failures.run(lambda: write_report(options))


def write_report(options: argparse.Namespace) -> None:
  """Writes the page, again and again with --follow.

  Raises:
    UserError: a workdir is no run's, or the page cannot be written.
  """
  from rlhf_jax import storage

  folders = _open_workdirs(options.workdirs)
  output = options.output
  if output is None:
    output = COMPARISON
    if len(folders) == 1:
      # The copy of a URL's workdir is not the user's to look into.
      is_here = storage.as_local_path(options.workdirs[0]) is not None
      output = folders[0] / PAGE if is_here else Path(PAGE)
  if output.is_dir():
    raise UserError(f'--output: expected a file, got the folder {str(output)!r}')
  _write_once(folders, output, options.follow)
  print(output)
  seen = _newest_change(folders)
  while options.follow:
    time.sleep(SECONDS)  # Ctrl-C ends it here
    folders = _open_workdirs(options.workdirs)
    changed = _newest_change(folders)
    if changed != seen:
      seen = changed
      _write_once(folders, output, is_followed=True)


def _open_workdirs(names: Sequence[str]) -> list[Path]:
  """Returns the folders of runs; what is kept behind a URL is copied to this machine first."""
  from rlhf_jax import storage

  folders = []
  for name in names:
    local = storage.as_local_path(name)
    if local is None:
      # Imported here, as a folder of this machine needs no JAX.
      from rlhf_jax.experiment import remote_workdir

      folders.append(remote_workdir.fetch(name, 'WORKDIR'))
    else:
      folders.append(Path(local))
  return folders


def _write_once(workdirs: Sequence[Path], output: Path, is_followed: bool) -> None:
  """Writes the page; the imports are here because they take a moment."""
  from rlhf_jax import files
  from rlhf_jax.report import page, run_files

  runs = [run_files.read_run(workdir) for workdir in workdirs]
  if len(runs) == 1:
    text = page.render_run(runs[0], is_followed)
  else:
    text = page.render_comparison(runs, is_followed)
  files.write_text(output, text)


def _newest_change(workdirs: Sequence[Path]) -> list[float]:
  """Returns when the files that the page shows were written last, for each run."""
  # Not report.html itself, which would be seen as a change.
  patterns = ('*.json', '*/metrics.jsonl', '*/finished.json', 'evaluation/*.jsonl')
  newest = []
  for workdir in workdirs:
    times = [path.stat().st_mtime for pattern in patterns for path in workdir.glob(pattern)]
    newest.append(max(times, default=0.0))
  return newest


if __name__ == '__main__':
  sys.exit(main())
