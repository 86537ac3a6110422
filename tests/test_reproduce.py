"""The command that measures the claims of the field, on the cheapest of them."""

import json
from pathlib import Path
import subprocess
import sys

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'results'


def reproduce(*words):
  command = [sys.executable, str(ROOT / 'scripts' / 'reproduce.py'), *words]
  return subprocess.run(command, capture_output=True, text=True)


def test_a_claim_is_measured_tabulated_and_written_to_a_page(tmp_path):
  row = dict(
    win_rate_vs_sft=0.7,
    win_rate_vs_sft_ci95=[0.66, 0.74],
    win_rate_controlled=0.69,
    eos_rate=0.99,
    kl_to_sft=2.0,
    helpful=0.6,
  )
  results = {'models': {name: {'sampled': row} for name in ('sft', 'ppo')}}
  for seed in (0, 1):
    (tmp_path / f'seed{seed}.json').write_text(json.dumps(results))
  runs = ','.join(f'{tmp_path}/seed{seed}.json' for seed in (0, 1))
  words = [f'--output={tmp_path}/out.json', f'--page={tmp_path}/page.md']
  done = reproduce('--claims=R8', f'--runs={runs}', *words)
  assert done.returncode == 0, done.stderr
  row = json.loads((tmp_path / 'out.json').read_text())['R8']
  assert len(row['values']) == 2 and row['in_band'].keys() == {
    'win rate against the baseline',
    'lower end of its interval',
    'controlled win rate',
    'rate of ends',
    'KL, nats',
  }
  assert row['holds']
  assert 'not run: R1, R3' in done.stdout and ' in ' in done.stdout
  page = (tmp_path / 'page.md').read_text()
  assert '## R8' in page and '| R1 |' in page and 'not run' in page


def test_a_config_with_other_settings_is_measured_and_said_to_be_so(tmp_path):
  config = 'experiments/reproductions/r15_evaluator.py'
  words = [f'--output={tmp_path}/out.json', f'--page={tmp_path}/page.md']
  overrides = ('--config.seeds=(5,)', '--config.settings.trials=2')
  done = reproduce(f'--config={ROOT}/{config}', *overrides, *words)
  assert done.returncode == 0, done.stderr
  row = json.loads((tmp_path / 'out.json').read_text())['R15']
  assert row['config'] == config and row['seeds'] == ['5'] and row['settings'] == {'trials': 2}
  page = (tmp_path / 'page.md').read_text()
  assert f'--config={config}`, seeds 5' in page and 'reproduction_r15.svg' in page
  assert 'other settings than those of the config' in page


def test_the_sizes_for_a_gpu_can_be_traced():
  configs = [
    path
    for path in sorted((ROOT / 'experiments/reproductions').glob('r*.py'))
    if 'FILE:gpu' in path.read_text()
  ]
  done = reproduce('--trace', *(f'--config={path}:gpu' for path in configs))
  assert done.returncode == 0, done.stderr
  lines = dict(line.split(': ', 1) for line in done.stdout.splitlines())
  assert list(lines) == ['R13', 'R14', 'R4', 'R5', 'R6', 'R8']
  # the last network of R5, of 2,048 responses of 48 tokens in each of 32 steps
  assert '2 programs traced, up to 3,145,824 numbers' in lines['R5']
  assert lines.pop('R8') == 'reads finished runs: nothing to trace'
  assert all('traced, up to' in line for line in lines.values())


def test_unknown_claims_are_refused(tmp_path):
  done = reproduce('--claims=R2', f'--output={tmp_path}/out.json')
  assert done.returncode == 2 and "no claim 'R2'" in done.stderr


def test_the_page_is_that_of_the_results(tmp_path):
  results = RESULTS / 'reproductions.json'
  done = reproduce(f'--output={results}', f'--page={tmp_path}/page.md')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'page.md').read_text() == (ROOT / 'docs/reproductions.md').read_text()
