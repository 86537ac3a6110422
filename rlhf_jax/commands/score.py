"""Scores a file of texts: `python -m rlhf_jax.score`."""

import argparse
from collections.abc import Sequence
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Computes the log-probabilities of texts under a language model, or their scores by a
reward model.

  python -m rlhf_jax.score --model=DIR --input=texts.jsonl --output=out.jsonl

A line is one of these, or a conversation in any shape that docs/data.md lists:
  {"text": …}                     a text that is read without a chat template
  {"prompt": …, "response": …}    put into the model's chat template
  {"messages": …}                 the same; the last message is the assistant's
  {"tokens": [ids]}               token ids; needs no tokenizer
Of pairs and rankings every response is scored.

The output has the same lines with the results added. A language model adds `tokens`
and `logprobs`: natural logarithms in float32, one for each token after the first. A
reward model (a sequence-classification directory, or a stage that trained one) adds
`score`.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or the input, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.score', _DESCRIPTION, _EPILOG)
  arguments.add_line_arguments(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(argv)  # --help exits here
  return arguments.run_command(_score, options)


def _score(options: argparse.Namespace) -> None:
  """Runs the command; the import is here because JAX takes seconds to import."""
  from rlhf_jax.commands import score_lines

  score_lines.score_lines(options)


if __name__ == '__main__':
  sys.exit(main())
