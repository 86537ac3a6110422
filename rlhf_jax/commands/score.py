"""Scores a file of texts: `python -m rlhf_jax.score`."""

import argparse
from collections.abc import Sequence
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Computes logprobs of texts under a language model, or scores of a reward model, for
a file with a JSON object in each line.

  python -m rlhf_jax.score --model=DIR --input=texts.jsonl --output=out.jsonl

A line is one of
  {"text": …}                     read as it stands
  {"prompt": …, "response": …}    put into the model's chat template
  {"messages": …}                 the same; the last message is the assistant's
  {"tokens": [ids]}               read as they are; needs no tokenizer

The output has the same lines with more in them. A language model adds `tokens` and
`logprobs`, one for each token after the first: natural logarithms, in float32. A
reward model (a sequence-classification directory, or a stage that trained one) adds
`score`.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in words or input, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.score', _DESCRIPTION, _EPILOG)
  arguments.add_line_arguments(parser)
  return parser


def main(words: Sequence[str] | None = None) -> int:
  """Parses the words of the command, runs it, and returns the exit code.

  Args:
    words: as on the command line; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(words)  # --help ends here
  return arguments.run_command(_score, options)


def _score(options: argparse.Namespace) -> None:
  """Imports what the command needs, as JAX takes seconds to import, and runs it."""
  from rlhf_jax.commands import score_lines

  score_lines.score_lines(options)


if __name__ == '__main__':
  sys.exit(main())
