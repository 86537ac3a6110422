import itertools

import numpy as np
import pytest

from rlhf_jax.evaluation import overoptimisation


def test_best_of_n_is_the_mean_over_all_subsets():
  rng = np.random.default_rng(0)
  proxy = rng.integers(0, 4, (3, 6)).astype(float)  # with ties
  gold = rng.normal(size=(3, 6))
  found = overoptimisation.best_of_n(proxy, gold, [1, 2, 3, 6])
  for place, count in enumerate([1, 2, 3, 6]):
    values = []
    for row in range(3):
      for chosen in itertools.combinations(range(6), count):
        best = max(proxy[row, i] for i in chosen)
        values.append([best, np.mean([gold[row, i] for i in chosen if proxy[row, i] == best])])
    want = np.mean(values, axis=0)
    assert found['proxy'][place] == pytest.approx(want[0])
    if count in (1, 6):  # between, ties are averaged over the whole pool
      assert found['gold'][place] == pytest.approx(want[1])
  assert found['kl'][1] == pytest.approx(np.log(2) - 0.5)


def test_best_of_n_has_no_bias_where_the_truth_is_known():
  rng = np.random.default_rng(0)
  proxy = rng.normal(size=(4000, 64))
  found = overoptimisation.best_of_n(proxy, -proxy, [4])
  assert found['proxy'][0] == pytest.approx(1.0294, abs=0.01)  # of the best of 4 normal variables
  assert found['gold'][0] == pytest.approx(-1.0294, abs=0.01)


def test_the_tilt_of_a_normal_reward():
  rng = np.random.default_rng(0)
  proxy = rng.normal(size=(400, 2000))
  found = overoptimisation.tilt(proxy, 0.5 * proxy, [0.0, 1.0, 1.5])
  # π_ref exp(r) is a normal distribution around 1, with the KL ½.
  np.testing.assert_allclose(found['proxy'][:2], [0.0, 1.0], atol=0.01)
  np.testing.assert_allclose(found['gold'][:2], [0.0, 0.5], atol=0.01)
  np.testing.assert_allclose(found['kl'][:2], [0.0, 0.5], atol=0.01)
  assert overoptimisation.reward_at(0.5, found['kl'], found['proxy']) == pytest.approx(1, abs=0.02)
  assert np.isnan(overoptimisation.reward_at(3.0, found['kl'], found['proxy']))


def test_the_optimum_of_all_responses_has_no_regret():
  rng = np.random.default_rng(0)
  reference = np.log(rng.dirichlet(np.ones(50)))
  rewards = rng.normal(size=50)
  best, value = overoptimisation.tilted_reward(reference, rewards, 0.5)
  assert np.exp(best).sum() == pytest.approx(1)
  kl = np.sum(np.exp(best) * (best - reference))
  assert np.exp(best) @ rewards - 0.5 * kl == pytest.approx(value)
  assert reference @ np.zeros(50) + np.exp(reference) @ rewards < value


@pytest.mark.parametrize('form', overoptimisation.FORMS)
def test_the_forms_are_found_again(form):
  kl = np.linspace(0.3, 12, 30)
  d = np.sqrt(kl)
  gold = d * (1.2 - 0.3 * (np.log(d) if form == 'rl' else d))
  found = overoptimisation.fit_form(kl, gold, form)
  assert (found['alpha'], found['beta']) == pytest.approx((1.2, 0.3))
  assert found['r_squared'] == pytest.approx(1)
  peak = np.exp(1.2 / 0.3 - 1) if form == 'rl' else 1.2 / 0.6
  assert found['peak_kl'] == pytest.approx(peak**2)
  assert np.isnan(overoptimisation.fit_form(kl[:2], gold[:2], form)['alpha'])
