from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import quality


def test_agreement_kappa_and_the_rest_by_hand():
  p = np.array([0.9, 0.8, 0.3, 0.6, np.nan, 0.5])
  people = np.array([True, False, False, True, True, True])
  lengths = np.array([[5, 2], [2, 5], [5, 5], [1, 9], [1, 2], [3, 1]])
  said = quality.compare_with_people(p, people, lengths)
  assert said['pairs'] == 5 and said['agreement'] == pytest.approx((1 + 0 + 1 + 1 + 0.5) / 5)
  assert said['log_loss'] == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.7, 0.6, 0.5])))
  assert said['longer'] == pytest.approx(1 / 4) and said['people_longer'] == pytest.approx(3 / 4)
  # verdicts T T F T F, people T F F T T: together 3 of 5; by chance 0.6 * 0.6 + 0.4 * 0.4
  assert said['kappa'] == pytest.approx((0.6 - 0.52) / (1 - 0.52))
  assert said['kappa_ci95'][0] <= said['kappa'] <= said['kappa_ci95'][1]
  assert quality.compare_with_people(np.array([np.nan]), [True], [[1, 2]])['pairs'] == 0


def test_calibration():
  rng = np.random.default_rng(0)
  p = rng.uniform(size=20000)
  people = rng.uniform(size=20000) < p
  lengths = np.ones((20000, 2), int)
  assert quality.compare_with_people(p, people, lengths)['calibration_error'] < 0.02
  sure = np.where(p > 0.5, 0.999, 0.001)
  assert quality.compare_with_people(sure, people, lengths)['calibration_error'] == pytest.approx(
    0.249, abs=0.02
  )


def test_wilson():
  low, high = quality.wilson_interval(8, 10)  # Wilson 1927; as in statsmodels' proportion_confint
  assert (low, high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
  assert quality.wilson_interval(0, 0) == (0, 1) and quality.wilson_interval(5, 5)[
    1
  ] == pytest.approx(1)


def test_what_is_not_fit():
  limits = SimpleNamespace(consistency=0.7, agreement=0.55)

  def report(stays, agrees):
    return dict(position=dict(consistency=stays), people=dict(agreement=agrees, pairs=200))

  assert quality.explain_unfit(report(0.7, 0.55), limits) == ''
  assert '12% of its verdicts stay' in quality.explain_unfit(report(0.12, 0.9), limits)
  assert 'agrees with people on 50% of 200 pairs' in quality.explain_unfit(report(0.9, 0.5), limits)


def test_pairs_are_never_ties():
  def row(ranks):
    return records.Ranking('', '', '', '', '', [], list('abc'), ranks)

  rng = np.random.default_rng(0)
  chosen = quality.draw_pairs([row([1, 1, 2]), row([1, 1, 1])] * 20, 15, rng)
  assert len(chosen) == 15 and all(one.ranks[i] != one.ranks[j] for one, i, j in chosen)
  assert {i < j for _, i, j in chosen} == {True, False}
  with pytest.raises(UserError, match='different ranks'):
    quality.draw_pairs([row([1, 1, 1])], 5, rng)


def test_the_table_is_aligned():
  rows = {
    'hh': quality.compare_with_people(np.array([0.9]), [True], [[2, 1]]),
    'none': quality.compare_with_people(np.array([np.nan]), [True], [[2, 1]]),
  }
  lines = quality.format_agreement(rows).splitlines()
  assert len({len(line) for line in lines}) == 1 and '100.0%' in lines[1]
