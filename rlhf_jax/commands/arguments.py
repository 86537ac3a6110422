"""What the commands share: parsing words, and turning errors into messages and exit codes.

Nothing here imports JAX, so that `--help` and a mistyped word are answered at once. A
command imports what it needs after its words are parsed.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
import sys

from rlhf_jax.errors import UserError

DONE = 0  # exit code of a command that did all its work
MISTAKE = 2  # exit code for a user's mistake, as argparse has it
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it

_OVERRIDE = '--config.'
_MODEL_HELP = (
  "a Hugging Face directory, a stage's folder in a workdir, a directory of PEFT adapters, "
  "a .gguf file, or 'smollm2'"
)


def make_parser(command: str, description: str, epilog: str = '') -> argparse.ArgumentParser:
  """Returns the parser of a command.

  Args:
    command: the module that `python -m` runs.
    description: the head of the help text, printed as it is.
    epilog: its end.
  """
  return argparse.ArgumentParser(
    prog=f'python -m {command}',
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,  # a shortened flag could be an override's beginning
  )


def add_config_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --config, the experiment."""
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE',
    help='the experiment; FILE:tiny is its smallest form, for a first try',
  )


def parse_with_overrides(
  parser: argparse.ArgumentParser,
  words: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[str]]:
  """Parses words among which there may be overrides of the config.

  Args:
    parser: the command's.
    words: as on the command line; None for those of this process.

  Returns:
    (options, overrides without their beginning: 'section.key=value').

  Raises:
    SystemExit: a word is neither a flag nor an override.
  """
  # argparse cannot know the overrides: their names come from the experiment's file
  options, rest = parser.parse_known_args(words)
  for word in rest:
    if not word.startswith(_OVERRIDE):
      parser.error(f'unknown argument {word}; overrides look like --config.section.key=value')
  return options, [word.removeprefix(_OVERRIDE) for word in rest]


def add_line_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds what the commands for files of lines share: model, files, batches and mesh."""
  parser.add_argument('--model', required=True, metavar='DIR', help=_MODEL_HELP)
  parser.add_argument(
    '--input',
    required=True,
    metavar='FILE',
    type=Path,
    help='JSON Lines; compressed if the name ends in .gz',
  )
  parser.add_argument(
    '--output',
    required=True,
    metavar='FILE',
    type=Path,
    help='the same lines with the results added; repeat the command to resume after a cut',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    default=32,
    metavar='N',
    help='lines computed at once, over all devices (default: %(default)s)',
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    # model_config.DTYPES, which cannot be imported here without JAX; a test compares
    # them
    choices=('float32', 'bfloat16', 'float16'),
    help='the dtype to compute in (default: %(default)s)',
  )
  parser.add_argument(
    '--mesh',
    default='',
    metavar='AXIS=N,…',
    help='devices along the axes data, fsdp, expert, context and tensor (default: all along data)',
  )


def run_command(
  command: Callable[[argparse.Namespace], None],
  options: argparse.Namespace,
) -> int:
  """Runs a command that can be resumed, and returns its exit code.

  Args:
    command: does the work.
    options: its parsed words.

  Returns:
    DONE, MISTAKE or INTERRUPTED.
  """
  try:
    command(options)
  except UserError as error:
    return report_mistake(error)
  except KeyboardInterrupt:
    print('\nrlhf_jax: interrupted; repeat the command to go on', file=sys.stderr)
    return INTERRUPTED
  return DONE


def report_mistake(error: UserError) -> int:
  """Prints a user's mistake as one line, and returns the exit code for it."""
  # one line and no traceback, as the message names the place and what was expected
  print(f'rlhf_jax: error: {error}', file=sys.stderr)
  return MISTAKE
