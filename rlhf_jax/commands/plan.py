"""python -m rlhf_jax.plan --config=FILE --topology=v5p:4x4x8 [--config.section.key=value …]"""

import argparse
import json
import os
from pathlib import Path
import sys


def main(arguments=None) -> int:
  """Plans an experiment for hardware that is not here; returns the exit code: 0 it fits, 1 it does not, 2 a mistake."""
  parser = argparse.ArgumentParser(
      prog='python -m rlhf_jax.plan', description='Compiles every step of an experiment for hardware that is not here, '
      'and says per device: memory, FLOPs, bytes sent, and how long a step takes at least. Nothing is read but shapes.',
      epilog='Topologies: v5p:4x4x8, v5e:16x16, v6e:8x8, 2*v5e:16x16 (two slices), gpu:8xh100, gpu:4x8xh100 (four '
      'hosts), cpu:8. docs/plan.md explains every number.', allow_abbrev=False)
  parser.add_argument('--config', required=True, metavar='FILE', help='the experiment; FILE:tiny is its smallest form')
  parser.add_argument('--topology', required=True, metavar='T', help='the devices')
  parser.add_argument('--stage', metavar='NAME', help='this stage only')
  parser.add_argument('--analytic', action='store_true', help='by shapes alone, in seconds, without a compiler')
  parser.add_argument('--sweep', action='store_true', help='compare the meshes that fit the devices')
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  options, rest = parser.parse_known_args(arguments)
  unknown = [word for word in rest if not word.startswith('--config.')]
  if unknown:
    parser.error(f'unknown argument {unknown[0]}; overrides look like --config.section.key=value')

  os.environ['JAX_PLATFORMS'] = 'cpu'  # devices of this machine are not asked
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  from rlhf_jax.errors import UserError  # after --help: jax takes a moment
  from rlhf_jax import planner
  try:
    found = planner.plan(options.config, [word[len('--config.'):] for word in rest], options.topology, options.stage,
                         options.analytic, options.sweep)
    if options.json:
      Path(options.json).write_text(json.dumps(found, indent=2) + '\n')
  except UserError as error:
    print(f'rlhf_jax: error: {error}', file=sys.stderr)
    return 2
  return 0 if all(one['fits'] for plan in found['plans'][:1] for one in plan['stages']) else 1


if __name__ == '__main__':
  sys.exit(main())
