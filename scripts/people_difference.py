"""Compares runs whose people rank over HTTP with runs that simulate the people themselves.

  python scripts/people_difference.py

Reads docs/results/people.json. The two runs of a seed share the world, the base model and the
prompts, but neither the noise of the labels nor that of training; so the spread of their
differences over seeds holds the noise of labels, training and prompts together. Prints the mean
difference of each figure with its 95% interval by Student's t over the seeds. The interval of a
single run in docs/collect.md resamples prompts only, and says nothing of another training.
"""

import json
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parents[1] / 'docs/results/people.json'
FIGURES = {'helpful': 'helpful', 'substance_win_rate_vs_sft': 'wins against SFT'}


def main() -> None:
  """Prints the table."""
  runs = json.loads(RESULTS.read_text(encoding='utf-8'))['runs']
  found = {(run['seed'], run['source']): run for run in runs}
  seeds = sorted({run['seed'] for run in runs})
  print('| figure | ' + ' | '.join(f'seed {seed}' for seed in seeds) + ' | mean, 95% interval |')
  print('| --- |' + ' --- |' * (len(seeds) + 1))
  for figure, title in FIGURES.items():
    for sampling in ('sampled', 'greedy'):
      rates = [
        [found[seed, source][sampling][figure] for source in ('people', 'simulated')]
        for seed in seeds
      ]
      gains = 100 * np.array([people - simulated for people, simulated in rates])
      mean, half = mean_interval(gains)
      cells = [f'{gain:+.1f}' for gain in gains] + [f'{mean:+.1f} ± {half:.1f} points']
      print(f'| {title}, {sampling} | ' + ' | '.join(cells).replace('-', '−') + ' |')


def mean_interval(values: np.ndarray) -> tuple[float, float]:
  """Returns the mean of values [N] and half the width of its 95% interval."""
  error = values.std(ddof=1) / np.sqrt(len(values))
  return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * error)


if __name__ == '__main__':
  main()
