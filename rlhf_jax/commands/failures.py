"""Turns whatever ends a command into one line for the user and an exit code.

Nothing here imports JAX, so that a mistake in the arguments is answered at once.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import errno
import os
from pathlib import Path
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from typing import Any

from rlhf_jax import plain_text, text_table
from rlhf_jax.errors import UserError, UserErrors

DONE = 0  # exit code of a command that did all its work
MISTAKE = 2  # exit code for what the user can mend, as argparse has it
BUG = 70  # exit code for a mistake of this package, EX_SOFTWARE of sysexits.h
SIGNALLED = 128  # plus the number of the signal, as shells have it

_SOON = 0.01  # seconds until a signal that was lost is sent again
_LONGEST = 1200  # characters of a message
_OUT_OF_MEMORY = ('RESOURCE_EXHAUSTED', 'Out of memory', 'out of memory')


class Stopped(KeyboardInterrupt):
  """A signal that is to end the command; what was being done is left as it is."""

  def __init__(self, signum: int):
    super().__init__()
    self.signum = signum


def run(work: Callable[[], int | None], folder: str | os.PathLike | None = None) -> int:
  """Runs the work of a command, and returns its exit code.

  Args:
    work: returns an exit code, or None for DONE.
    folder: where the traceback of an unexpected error is kept; None for the folder of temporary
      files.

  Returns:
    The exit code. What the user should know has been printed.
  """
  with raising_signals():
    try:
      return work() or DONE
    except UserError as error:
      return report_mistake(error)
    except KeyboardInterrupt as stop:
      return _report_stop(getattr(stop, 'signum', signal.SIGINT))
    except SystemExit as stop:
      if hasattr(stop, 'signum'):  # loop.Interrupted, which has said so
        return SIGNALLED + stop.signum
      what = f'something that the config names called sys.exit({stop.code!r})'
      return report_mistake(UserError(f'{what}; expected functions that return or raise'))
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush
      return SIGNALLED + signal.SIGPIPE
    except OSError as error:  # a full disk, rights, a folder that is gone
      return report_mistake(UserError(describe_os_error(error, folder)))
    except MemoryError:
      return report_mistake(UserError('out of memory: use smaller batches or a smaller model'))
    except Exception as error:  # whatever nobody expected
      if any(words in str(error) for words in _OUT_OF_MEMORY):
        details = plain_text.describe_error(error, 160)
        message = f'out of memory: use smaller batches, or more microbatches ({details})'
        return report_mistake(UserError(message))
      return report_bug(error, folder)


def report_mistake(error: UserError) -> int:
  """Prints a user's mistakes, each as one line, and returns the exit code for them."""
  # without a traceback, as the messages name the place and what was expected
  messages = error.messages if isinstance(error, UserErrors) else [str(error)]
  for message in messages:
    _print(f'rlhf_jax: error: {plain_text.one_line(message, _LONGEST)}')
  return MISTAKE


def report_bug(error: BaseException, folder: str | os.PathLike | None) -> int:
  """Keeps the traceback of an unexpected error in a file, says so, and returns the exit code."""
  text = ''.join(traceback.format_exception(error))
  kept = _keep_traceback(plain_text.visible(text), folder)
  where = f'please report it with {kept}' if kept else text
  _print(f'rlhf_jax: this is a bug: {plain_text.describe_error(error)}; {where}')
  return BUG


def describe_os_error(error: OSError, folder: str | os.PathLike | None = None) -> str:
  """Returns what the operating system refused, and of which file, in one line.

  Args:
    error: it names a file, or none where a write failed.
    folder: the workdir, which is named if the file is not known; None without one.
  """
  if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
    # A folder that was not copied: [(source, target, reason), …].
    _, target, reason = error.args[0][0]
    return f'{target}: {reason}; repeat the command when that is mended'
  reason = error.strerror or str(error) or type(error).__name__
  names = [str(name) for name in (error.filename, error.filename2) if name is not None]
  place = f'{" → ".join(names)}: ' if names else ''
  if folder is not None and error.errno == errno.ENOSPC and not names:
    reason += f' (the workdir is {os.fspath(folder)})'
  return f'{place}{reason}; repeat the command when that is mended'


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
  """Makes Ctrl-C and SIGTERM raise Stopped; a second one ends the process at once.

  The training loop has handlers of its own meanwhile, as it saves a checkpoint
  first (runtime/loop.py).
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # Python handles signals in the main thread only
    return

  def stop(signum: int, _: Any) -> None:
    for number in before:
      signal.signal(number, signal.SIG_DFL)
    raise Stopped(signum)

  def stop_again(lost: Any) -> None:
    # What is raised while the garbage collector calls back is lost, as JAX has it call often.
    if not isinstance(lost.exc_value, Stopped):
      show_lost(lost)
      return
    signum = lost.exc_value.signum
    for number in before:
      signal.signal(number, stop)
    threading.Timer(_SOON, os.kill, (os.getpid(), signum)).start()

  before = {}
  for signum in (signal.SIGTERM, signal.SIGINT):
    # None is a handler that was not set in Python.
    before[signum] = signal.signal(signum, stop) or signal.SIG_DFL
  show_lost, sys.unraisablehook = sys.unraisablehook, stop_again
  try:
    yield
  finally:
    sys.unraisablehook = show_lost
    for number, handler in before.items():
      signal.signal(number, handler)


def _report_stop(signum: int) -> int:
  """Says that a signal ended the command, and returns the exit code."""
  name = signal.Signals(signum).name
  _print(
    f'rlhf_jax: interrupted by {name}: what was finished is kept; repeat the command to resume'
  )
  return SIGNALLED + signum


def _keep_traceback(text: str, folder: str | os.PathLike | None) -> Path | None:
  """Writes a traceback to a file of its own; None where no folder can be written."""
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  for place in (folder, tempfile.gettempdir()):
    if place is None or not os.path.isdir(place):
      continue
    with contextlib.suppress(OSError):
      path = Path(place) / f'bug-{now}-{os.getpid()}.txt'
      path.write_text(text, encoding='utf-8')
      return path
  return None


def _print(line: str) -> None:
  """Prints a line to stderr, which may be closed or full."""
  with contextlib.suppress(OSError, ValueError):
    print(text_table.fit_terminal(line, sys.stderr), file=sys.stderr, flush=True)
