"""Claims about the evaluator itself, and those that finished runs answer."""

from collections.abc import Mapping
import json
import math
from pathlib import Path
from typing import Any

import check_statistics
import numpy as np
from reproductions.claims import as_floats, Measured, ROOT

from rlhf_jax.errors import UserError
from rlhf_jax.report import run_files


def run_r15(settings: Mapping[str, Any], seed: int) -> Measured:
  """Estimates win rates and ratings from simulated judges whose truth is known."""
  trials = settings['trials']
  first = seed * trials
  rates, truth = check_statistics.estimate_rates(trials, first)
  rows = {
    f'win rate, {name}': check_statistics.summarise(own, truth) for name, own in rates.items()
  }
  rows |= check_statistics.check_bootstrap(trials, first)
  values = {}
  for name, (error, covered) in rows.items():
    values[f'{name}: mean error, points'] = abs(error)
    values[f'{name}: covered'] = covered
  for name, (error, covered) in check_statistics.check_ratings(trials, first).items():
    values[f'{name}: mean error, hundredths of a nat'] = abs(error)
    values[f'{name}: covered'] = covered
  numbers = as_floats(range(trials))
  curves = {
    name: (numbers, as_floats(np.sort([value for value, *_ in own]))) for name, own in rates.items()
  }
  curves['truth'] = ([0.0, trials - 1.0], [truth, truth])
  return Measured(values, {'estimated win rates of all trials, in their order': curves})


def run_r8(settings: Mapping[str, Any], run: str) -> Measured:
  """Reads the final table of a finished run.

  Args:
    settings: runs, their names; model, the row that must beat the baseline; stage, whose
      held-out responses are drawn.
    run: the folder of the run, from here or from the root of the project, or a file of
      docs/results.
  """
  path = next((p for p in (Path(run), ROOT / run) if p.exists()), None)
  if path is None:
    raise UserError(f'settings.runs: {run} does not exist; make it as the config says')
  file = path / 'results.json' if path.is_dir() else path
  if not file.is_file():
    raise UserError(f'{file} does not exist: the run is not finished')
  results = json.loads(file.read_text())
  results = results.get('results', results)
  models = {name: decodings['sampled'] for name, decodings in results['models'].items()}
  row, baseline = models[settings['model']], models[settings['baseline']]
  values = {
    'win rate against the baseline': row['win_rate_vs_sft'],
    'lower end of its interval': row['win_rate_vs_sft_ci95'][0],
    'controlled win rate': row['win_rate_controlled'],
    'rate of ends': row['eos_rate'],
    'KL, nats': row['kl_to_sft'],
  }
  if 'helpful' in row:  # TinyWorld's oracle says so
    values['gain in helpfulness'] = row['helpful'] - baseline['helpful']
  return Measured(values, _draw_path(path, settings['stage']) if path.is_dir() else {})


def _draw_path(workdir, stage):
  """Returns the held-out reward against √KL along the training of a stage."""
  rows = run_files.read_metrics(workdir / stage)
  points = [
    (row['eval/kl'], row['eval/reward/score'])
    for row in rows
    if 'eval/kl' in row and 'eval/reward/score' in row
  ]
  if not points:
    return {}
  x = [math.sqrt(max(kl, 0.0)) for kl, _ in points]
  reward = (as_floats(x), as_floats([score for _, score in points]))
  return {'held-out reward along training, against √KL': {'reward model': reward}}


MEASURES = {'R8': run_r8, 'R15': run_r15}
