"""Shared by all commands: parsing arguments.

Nothing here imports JAX, so that `--help` and mistyped arguments are answered at
once. A command imports what it needs only after it has parsed its arguments.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path

import rlhf_jax
from rlhf_jax.commands import failures, host_memory

_OVERRIDE = '--config.'
# A copy of model_config.DTYPES, which cannot be imported without JAX; a test
# compares the two.
DTYPES = ('float32', 'bfloat16', 'float16')
_MODEL_HELP = (
  "a Hugging Face directory, a stage's folder in a workdir, a directory of PEFT adapters, "
  "a .gguf file, or 'smollm2'"
)


def make_parser(command: str, description: str, epilog: str = '') -> argparse.ArgumentParser:
  """Makes the parser of a command.

  Args:
    command: the module that `python -m` runs.
    description: the beginning of the help text, printed without reflowing it.
    epilog: the end of the help text.
  """
  parser = argparse.ArgumentParser(
    prog=f'python -m {command}',
    description=description,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,  # else an override could be taken for an abbreviated flag
  )
  parser.add_argument('--version', action='version', version=f'rlhf_jax {rlhf_jax.__version__}')
  return parser


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
  argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[str]]:
  """Parses arguments that may include overrides of the config.

  Args:
    parser: the command's.
    argv: the command-line arguments; None for those of this process.

  Returns:
    (the parsed arguments, the overrides as 'section.key=value').

  Raises:
    SystemExit: an argument is neither a flag nor an override.
  """
  # argparse cannot know the overrides, as their names depend on the experiment's file
  options, rest = parser.parse_known_args(argv)
  for argument in rest:
    if not argument.startswith(_OVERRIDE):
      parser.error(f'unknown argument {argument}; overrides look like --config.section.key=value')
  return options, [argument.removeprefix(_OVERRIDE) for argument in rest]


def plain_file(name: str) -> Path:
  """Returns the path of an output that is written line by line.

  Raises:
    argparse.ArgumentTypeError: the name promises a compressed file, to which nothing can be
      added after an interrupt, or is that of a folder.
  """
  if name.endswith('.gz'):
    raise argparse.ArgumentTypeError(
      f'expected a name without .gz, got {name}: it is not compressed'
    )
  if not Path(name).name or Path(name).is_dir():
    raise argparse.ArgumentTypeError(f'expected a file, got the folder {name!r}')
  return Path(name)


def add_line_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that `generate` and `score` share: model, files, batch size and mesh."""
  parser.add_argument('--model', required=True, metavar='DIR', help=_MODEL_HELP)
  parser.add_argument(
    '--input',
    required=True,
    metavar='FILE',
    type=Path,
    help='JSON Lines (may be compressed by gzip), a JSON array, Parquet or Arrow',
  )
  parser.add_argument(
    '--output',
    required=True,
    metavar='FILE',
    type=plain_file,
    help='the same lines with the results added; repeat an interrupted command to resume it',
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
    choices=DTYPES,
    help='the dtype to compute in (default: %(default)s)',
  )
  parser.add_argument(
    '--mesh',
    default='',
    metavar='AXIS=N,…',
    help='devices along the axes data, fsdp, expert, context and tensor (default: all along data)',
  )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that say which prompts models respond to."""
  parser.add_argument(
    '--prompts',
    default='',
    metavar='FILE',
    help='rows with prompts, or tinyworld, tinyworld:validation or tinyworld:test',
  )
  parser.add_argument(
    '--world',
    type=int,
    default=0,
    metavar='N',
    help='the seed of TinyWorld (default: %(default)s)',
  )
  parser.add_argument(
    '--limit',
    type=int,
    default=0,
    metavar='N',
    help='take N prompts at even distances; 0 = all (default: %(default)s)',
  )
  parser.add_argument(
    '--cluster',
    default='family',
    metavar='FIELD',
    help='a field of the rows; prompts with the same value are resampled together '
    '(default: %(default)s, where rows have it)',
  )


def add_choice_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds how the next token is chosen, with the defaults of SamplingOptions."""
  add_temperature_argument(parser)
  parser.add_argument(
    '--top_k',
    type=int,
    default=0,
    metavar='K',
    help='sample among the K most probable tokens; 0 = all (default: %(default)s)',
  )
  parser.add_argument(
    '--top_p',
    type=float,
    default=1.0,
    metavar='P',
    help='sample among the smallest set of tokens with this total probability; 1 = all '
    '(default: %(default)s)',
  )


def add_temperature_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --temperature, of sampling."""
  parser.add_argument(
    '--temperature',
    type=float,
    default=1.0,
    metavar='X',
    help='temperature of the softmax; 0 = greedy (default: %(default)s)',
  )


def add_key_argument(parser: argparse.ArgumentParser) -> None:
  """Adds --key_env, the key of servers that judge or respond."""
  parser.add_argument(
    '--key_env',
    default='OPENAI_API_KEY',
    metavar='NAME',
    help="environment variable with the servers' key (default: %(default)s)",
  )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments that say how models respond."""
  parser.add_argument(
    '--samples',
    type=int,
    default=1,
    metavar='K',
    help='responses of each model to each prompt (default: %(default)s)',
  )
  parser.add_argument(
    '--max_new_tokens',
    type=int,
    default=256,
    metavar='N',
    help='the maximum length of a response, in tokens (default: %(default)s)',
  )
  add_temperature_argument(parser)
  parser.add_argument(
    '--batch_size',
    type=int,
    default=32,
    metavar='N',
    help='prompts at once, over all devices (default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='seed of the sampling (default: %(default)s)',
  )


def run_command(
  command: Callable[[argparse.Namespace], None],
  options: argparse.Namespace,
) -> int:
  """Runs a command that can be resumed, and returns its exit code (see failures.py)."""
  host_memory.keep_freed_memory()
  return failures.run(functools.partial(command, options))
