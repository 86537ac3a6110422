"""Runs an experiment: `python -m rlhf_jax --config=FILE --workdir=DIR`."""

import argparse
from collections.abc import Sequence
import contextlib
import sys
import tempfile

from rlhf_jax.commands import arguments, failures, host_memory

_DESCRIPTION = """\
Runs the stages of an experiment in order. Finished stages are skipped, and an
interrupted one resumes from its last checkpoint.

  python -m rlhf_jax --config=experiments/quickstart.py --workdir=/tmp/quickstart
"""
_EPILOG = """\
Every value of the config can be changed with --config.section.key=value, for
example --config.ppo.kl_coefficient=0.1. --show prints the whole config with all
defaults.

Exit codes: 0 done, 2 a mistake in the arguments, the config or the data, 3 another
process of the run died, 70 a bug of this package, 128 + n stopped by signal n.
"""


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command."""
  parser = arguments.make_parser('rlhf_jax', _DESCRIPTION, _EPILOG)
  arguments.add_config_argument(parser)
  parser.add_argument(
    '--workdir',
    metavar='DIR',
    help='the folder for everything that the run writes, or a URL such as s3://BUCKET/RUN; use '
    'the same one to resume',
  )
  parser.add_argument(
    '--from',
    dest='take_from',
    metavar='RUN',
    default='',
    help='the workdir of another run, whose finished stages are copied where their config is '
    'the same',
  )
  parser.add_argument(
    '--baseline',
    metavar='RUN',
    default='',
    help='the workdir of another run, whose models get rows in the final table',
  )
  parser.add_argument(
    '--extend',
    action='store_true',
    help='go on with finished stages whose loop.steps are more in this config',
  )
  parser.add_argument(
    '--evaluate_again',
    action='store_true',
    help='make the final table anew, with whatever the section evaluation says now',
  )
  parser.add_argument(
    '--check',
    action='store_true',
    help='check all stages, describe them and exit; needs no --workdir',
  )
  parser.add_argument(
    '--show',
    action='store_true',
    help='print the whole config and exit',
  )
  parser.add_argument(
    '--accept_changed_data',
    action='store_true',
    help='resume a stage although its data files are not those that it began with',
  )
  hosts = parser.add_argument_group(
    'several hosts',
    'Detected on TPU pods and under Slurm, Open MPI and Kubernetes. Elsewhere give all three\n'
    'flags, or set RLHF_JAX_COORDINATOR, RLHF_JAX_PROCESSES and RLHF_JAX_PROCESS.',
  )
  hosts.add_argument(
    '--coordinator',
    metavar='HOST:PORT',
    help='the address at which process 0 listens',
  )
  hosts.add_argument(
    '--processes',
    metavar='N',  # parsed by hosts.initialize, which also reads the environment variables
    help='the number of processes; 1 = only this one, even in a job of a cluster',
  )
  hosts.add_argument(
    '--process',
    metavar='I',
    help='the number of this process, from 0',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the arguments, runs the command, and returns its exit code.

  Args:
    argv: the command-line arguments; None for those of this process.

  Returns:
    0 done, 2 a user's mistake, 70 a bug, 128 + n stopped by signal n. If another process
    of the run dies, this function does not return: the process exits with code 3.
  """
  parser = make_parser()
  options, overrides = arguments.parse_with_overrides(parser, argv)
  if not (options.workdir or options.show or options.check):
    parser.error('--workdir=DIR is missing: the folder for everything that the run writes')

  host_memory.keep_freed_memory()
  if options.show:
    return failures.run(lambda: show_config(options.config, overrides))
  return failures.run(lambda: train(options, overrides), options.workdir)


def show_config(path: str, overrides: Sequence[str]) -> None:
  """Prints the whole config of an experiment as JSON.

  Args:
    path: the experiment's file.
    overrides: strings 'section.key=value'.

  Raises:
    UserError: whatever is wrong with the config.
  """
  from rlhf_jax.experiment import config as configs
  from rlhf_jax.experiment import pipeline

  print(configs.as_json(pipeline.load_config(path, overrides)), end='')


def train(options: argparse.Namespace, overrides: Sequence[str]) -> None:
  """Runs the stages of an experiment, together with the other processes of the run.

  Args:
    options: the parsed arguments.
    overrides: strings 'section.key=value'.

  Raises:
    UserError: whatever is wrong with config, data, mesh or workdir.
  """
  from rlhf_jax.experiment import pipeline
  from rlhf_jax.runtime import hosts

  # the config first, so that a mistake in it is reported without waiting for other processes
  config = pipeline.load_config(options.config, overrides)
  hosts.initialize(options.coordinator, options.processes, options.process)
  with hosts.exit_with_peers():  # else this process would wait for a dead one forever
    with contextlib.ExitStack() as stack:
      workdir = options.workdir or stack.enter_context(tempfile.TemporaryDirectory())  # of --check
      pipeline.run(
        config,
        workdir,
        only_check=options.check,
        take_from=options.take_from,
        baseline=options.baseline,
        extend=options.extend,
        evaluate_again=options.evaluate_again,
        accept_changed_data=options.accept_changed_data,
      )


if __name__ == '__main__':
  sys.exit(main())
