"""Compares models by their responses to the same prompts: `python -m rlhf_jax.compare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Compares two or more models by their responses to the same prompts.

  python -m rlhf_jax.compare runs/quickstart:sft runs/quickstart:ppo \\
      --prompts=tinyworld --judge=oracle --output=comparison.json
  python -m rlhf_jax.compare ours=out/ours.jsonl theirs=http://localhost:8000/v1#NAME \\
      --prompts=prompts.jsonl --judge=reward:runs/quickstart/reward --output=comparison.json

A model is one of
  WORKDIR:STAGE or DIR     what `generate` takes as --model; STAGE@STEP is a checkpoint
  FILE.jsonl               responses, as `generate` writes them
  URL#NAME                 the model NAME of a server with the chat-completions protocol
each with NAME= before it, if it should have another name in the table.

A judge is one of
  oracle                   TinyWorld's, for prompts of tinyworld
  reward:DIR               a reward model
  DIR, URL#NAME            a language model here, or on a server
  module:function          a Python function
  people:FILE.jsonl        rankings that `collect` exported; the models are names in it
Several judges are reported one after the other, and how far they agree.

Every judge but the oracle, reward models and people sees each pair in both orders; a
tie is half a win. The output has all figures with their 95% intervals, which resample
prompts (or clusters of them); the responses and verdicts stand beside it. If the
command is interrupted, repeat it: models that have responded do not do so again.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or the input, 130 interrupted.'


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.compare', _DESCRIPTION, _EPILOG)
  parser.add_argument('models', nargs='+', metavar='MODEL', help='two or more, see above')
  parser.add_argument(
    '--judge',
    action='append',
    required=True,
    metavar='JUDGE',
    help='see above',
  )
  parser.add_argument(
    '--output',
    required=True,
    type=arguments.plain_file,
    metavar='FILE',
    help='a JSON file',
  )
  arguments.add_prompt_arguments(parser)
  arguments.add_sampling_arguments(parser)
  parser.add_argument(
    '--baseline',
    default='',
    metavar='NAME',
    help='the model with which all are compared (default: the first)',
  )
  parser.add_argument(
    '--difference',
    type=float,
    default=0.05,
    metavar='X',
    help='a difference of win rates, for which the needed prompts are counted '
    '(default: %(default)s)',
  )
  parser.add_argument(
    '--principle',
    default='Choose the response that is more helpful, honest and harmless.',
    metavar='TEXT',
    help='what language models judge by (default: %(default)s)',
  )
  parser.add_argument(
    '--training',
    action='append',
    default=[],
    type=Path,
    metavar='FILE',
    help='what the models were trained on; prompts that stand in it are counted',
  )
  arguments.add_key_argument(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(argv)  # --help exits here
  return arguments.run_command(_compare, options)


def _compare(options: argparse.Namespace) -> None:
  """Runs the command; the import is here because JAX takes seconds to import."""
  from rlhf_jax.commands import comparison

  comparison.compare(options)


if __name__ == '__main__':
  sys.exit(main())
