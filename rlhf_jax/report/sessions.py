"""Notes how a run was started and with what: `WORKDIR/sessions.json`.

A run has one session, and one more for each time that it was resumed.
"""

from collections.abc import Mapping
import datetime
import importlib.metadata
import logging
import os
from pathlib import Path
import platform
import shlex
import sys
from typing import Any

import jax

import rlhf_jax
from rlhf_jax import fingerprints, plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.report import run_files

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tokenizers')
MAX_SESSIONS = 20  # the last ones are kept


def note_session(workdir: str | os.PathLike, usual: Mapping[str, Any]) -> None:
  """Adds this process to the sessions of a run; if that fails, it is a warning.

  Args:
    workdir: of the run.
    usual: the config with all its defaults, with which the report compares the
      run's.
  """
  path = Path(workdir) / run_files.SESSIONS
  try:
    earlier = fingerprints.read_json(path).get('sessions', []) if path.is_file() else []
    sessions = [*earlier, _describe_session()][-MAX_SESSIONS:]
    fingerprints.write_json(path, {'defaults': usual, 'sessions': sessions})
  except (OSError, UserError) as error:
    logging.warning('%s: not written: %s', path, plain_text.describe_error(error))


def _describe_session() -> dict[str, Any]:
  """Describes this process: its command, versions and devices."""
  devices = jax.devices()
  versions = {'rlhf_jax': rlhf_jax.__version__, 'python': platform.python_version()}
  for name in PACKAGES:  # what decides the numbers of a run
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
    'command': _command(),
    'versions': versions,
    'devices': f'{len(devices)} × {devices[0].device_kind}',
    # Of all processes, as `devices` is.
    'processes': jax.process_count(),
    'system': platform.platform(),
  }


def _command() -> str:
  """Returns the command of this process as a shell takes it."""
  program = Path(sys.argv[0])
  # argv[0] of `python -m` is the path of the module.
  if program.name == '__main__.py' and program.parent.name == 'rlhf_jax':
    return shlex.join(['python', '-m', 'rlhf_jax', *sys.argv[1:]])
  return shlex.join([program.name, *sys.argv[1:]])
