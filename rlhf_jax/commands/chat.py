"""Talks with a model in the terminal, or with two at once: `python -m rlhf_jax.chat`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from rlhf_jax.commands import arguments, failures

_DESCRIPTION = """\
Talks with a model in the terminal; its responses appear as they are written. Of two
models, both respond to everything, and you vote without knowing which is which.

  python -m rlhf_jax.chat runs/quickstart/ppo
  python -m rlhf_jax.chat runs/quickstart/sft runs/quickstart/ppo --votes=votes.jsonl

A model is a Hugging Face directory, a stage's folder in a workdir, a directory of PEFT
adapters, a .gguf file, or 'smollm2'. Enter sends a message, Alt-Enter or a backslash at
the end of a line begins a new one, Ctrl-C stops a response, Ctrl-D ends. In the program,
/help lists what else there is. Without a terminal, each line of stdin is a message.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or a model, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.chat', _DESCRIPTION, _EPILOG)
  parser.add_argument('models', metavar='MODEL', nargs='+', help='one model, or two to compare')
  parser.add_argument(
    '--votes',
    metavar='FILE',
    type=Path,
    default=Path('votes.jsonl'),
    help='where votes on two models are added, as rankings that stages read (default: %(default)s)',
  )
  parser.add_argument('--system', metavar='TEXT', default='', help='the system message')
  arguments.add_choice_arguments(parser)
  parser.add_argument(
    '--max_new_tokens',
    type=int,
    default=512,
    metavar='N',
    help='the maximum length of a response, in tokens (default: %(default)s)',
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=arguments.DTYPES,
    help='the dtype to compute in (default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='seed of the sampling and of which model stands first (default: %(default)s)',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  parser = make_parser()
  options = parser.parse_args(argv)  # --help exits here
  if len(options.models) > 2:
    parser.error(f'expected one model or two, got {len(options.models)}')
  if options.max_new_tokens < 1:
    parser.error(f'--max_new_tokens: expected 1 or more, got {options.max_new_tokens}')
  return failures.run(lambda: chat(options))


def chat(options: argparse.Namespace) -> None:
  """Runs the command; the imports are here because JAX takes seconds to import.

  Raises:
    UserError: a model cannot be read, or cannot talk.
  """
  from rlhf_jax.commands import chat_session, chat_terminal

  is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  screen = chat_terminal.Terminal() if is_terminal else chat_terminal.Pipe()
  chat_session.run(options, screen)


if __name__ == '__main__':
  sys.exit(main())
