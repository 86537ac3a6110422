"""Measures models in ways that a win rate does not: `python -m rlhf_jax.evaluate KIND`."""

import argparse
from collections.abc import Callable, Sequence
import sys

from rlhf_jax.commands import arguments

_DESCRIPTION = """\
Measures models, one kind of measurement at a time.

  python -m rlhf_jax.evaluate reward runs/quickstart:reward \\
      --data=tinyworld --output=reward.json
  python -m rlhf_jax.evaluate frontier runs/quickstart:ppo --reference=runs/quickstart:sft \\
      --proxy=runs/quickstart:reward --gold=oracle --prompts=tinyworld --output=frontier.json
  python -m rlhf_jax.evaluate refusals runs/quickstart:sft runs/quickstart:ppo \\
      --prompts=tinyworld --output=refusals.json
  python -m rlhf_jax.evaluate tax runs/quickstart:sft runs/quickstart:ppo \\
      --documents=tinyworld --output=tax.json

`evaluate KIND --help` says more. Each prints a table and writes all figures, with their
95% intervals, as JSON. Models are named as by `compare`.
"""
_EPILOG = 'Exit codes: 0 done, 2 a mistake in the arguments or the input, 130 interrupted.'

_REWARD = """\
Accuracy of reward models on pairs that people ordered, by source and beside the
length; calibration; agreement of several models, and their ensemble. Files of
RewardBench and RewardBench 2 are recognised, and give that package's figures.
"""
_FRONTIER = """\
Gold and proxy reward against the KL from a reference: of policies, of best-of-n from
the reference (unbiased over a pool of samples), and of the reference tilted by the
proxy; with the forms that Gao et al. 2022 fit to over-optimisation.
"""
_REFUSALS = """\
Refusals of harmful prompts, and of harmless ones that look like them. Rows of a file
have a field "harmful": true or false, and may have a field "pair" that is the same for
matched prompts.
"""
_TAX = """\
What alignment costs: the loss of held-out documents and the accuracy in tasks, before
and after.
"""


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command, with one for each kind."""
  parser = arguments.make_parser('rlhf_jax.evaluate', _DESCRIPTION, _EPILOG)
  kinds = parser.add_subparsers(dest='kind', required=True, metavar='KIND')
  _add_reward(_add_kind(kinds, 'reward', 'accuracy of reward models', _REWARD))
  _add_frontier(_add_kind(kinds, 'frontier', 'reward against KL', _FRONTIER))
  _add_refusals(_add_kind(kinds, 'refusals', 'refusals, and too many of them', _REFUSALS))
  _add_tax(_add_kind(kinds, 'tax', 'what alignment costs', _TAX))
  return parser


def _add_kind(
  kinds: argparse._SubParsersAction,
  name: str,
  summary: str,
  description: str,
):
  """Adds the parser of one kind, with what all have."""
  parser = kinds.add_parser(
    name,
    help=summary,
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('models', nargs='+', metavar='MODEL', help='as by `compare`')
  parser.add_argument(
    '--output',
    required=True,
    type=arguments.plain_file,
    metavar='FILE',
    help='a JSON file',
  )
  return parser


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--batch_size',
    type=int,
    default=32,
    metavar='N',
    help='rows at once (default: %(default)s)',
  )


def _add_reward(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--data',
    required=True,
    metavar='FILE',
    help='preferences, rankings, RewardBench or RewardBench 2; or tinyworld',
  )
  parser.add_argument(
    '--world',
    type=int,
    default=0,
    metavar='N',
    help='seed of TinyWorld (default: %(default)s)',
  )
  parser.add_argument(
    '--limit',
    type=int,
    default=0,
    metavar='N',
    help='rows at even distances; 0 = all',
  )
  parser.add_argument(
    '--errors',
    type=int,
    default=50,
    metavar='N',
    help='pairs that the first model gets most wrong, for reading (default: %(default)s)',
  )
  _add_batch_size(parser)


def _add_frontier(parser: argparse.ArgumentParser) -> None:
  arguments.add_prompt_arguments(parser)
  arguments.add_sampling_arguments(parser)
  parser.add_argument(
    '--reference',
    required=True,
    metavar='MODEL',
    help='the model from which KL is measured',
  )
  parser.add_argument(
    '--proxy',
    required=True,
    metavar='MODEL',
    help='the reward model that is optimised',
  )
  parser.add_argument(
    '--gold',
    required=True,
    metavar='JUDGE',
    help='oracle, or a reward model that stands for it',
  )
  parser.add_argument(
    '--pool',
    type=int,
    default=64,
    metavar='M',
    help='samples of the reference for each prompt, for best-of-n (default: %(default)s)',
  )


def _add_refusals(parser: argparse.ArgumentParser) -> None:
  arguments.add_prompt_arguments(parser)
  arguments.add_sampling_arguments(parser)
  parser.add_argument(
    '--judge',
    default='',
    metavar='JUDGE',
    help='also say which responses are worse than a plain refusal: reward:DIR, or any judge '
    'of `compare`',
  )
  parser.add_argument(
    '--group',
    default='',
    metavar='FIELD',
    help='a field of the rows, to report by its values',
  )
  arguments.add_key_argument(parser)


def _add_tax(parser: argparse.ArgumentParser) -> None:
  arguments.add_prompt_arguments(parser)
  arguments.add_sampling_arguments(parser)
  parser.add_argument(
    '--documents',
    default='',
    metavar='FILE',
    help='held-out documents; or tinyworld',
  )
  parser.add_argument(
    '--task',
    default='',
    metavar='NAME',
    help='oracle, or a reward function such as rlhf_jax.rewards.builtin.math:final_number, by '
    'which responses to --prompts are right (1) or wrong (0)',
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 130 interrupted.
  """
  options = make_parser().parse_args(argv)  # --help exits here
  return arguments.run_command(_evaluate, options)


def _evaluate(options: argparse.Namespace) -> None:
  """Runs one kind; the imports are here because JAX takes seconds to import."""
  from rlhf_jax.commands import (
    measure_frontier,
    measure_refusals,
    measure_rewards,
    measure_tax,
  )

  kinds: dict[str, Callable[[argparse.Namespace], None]] = {
    'reward': measure_rewards.measure,
    'frontier': measure_frontier.measure,
    'refusals': measure_refusals.measure,
    'tax': measure_tax.measure,
  }
  kinds[options.kind](options)


if __name__ == '__main__':
  sys.exit(main())
