"""Generates responses to a file of prompts: `python -m rlhf_jax.generate`."""

import argparse
from collections.abc import Sequence
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Generates responses to the prompts of a file.

  python -m rlhf_jax.generate --model=DIR --input=prompts.jsonl --output=out.jsonl \\
      --samples=4 --temperature=0.7

A line is one of these, or a conversation in any shape that docs/data.md lists:
  {"text": …}        a text that is continued without a chat template
  {"prompt": …}      a text or a list of messages, put into the model's chat template
  {"messages": …}    a list of messages, put into the model's chat template
  {"tokens": [ids]}  token ids that are continued; needs no tokenizer

The output has the same lines with `responses` added, K texts (or `response_tokens` if
the model has no tokenizer). --logprobs adds `response_tokens` and `logprobs`: natural
logarithms in float32, under the sampling temperature.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or the input, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.generate', _DESCRIPTION, _EPILOG)
  arguments.add_line_arguments(parser)
  parser.add_argument(
    '--samples',
    type=int,
    default=1,
    metavar='K',
    help='responses to each prompt (default: %(default)s)',
  )
  parser.add_argument(
    '--max_new_tokens',
    type=int,
    default=256,
    metavar='N',
    help='the maximum length of a response, in tokens (default: %(default)s)',
  )
  arguments.add_choice_arguments(parser)
  parser.add_argument(
    '--slots',
    type=int,
    default=0,
    metavar='N',
    help='responses decoded at a time; one that has ended gives its place to the next; 0 = all of '
    'a batch (default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='seed of the sampling (default: %(default)s)',
  )
  parser.add_argument(
    '--logprobs',
    action='store_true',
    help='add the token ids and the log-probabilities of every response',
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
  return arguments.run_command(_generate, options)


def _generate(options: argparse.Namespace) -> None:
  """Runs the command; the import is here because JAX takes seconds to import."""
  from rlhf_jax.commands import generate_lines

  generate_lines.generate_lines(options)


if __name__ == '__main__':
  sys.exit(main())
