"""Claims about the evaluator itself, and those that finished runs of TinyWorld answer."""

import json
from pathlib import Path

import check_statistics
from reproductions.claims import Band, Claim, Measured

TRIALS = 70  # for each seed; three seeds make the 200 of the claim


def run_r15(seed):
  first = seed * TRIALS
  values = {}
  for check in (check_statistics.check_bootstrap, check_statistics.check_rates):
    for name, (error, covered) in check(TRIALS, first).items():
      values[f'{name}: mean error, points'] = abs(error)
      values[f'{name}: covered'] = covered
  for name, (error, covered) in check_statistics.check_ratings(TRIALS, first).items():
    values[f'{name}: mean error, hundredths of a nat'] = abs(error)
    values[f'{name}: covered'] = covered
  return Measured(values)


def run_r8(workdir):
  """Reads the final table of a finished run of experiments/quickstart.py.

  Args:
    workdir: the folder of the run, or a file of docs/results.
  """
  path = Path(workdir)
  results = json.loads((path / 'results.json' if path.is_dir() else path).read_text())
  results = results.get('results', results)
  row = results['models']['ppo']['sampled']
  return Measured(
    {
      'win rate of PPO against SFT': row['win_rate_vs_sft'],
      'lower end of its interval': row['win_rate_vs_sft_ci95'][0],
      'controlled win rate': row['win_rate_controlled'],
      'rate of ends': row['eos_rate'],
      'KL, nats': row['kl_to_sft'],
      'helpful, PPO minus SFT': row['helpful'] - results['models']['sft']['sampled']['helpful'],
    }
  )


COVERED = Band(0.90, 0.99)

CLAIMS = (
  Claim(
    id='R15',
    text='The controlled win rate finds the truth behind a judge’s likes; intervals cover it',
    source='Dubois et al. 2024; Chiang et al. 2024',
    arrangement='simulated judges who like length, lists and the first place; four models, 300 '
    'prompts; 70 trials for each seed (scripts/check_statistics.py)',
    bands={
      'win rate, controlled: mean error, points': Band(high=3.0),
      'win rate, controlled: covered': COVERED,
      'win rate, unbiased judge: covered': COVERED,
      'rating, plain: covered': COVERED,
      'rating, controlled: covered': COVERED,
      'rating, controlled: mean error, hundredths of a nat': Band(high=3.0),
    },
    run=run_r15,
    reported=('win rate, plain: mean error, points', 'win rate, plain: covered'),
  ),
)
FROM_RUNS = (
  Claim(
    id='R8',
    text='RLHF beats supervised fine-tuning on held-out prompts, with length and style controlled',
    source='Ouyang et al. 2022; Stiennon et al. 2020',
    arrangement='experiments/quickstart.py, whose workdirs are named with --runs; judged by the '
    'oracle on 330 held-out prompts',
    bands={
      'win rate of PPO against SFT': Band(low=0.65),
      'lower end of its interval': Band(low=0.55),
      'controlled win rate': Band(low=0.60),
      'rate of ends': Band(low=0.95),
      'KL, nats': Band(high=10.0),
    },
    run=run_r8,
    reported=('helpful, PPO minus SFT',),
  ),
)
