"""Plans an experiment: `python -m rlhf_jax.plan --config=FILE --topology=v5p:4x4x8`."""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
import sys
from typing import Any, TYPE_CHECKING

from rlhf_jax.commands import arguments, failures
from rlhf_jax.errors import UserError

if TYPE_CHECKING:  # JAX takes seconds to import
  from rlhf_jax.experiment.planner import ExperimentPlan

DOES_NOT_FIT = 1  # exit code when the plan was made, but some stage does not fit

_DESCRIPTION = """\
Compiles every program of an experiment for hardware that this machine need not have,
and prints for each device the memory, the FLOPs, the bytes sent, and how long a step
takes at best. No data and no parameters are read, only shapes.

  python -m rlhf_jax.plan --config=experiments/llama_8b_ppo.py --topology=v5p:4x4x8
"""
_EPILOG = """\
Topologies: v5p:4x4x8, v5e:16x16, v6e:8x8, 2*v5e:16x16 (two slices), gpu:8xh100,
gpu:4x8xh100 (four hosts; also a100, h200), cpu:8. docs/plan.md explains every number.

Every value of the config can be changed with --config.section.key=value.

Exit codes: 0 every stage fits, 1 one does not, 2 a mistake in the arguments or the
config.
"""


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax.plan', _DESCRIPTION, _EPILOG)
  arguments.add_config_argument(parser)
  parser.add_argument(
    '--topology',
    required=True,
    metavar='T',
    help='the devices to plan for, such as v5p:4x4x8; see below',
  )
  parser.add_argument(
    '--stage',
    metavar='NAME',
    help='plan this stage only (default: all)',
  )
  parser.add_argument(
    '--analytic',
    action='store_true',
    help='estimate from shapes alone, in seconds, without a compiler',
  )
  parser.add_argument(
    '--sweep',
    action='store_true',
    help='compare all meshes that are possible on the devices; the best first',
  )
  parser.add_argument(
    '--json',
    metavar='FILE',
    help='also write all numbers to this file',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 every stage fits, 1 one does not, 2 a user's mistake, 70 a bug.
  """
  # --help and mistyped arguments exit here
  options, overrides = arguments.parse_with_overrides(make_parser(), argv)

  # both must be set before JAX is imported
  os.environ['JAX_PLATFORMS'] = 'cpu'  # leaves this machine's accelerators alone
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # hides warnings of the compilers
  return failures.run(lambda: make_plan(options, overrides))


def make_plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Plans, prints and perhaps writes; returns whether it fits as an exit code.

  Raises:
    UserError: something is wrong with the config or the topology.
  """
  from rlhf_jax.experiment import planner  # JAX takes seconds to import

  plan = planner.plan_experiment(
    options.config,
    overrides,
    options.topology,
    stage=options.stage,
    analytic=options.analytic,
    sweep=options.sweep,
  )
  if options.json:
    write_json(options.json, plan)
  return failures.DONE if plan.fits else DOES_NOT_FIT


def write_json(path: str, plan: 'ExperimentPlan') -> None:
  """Writes all numbers of a plan to a file, or to a device such as /dev/stdout.

  Raises:
    UserError: the file cannot be written.
  """
  text = json.dumps(as_json(plan), indent=2) + '\n'
  try:  # not by files.write_text, as no file can be renamed to /dev/stdout
    Path(path).write_text(text)
  except OSError as error:
    raise UserError(f'--json={path}: cannot write: {error.strerror}') from None


def as_json(plan: 'ExperimentPlan') -> dict[str, Any]:
  """Returns a plan as nested dicts for JSON; fields that are None are left out."""
  return dataclasses.asdict(plan, dict_factory=_without_none)


def _without_none(items: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a dict of the items whose value is not None."""
  return {name: value for name, value in items if value is not None}


if __name__ == '__main__':
  sys.exit(main())
