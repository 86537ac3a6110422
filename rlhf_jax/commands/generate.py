"""Responds to a file of prompts: `python -m rlhf_jax.generate`."""

import argparse
from collections.abc import Sequence
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Generates responses to the prompts of a file, a JSON object in each line.

  python -m rlhf_jax.generate --model=DIR --input=prompts.jsonl --output=out.jsonl \\
      --samples=4 --temperature=0.7

A line is one of
  {"text": …}        continued as it stands
  {"prompt": …}      put into the model's chat template; a text or a list of messages
  {"messages": …}    the same
  {"tokens": [ids]}  continued as they are; needs no tokenizer

The output has the same lines with `responses` added, K texts; for a model without a
tokenizer `response_tokens` instead. --logprobs adds `response_tokens` and `logprobs`,
natural logarithms under the sampling temperature, in float32.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in words or input, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command."""
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
    help='the longest response, which is cut there (default: %(default)s)',
  )
  parser.add_argument(
    '--temperature',  # this and the next two have the defaults of SamplingOptions
    type=float,
    default=1.0,
    metavar='X',
    help='of the softmax; 0 = greedy (default: %(default)s)',
  )
  parser.add_argument(
    '--top_k',
    type=int,
    default=0,
    metavar='K',
    help='sample among the K likeliest tokens; 0 = all (default: %(default)s)',
  )
  parser.add_argument(
    '--top_p',
    type=float,
    default=1.0,
    metavar='P',
    help='sample among the fewest tokens that have this probability; 1 = all '
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    metavar='N',
    help='of the sampling (default: %(default)s)',
  )
  parser.add_argument(
    '--logprobs',
    action='store_true',
    help='add token ids and logprobs of every response',
  )
  return parser


def main(words: Sequence[str] | None = None) -> int:
  """Parses the words of the command, runs it, and returns the exit code.

  Args:
    words: as on the command line; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(words)  # --help ends here
  return arguments.run_command(_generate, options)


def _generate(options: argparse.Namespace) -> None:
  """Imports what the command needs, as JAX takes seconds to import, and runs it."""
  from rlhf_jax.commands import generate_lines

  generate_lines.generate_lines(options)


if __name__ == '__main__':
  sys.exit(main())
