"""Agreement against published examples, and the model of people against simulations."""

import math

import krippendorff
import numpy as np
import pytest
from scipy import stats

from rlhf_jax.collect import person_model, quality, selection
from rlhf_jax.collect.quality import Order

# Krippendorff 2011, section C: four observers, twelve units; α ordinal is 0.815.
EXAMPLE = [
  [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
  [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
  [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
  [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]


def test_alpha_of_the_published_example():
  orders = []
  for person, values in enumerate(EXAMPLE):
    orders += [
      Order(unit, f'p{person}', [value]) for unit, value in enumerate(values) if value is not None
    ]
  table = [[np.nan if value is None else value for value in row] for row in EXAMPLE]
  expected = krippendorff.alpha(table, level_of_measurement='ordinal')
  assert quality.krippendorff_alpha(orders) == pytest.approx(expected, abs=1e-12)
  assert expected == pytest.approx(0.815, abs=5e-4)


def test_kendall_against_friedman():
  # W = χ²_F / (m (n − 1)), also with ties (Kendall & Gibbons 1990)
  rng = np.random.default_rng(0)
  for _ in range(20):
    raters, count = rng.integers(2, 7), rng.integers(3, 8)
    rankings = rng.integers(1, count + 1, size=(raters, count))
    chi_squared = stats.friedmanchisquare(*rankings.T).statistic
    expected = chi_squared / (raters * (count - 1))
    assert quality.kendall_w(rankings.tolist()) == pytest.approx(expected, nan_ok=True)
  assert quality.kendall_w([[1, 2, 3], [3, 2, 1]]) == 0.0
  assert math.isnan(quality.kendall_w([[1, 1], [1, 1]]))


def test_kendall_of_the_published_example():
  # the NAG Library's example program of g08daf: three rankings of ten objects, W = 0.828
  rankings = [
    [1, 4.5, 2, 4.5, 3, 7.5, 6, 9, 7.5, 10],
    [2.5, 1, 2.5, 4.5, 4.5, 8, 9, 6.5, 10, 6.5],
    [2, 1, 4.5, 4.5, 4.5, 4.5, 8, 8, 8, 10],
  ]
  assert quality.kendall_w(rankings) == pytest.approx(0.828, abs=5e-4)


def test_pairwise_agreement_habits_and_consensus():
  orders = [
    Order(1, 'a', [1, 2, 3], shown=[0, 1, 2], lengths=[9, 5, 1], gold=[1, 2, 3], seconds=10),
    Order(1, 'b', [1, 3, 2], shown=[2, 1, 0], lengths=[9, 5, 1], gold=[1, 2, 3], seconds=20),
    Order(1, 'c', [1, 1, 2], shown=[1, 0, 2], lengths=[9, 5, 1], gold=[1, 2, 3], seconds=30),
  ]
  share = quality.pairwise_agreement(orders)
  # a–b: 2 of 3; a–c: 2 of 2 (c ties one); b–c: 1 of 2, as b puts the last one second
  assert share.pairs == 7 and share.value == pytest.approx(5 / 7)
  report = quality.measure(orders)
  a, b, c = report.people
  assert (a.gold, b.gold, c.gold) == (1.0, pytest.approx(2 / 3), pytest.approx(2.5 / 3))
  assert a.first_shown == 1.0 and b.first_shown == pytest.approx(1 / 3)
  assert a.longer == 1.0 and a.seconds == 10 and c.consensus == 1.0
  assert quality.pairwise_agreement(orders[:1]).pairs == 0


def test_labels_that_are_missing():
  share = quality.Share(0.7, 0.68, 0.72, 500)
  assert quality.labels_for(share, 0.02, 100) == 0
  assert quality.labels_for(share, 0.01, 100) == 300  # half the width takes four times as many


def draw(rng, people, items, each=5, count=4, reliability=None):
  """Rankings as the model has them: (Orders, true β, true θ)."""
  if reliability is None:
    reliability = rng.normal(person_model.PRIOR_MEAN, person_model.PRIOR_DEVIATION, people)
  theta = rng.normal(size=(items, count))
  item, person, ranks = [], [], []
  for number in range(items):
    for who in rng.choice(people, each, replace=False):
      item.append(number)
      person.append(who)
      ranks.append(person_model.draw_ranking(theta[number], reliability[who], rng))
  orders = person_model.Orders(np.array(item), np.array(person), ranks)
  return orders, reliability, theta


def test_gradient_and_curvature():
  orders, beta, _ = draw(np.random.default_rng(1), people=4, items=6, each=3, count=3)
  groups = person_model._group_by_count(orders)
  value, gradient, hessian = person_model._posterior(groups, beta)
  for who in range(4):
    step = np.zeros(4)
    step[who] = 0.02
    above = person_model._posterior(groups, beta + step)
    below = person_model._posterior(groups, beta - step)
    assert (above[0] - below[0]) / 0.04 == pytest.approx(gradient[who], abs=0.02)
    assert (above[1] - below[1]) / 0.04 == pytest.approx(hessian[who], abs=0.05)


def coverage(seeds):
  """Share of true reliabilities inside their 95% intervals."""
  inside = []
  for seed in seeds:
    orders, beta, _ = draw(np.random.default_rng(seed), people=8, items=60)
    fitted = person_model.fit(orders, 8)
    inside += ((fitted.low <= beta) & (beta <= fitted.high)).tolist()
  return np.mean(inside)


def test_reliabilities_are_recovered():
  assert coverage(range(4)) >= 0.85


@pytest.mark.slow
def test_reliabilities_are_recovered_in_a_hundred_simulations():
  share = coverage(range(100))
  print(f'inside their 95% intervals: {share:.3f} of 800 reliabilities')
  assert share >= 0.9


def right_pairs(ranks, theta):
  """Share of pairs that an order has as the truth has them."""
  signs = quality._signs(ranks) * quality._signs((-theta).tolist())
  return np.mean(signs > 0) + 0.5 * np.mean(signs == 0)


def test_reliability_beats_the_majority_where_a_third_answers_at_random():
  rng = np.random.default_rng(0)
  beta = np.array([3.0] * 6 + [0.0] * 3)
  orders, _, theta = draw(rng, people=9, items=150, reliability=beta)
  fitted = person_model.fit(orders, 9)
  assert fitted.high[6:].max() < fitted.low[:6].min()  # who is careless is known
  gains = []
  for item in range(150):
    rankings = [orders.ranks[row] for row in np.flatnonzero(orders.item == item)]
    majority, _ = quality.majority_order(rankings)
    weighted = quality.order_of_means(fitted.means[item])
    gains.append(right_pairs(weighted, theta[item]) - right_pairs(majority, theta[item]))
  # the lower end of the 95% interval of the mean gain
  assert np.mean(gains) - 1.96 * np.std(gains) / np.sqrt(150) > 0


def test_confidence_is_the_share_of_right_pairs():
  orders, _, theta = draw(np.random.default_rng(2), people=6, items=300, each=3)
  fitted = person_model.fit(orders, 6)
  confidence = np.mean([quality.mean_confidence(fitted.above[item]) for item in range(300)])
  right = np.mean(
    [right_pairs(quality.order_of_means(fitted.means[item]), theta[item]) for item in range(300)]
  )
  assert confidence == pytest.approx(right, abs=0.03)


def test_doubt_is_high_near_a_half_and_where_members_differ():
  texts = ['x', 'y']
  sure = selection.measure_doubt(np.array([[0.0, 5.0]]), texts)
  near = selection.measure_doubt(np.array([[0.0, 0.1]]), texts)
  split = selection.measure_doubt(np.array([[0.0, 5.0], [5.0, 0.0]]), texts)
  assert sure < 0.05 < near and split == pytest.approx(math.log(2))
  # people cannot order equal texts, so there is nothing to ask
  assert selection.measure_doubt(np.array([[1.0, 1.0]]), ['x', 'x ']) == 0
