"""Runs on disks that become full at one moment or another, and goes on when there is room."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import random
import subprocess
import sys

from breaking.cases import Case

SECONDS = 600  # for a run, on a busy machine
STEPS = 2


def fill_disks(base: Path, count: int) -> Iterator[tuple[Case, tuple[str, str]]]:
  """Runs the small experiment on disks of many sizes; each again after the disk has grown.

  Args:
    base: holds small.py and the workdir of a run without trouble.
    count: sizes, from almost nothing to almost enough.

  Yields:
    (case, (verdict, what the user saw)), as each is known; none where nothing may be mounted.
  """
  needed = sum(path.stat().st_size for path in (base / 'run').rglob('*') if path.is_file())
  whole = int(needed * 1.8)  # a tmpfs gives whole pages
  # In no order, so that what is broken off has tried small ones and large ones.
  for number in random.Random(0).sample(range(count), count):
    size = max(8192, whole * number // count)
    case = Case('full disk', f'{size // 1024} KiB', _nothing)
    try:
      with _small_disk(base / f'disk-{number}', size) as folder:
        result = _fill(base, folder)
    except (OSError, subprocess.CalledProcessError) as error:
      print(f'full disk: not tried: {error}', file=sys.stderr)
      return
    yield case, result


def _nothing(folder: Path) -> None:
  del folder


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[Path]:
  """Mounts a file system of a size in memory."""
  folder.mkdir(exist_ok=True)
  subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', folder], check=True)
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', folder], check=True)


def _fill(base: Path, folder: Path) -> tuple[str, str]:
  """Runs until the disk is full, then again with room; returns verdict and what was said."""
  code, said = _run(base, folder / 'run')
  left = [path.name for path in folder.rglob('*') if '.part' in path.name and path.is_file()]
  if code is None:
    return 'hang', said
  lines = [line for line in said.splitlines() if ': error: ' in line or 'this is a bug' in line]
  if code not in (0, 2) or 'Traceback' in said:
    return 'traceback', lines[-1] if lines else said[-300:]
  if code == 2 and (len(lines) != 1 or 'space' not in lines[0]):
    return 'vague', lines[-1] if lines else said[-300:]
  if left:
    return 'accepted', f'left {left}'
  subprocess.run(['mount', '-o', 'remount,size=256m', folder], check=True)
  again, said = _run(base, folder / 'run')
  if again != 0:
    return ('hang' if again is None else 'traceback'), f'again: {said[-300:]}'
  name = 'sft/export/model.safetensors'
  if (folder / 'run' / name).read_bytes() != (base / 'run' / name).read_bytes():
    return 'accepted', 'the run that went on ended with another model'
  return ('clear' if code else 'read'), lines[-1] if lines else ''


def _run(base: Path, workdir: Path) -> tuple[int | None, str]:
  """Runs the small experiment; the exit code is None where it hangs."""
  command = [sys.executable, '-m', 'rlhf_jax', f'--config={base}/small.py', f'--workdir={workdir}']
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
  except subprocess.TimeoutExpired:
    return None, f'more than {SECONDS} s'
  return done.returncode, done.stderr
