"""python -m rlhf_jax --config=experiments/quickstart.py --workdir=DIR [--config.section.key=value …]"""

import argparse
import sys


def main(arguments=None) -> int:
  """Runs an experiment; returns the exit code: 0 done, 2 a user's mistake, 3 another process of the run died (it ends
  the process), 128 + n stopped by signal n."""
  parser = argparse.ArgumentParser(
      prog='python -m rlhf_jax', description='Runs the stages an experiment names, in order; finished ones are '
      'skipped, a cut one goes on where it was saved.',
      epilog='Any value of the config can be changed by --config.section.key=value, for example '
      '--config.ppo.kl_coefficient=0.1. --show prints the whole config with all defaults.', allow_abbrev=False)
  parser.add_argument('--config', required=True, metavar='FILE', help='the experiment; FILE:tiny is its smallest form')
  parser.add_argument('--workdir', metavar='DIR', help='where everything is kept; give the same one to go on')
  parser.add_argument('--show', action='store_true', help='print the config and stop')
  several = parser.add_argument_group('several hosts', 'Found out by itself on TPU pods and under Slurm, Open MPI and '
                                      'Kubernetes; else all three, or RLHF_JAX_COORDINATOR, _PROCESSES and _PROCESS.')
  several.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 listens')
  several.add_argument('--processes', metavar='N', help='how many; 1: only this one, whatever started it')
  several.add_argument('--process', metavar='I', help='which of them this is, from 0')
  options, rest = parser.parse_known_args(arguments)
  unknown = [word for word in rest if not word.startswith('--config.')]
  if unknown:
    parser.error(f'unknown argument {unknown[0]}; overrides look like --config.section.key=value')
  if not (options.workdir or options.show):
    parser.error('--workdir=DIR is needed: where everything is kept')

  from rlhf_jax import config as configs
  from rlhf_jax import pipeline  # after --help: jax takes a moment
  from rlhf_jax.errors import UserError
  from rlhf_jax.runtime import hosts
  from rlhf_jax.runtime.loop import Interrupted
  try:
    config = pipeline.load_config(options.config, [word[len('--config.'):] for word in rest])
    if options.show:
      print(configs.as_json(config), end='')
      return 0
    hosts.initialize(options.coordinator, options.processes, options.process)
    with hosts.exit_with_peers():
      pipeline.run(config, options.workdir)
  except UserError as error:
    print(f'rlhf_jax: error: {error}', file=sys.stderr)
    return 2
  except Interrupted as stop:
    return 128 + stop.signum
  return 0


if __name__ == '__main__':
  sys.exit(main())
