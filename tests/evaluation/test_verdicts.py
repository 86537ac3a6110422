"""Simulated judges whose truth is known: scripts/check_statistics.py has the thousand trials."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.evaluation import ratings, verdicts
from rlhf_jax.evaluation.verdicts import Verdicts

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'check_statistics.py'


@pytest.fixture(scope='module')
def simulation():
  spec = importlib.util.spec_from_file_location('check_statistics', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def table(rows, ordered=True, **differences):
  prompts, first, second, wins = map(np.array, zip(*rows, strict=True))
  judges = np.zeros(len(rows), int)
  named = {name: np.array(values, float) for name, values in differences.items()}
  return Verdicts(prompts, first, second, wins.astype(float), judges, named, ordered)


def test_the_controlled_figure_finds_the_truth_that_a_biased_judge_hides(simulation):
  figures = simulation.check_rates(trials=20)
  assert figures['win rate, plain'][0] > 6  # points off, by what the judge likes
  error, covered = figures['win rate, controlled']
  assert abs(error) < 3
  assert covered >= 0.8  # 16 of 20


def test_ratings_and_their_intervals(simulation):
  for error, covered in simulation.check_ratings(trials=15).values():
    assert abs(error) < 6  # hundredths of a nat
    assert covered >= 0.85  # of 45 intervals


def test_both_orders_of_a_pair_count_and_a_tie_is_half():
  met = table([(0, 0, 1, 1.0), (0, 1, 0, 1.0), (1, 0, 1, 0.5), (1, 1, 0, 0.0), (2, 0, 1, np.nan)])
  row = verdicts.compare_two(met, 0, 1, np.arange(3))
  # Prompt 0: the first one won both times, so one win each. Prompt 1: a tie and a win.
  assert row['win_rate'] == (0.5 + 0.75) / 2 and row['prompts'] == 2 and row['verdicts'] == 4
  other = verdicts.compare_two(met, 1, 0, np.arange(3))
  assert other['win_rate'] == pytest.approx(1 - row['win_rate'])
  assert other['controlled'] == pytest.approx(1 - row['controlled'])
  assert verdicts.compare_two(met, 0, 2, np.arange(3)) == {'verdicts': 0, 'prompts': 0}


def test_the_order_is_measured():
  met = table([(0, 0, 1, 1.0), (0, 1, 0, 1.0), (1, 0, 1, 1.0), (1, 1, 0, 0.0)])
  assert verdicts.measure_order(met) == {'pairs': 2, 'consistency': 0.5, 'first': 0.75}
  assert verdicts.measure_order(table([(0, 0, 1, 1.0)], ordered=False)) == {}


def test_a_judge_who_mostly_takes_the_first_is_told_from_a_better_model():
  rng = np.random.default_rng(0)
  both = [(number, *pair) for number in range(100) for pair in ((0, 1), (1, 0))]
  once = [(number, 0, 1) for number in range(100, 300)]  # shown in one order only
  rows = [(*row, float(rng.random() < 0.9)) for row in both + once]
  row = verdicts.compare_two(table(rows), 0, 1, np.arange(300))
  assert row['win_rate'] > 0.7
  assert abs(row['controlled'] - 0.5) < 0.15


def test_a_model_that_wins_everything_has_a_finite_rating_above_the_others():
  rng = np.random.default_rng(0)
  rows = [(number, 0, 1, 1.0) for number in range(50)]
  rows += [(number, 1, 2, float(rng.random() < 0.7)) for number in range(50)]
  rated = ratings.rate_models(table(rows, ordered=False), ['a', 'b', 'c'], np.arange(50), anchor=1)
  assert [row['name'] for row in rated] == ['a', 'b', 'c']
  assert 3 < rated[0]['rating'] < 12 and rated[0]['rank_ci95'] == [1, 1]
  assert rated[1]['rating'] == 0 and rated[1]['rating_ci95'] == [0, 0]
  # Two models alone: the rating is the logit of the rate.
  alone = ratings.rate_models(table(rows[50:], ordered=False), ['a', 'b', 'c'], np.arange(50), 2)
  won = np.mean([row[3] for row in rows[50:]])
  found = {row['name']: row['rating'] for row in alone}
  assert found['b'] == pytest.approx(np.log(won / (1 - won)), abs=0.02)
  assert found['b'] * ratings.ELO == pytest.approx(alone[0]['elo'])
