"""Measures the statistics of evaluation/ on simulated judges whose truth is known.

  python scripts/check_statistics.py --trials=1000

A judge likes length, lists and whatever is shown first. The table says how far the
plain and the controlled win rate are from the truth, in points, and how often each
95% interval covers it; docs/evaluation.md has the figures.
"""

import argparse
import sys
import time

import numpy as np
from scipy import special

from rlhf_jax.evaluation import precision, ratings, verdicts, winrate
from rlhf_jax.evaluation.verdicts import Verdicts
from rlhf_jax.text_table import format_rows

PROMPTS = 300
STRENGTHS = np.array([0.0, 0.4, 0.9, 1.3])  # the true ratings, nats; the first is the anchor
LIKES = {'words': 1.2, 'lists': 0.8}  # of the judge, for a difference of one standard deviation
FIRST = 0.7  # how much the judge likes what is shown first, nats
WRITES = np.array([0.0, 0.8, -0.5, 0.3])  # how long and how listed each model writes
LIKENESS = 0.5  # the correlation of what decides the verdicts on one prompt


def simulate(rng: np.random.Generator, biased: bool) -> Verdicts:
  """Simulates a judge who sees each pair of four models on each prompt, in both orders."""
  count = len(STRENGTHS)
  pairs = np.array([(a, b) for a in range(count) for b in range(a + 1, count)])
  both = np.concatenate([pairs, pairs[:, ::-1]])  # the two orders
  prompts = np.repeat(np.arange(PROMPTS), len(both))
  first, second = np.tile(both, (PROMPTS, 1)).T
  logits = STRENGTHS[first] - STRENGTHS[second]
  differences = {}
  for name, likes in LIKES.items():
    manner = WRITES + rng.normal(size=(PROMPTS, count))
    difference = manner[prompts, first] - manner[prompts, second]
    differences[name] = difference
    if biased:
      logits = logits + likes * np.tanh(difference / difference.std())
  if biased:
    logits = logits + FIRST
  # Luck has a part that all verdicts on a prompt share, but each verdict alone has exactly
  # the probability of its logit (a Gaussian copula).
  shared = rng.normal(size=PROMPTS)[prompts]
  luck = LIKENESS**0.5 * shared + (1 - LIKENESS) ** 0.5 * rng.normal(size=len(prompts))
  wins = (special.ndtr(luck) < special.expit(logits)).astype(float)
  judges = np.zeros(len(prompts), int)
  return Verdicts(prompts, first, second, wins, judges, differences, ordered=True)


def check_rates(trials: int, first: int = 0) -> dict[str, tuple[float, float]]:
  """Returns, by name of the figure, its mean error in points and the coverage of its interval."""
  found, truth = estimate_rates(trials, first)
  return {f'win rate, {name}': summarise(values, truth) for name, values in found.items()}


def estimate_rates(trials: int, first: int = 0) -> tuple[dict[str, list], float]:
  """Returns (estimate, low, high) of every trial by name of the rate, and the true rate."""
  clusters = np.arange(PROMPTS)
  found = {'plain': [], 'controlled': []}
  for trial in range(first, first + trials):
    table = simulate(np.random.default_rng(trial), biased=True)
    row = verdicts.compare_two(table, 1, 0, clusters)
    found['plain'].append((row['win_rate'], *row['win_rate_ci95']))
    found['controlled'].append((row['controlled'], *row['controlled_ci95']))
  return found, float(special.expit(STRENGTHS[1] - STRENGTHS[0]))


def check_bootstrap(trials: int, first: int = 0) -> dict[str, tuple[float, float]]:
  """The same for the mean of an unbiased judge, and for a paired difference of two models."""
  chance = special.expit(STRENGTHS - STRENGTHS[0])
  found, paired = [], []
  for trial in range(first, first + trials):
    rng = np.random.default_rng(trial)
    # The three models meet the same opponent on the same prompts, with luck in common.
    shared = rng.normal(size=(PROMPTS, 1))
    luck = LIKENESS**0.5 * shared + (1 - LIKENESS) ** 0.5 * rng.normal(size=(PROMPTS, 4))
    wins = (special.ndtr(luck) < chance).astype(float)
    found.append((wins[:, 1].mean(), *winrate.bootstrap(wins[:, 1], seed=trial)))
    gain = wins[:, 2] - wins[:, 1]
    paired.append((gain.mean(), *winrate.bootstrap(gain, seed=trial)))
  return {
    'win rate, unbiased judge': summarise(found, chance[1]),
    'paired difference': summarise(paired, chance[2] - chance[1]),
  }


def check_ratings(trials: int, first: int = 0) -> dict[str, tuple[float, float]]:
  """The same for the ratings of three models, in nats above the anchor."""
  names = [str(number) for number in range(len(STRENGTHS))]
  rows = {}
  for biased in (False, True):
    found = {name: [] for name in names[1:]}
    for trial in range(first, first + trials):
      table = simulate(np.random.default_rng(trial), biased)
      for row in ratings.rate_models(table, names, np.arange(PROMPTS), controlled=biased):
        if row['name'] in found:
          found[row['name']].append((row['rating'], *row['rating_ci95']))
    errors, covered = zip(
      *(summarise(found[name], STRENGTHS[int(name)]) for name in names[1:]), strict=True
    )
    kind = 'controlled' if biased else 'plain'
    # Errors of ratings stay in nats, times 100.
    rows[f'rating, {kind}'] = (float(np.mean(errors)), float(np.mean(covered)))
  return rows


def check_components(trials: int, first: int = 0) -> dict[str, tuple[float, float]]:
  """The mean error of the estimated variance of judges, in points; it has no interval."""
  found = []
  for trial in range(first, first + trials):
    rng = np.random.default_rng(trial)
    effects = 0.3 * rng.normal(size=(60, 1)) + 0.2 * rng.normal(size=(1, 12))
    values = effects + 0.4 * rng.normal(size=(60, 12))
    seen = rng.random((60, 12)) < 0.4  # nobody judges everything
    prompts, judges = np.nonzero(seen)
    found.append(precision.variance_components(values[seen], prompts, judges)['judge'])
  return {'variance of judges': (100 * (float(np.mean(found)) - 0.04), float('nan'))}


def summarise(found: list[tuple[float, float, float]], truth: float) -> tuple[float, float]:
  """Returns the mean error, times 100, and the share of the intervals that cover the truth."""
  values, low, high = np.array(found).T
  covered = (low <= truth) & (truth <= high)
  return 100 * float(values.mean() - truth), float(covered.mean())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--trials', type=int, default=100, help='simulated evaluations')
  options = parser.parse_args()
  started = time.process_time()
  table = [('figure', 'mean error / 100', 'covered by the 95% interval')]
  checks = (check_bootstrap, check_rates, check_ratings, check_components)
  for check in checks:
    for name, (error, covered) in check(options.trials).items():
      table.append((name, f'{error:+.2f}', '–' if np.isnan(covered) else f'{covered:.1%}'))
  print(format_rows(table))
  print(
    f'{options.trials} trials of {PROMPTS} prompts, {time.process_time() - started:.0f} s of CPU'
  )
  return 0


if __name__ == '__main__':
  sys.exit(main())
