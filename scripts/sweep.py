"""Runs an experiment with several values of its settings; what they share is trained once.

  python scripts/sweep.py --config=experiments/quickstart.py --workdir=runs/sweep \
    --vary=ppo.kl_coefficient=0.02,0.05,0.1,0.2

Every combination of the values is a run of its own, in WORKDIR/SETTINGS; the first one trains all
stages, and the others take over those whose settings are the same (--from). With the same workdir
an interrupted sweep goes on. At the end one table has the last model of every run beside the
baseline. Further arguments, such as --config.seed=1, are passed to all runs.
"""

import argparse
from collections.abc import Sequence
import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlhf_jax.evaluation import table  # noqa: E402


def main() -> int:
  """Makes all runs and prints the table; returns the exit code."""
  options, overrides = parse()
  folder = Path(options.workdir)
  first = None
  rows: dict[str, Any] = {}
  for settings in combine(options.vary):
    name = ','.join(settings)
    workdir = folder / name.replace('/', '_')
    command = [sys.executable, '-m', 'rlhf_jax', f'--config={options.config}', *overrides]
    command += [f'--config.{setting}' for setting in settings]
    command += [f'--workdir={workdir}']
    if first is not None:
      command += [f'--from={first}']
    print(f'— {name} ' + '—' * 40, flush=True)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    code = subprocess.run(command, env=environment).returncode
    if code:
      return code
    first = first or workdir
    rows |= read_rows(workdir, name, rows)
  text = table.format_table(rows)
  (folder / 'table.txt').write_text(text + '\n', encoding='utf-8')
  print(f'\n{text}\n\nTable: {folder / "table.txt"}')
  return 0


def parse() -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns the options, and what is passed to all runs."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('--config', required=True, help='the experiment')
  parser.add_argument('--workdir', required=True, help='the folder of all runs')
  parser.add_argument(
    '--vary',
    required=True,
    action='append',
    metavar='KEY=VALUE,VALUE',
    help='a setting with its values; several --vary are combined',
  )
  options, overrides = parser.parse_known_args()
  for argument in overrides:
    if not argument.startswith('--config.'):
      parser.error(f'unknown argument {argument}')
  for given in options.vary:
    if '=' not in given:
      parser.error(f'--vary={given}: expected KEY=VALUE,VALUE')
  return options, overrides


def combine(varied: Sequence[str]) -> list[tuple[str, ...]]:
  """Returns all combinations of the values, each as texts KEY=VALUE.

  >>> combine(['ppo.clip=0.1,0.2', 'seed=3'])
  [('ppo.clip=0.1', 'seed=3'), ('ppo.clip=0.2', 'seed=3')]
  """
  choices = []
  for given in varied:
    key, _, values = given.partition('=')
    choices.append([f'{key}={value}' for value in values.split(',')])
  return list(itertools.product(*choices))


def read_rows(workdir: Path, name: str, known: dict[str, Any]) -> dict[str, Any]:
  """Returns the rows of a run: its last model, and its baseline if there is none yet."""
  results = json.loads((workdir / 'results.json').read_text())
  config = json.loads((workdir / 'config.json').read_text())
  models = results['models']
  *_, last = models
  rows = {name: models[last]['sampled']}
  if not known:
    stages = config['evaluation']['models']
    baseline = [row for row in models if stages.get(row) == config['evaluation']['baseline']]
    rows = {row: models[row]['sampled'] for row in baseline} | rows
  return rows


if __name__ == '__main__':
  sys.exit(main())
