import numpy as np
import pytest

from rlhf_jax.evaluation import precision


def test_prompts_judges_and_the_rest_are_told_apart():
  found = []
  for seed in range(60):
    rng = np.random.default_rng(seed)
    effects = 0.3 * rng.normal(size=(60, 1)) + 0.2 * rng.normal(size=(1, 12))
    values = effects + 0.4 * rng.normal(size=(60, 12))
    seen = rng.random((60, 12)) < 0.4  # nobody judges everything
    prompts, judges = np.nonzero(seen)
    found.append([*precision.variance_components(values[seen], prompts, judges).values()])
  np.testing.assert_allclose(np.mean(found, axis=0), [0.09, 0.04, 0.16], rtol=0.15)


def test_one_judge_says_nothing_of_judges():
  rng = np.random.default_rng(0)
  alone = precision.variance_components(rng.normal(size=500), np.arange(500), np.zeros(500, int))
  assert alone['prompt'] == pytest.approx(1, abs=0.2)
  assert np.isnan(alone['judge']) and np.isnan(alone['rest'])
  # Asked three times each, the same judge is still one.
  again = precision.variance_components(
    np.repeat(rng.normal(size=100), 3), np.repeat(np.arange(100), 3), np.zeros(300, int)
  )
  assert np.isnan(again['judge'])


def test_the_sample_that_the_recipe_names_has_five_points():
  # 384 prompts give ±5 points at 50%; what a test finds with 80% is larger.
  error = 0.5 / 384**0.5
  assert 1.96 * error == pytest.approx(0.05, abs=1e-4)
  difference = precision.detectable_difference(error)
  assert difference == pytest.approx(2.8016 * error, rel=1e-4)
  assert precision.prompts_needed(error, 384, difference) == pytest.approx(384, abs=1)
  assert precision.prompts_needed(error, 384, difference / 2) == pytest.approx(4 * 384, abs=2)
  assert precision.standard_error_of([0.4, 0.6]) == pytest.approx(0.05102, abs=1e-5)


def test_a_test_at_the_detectable_difference_finds_it_four_times_in_five():
  rng = np.random.default_rng(0)
  difference = precision.detectable_difference(0.5 / 400**0.5)
  rates = rng.binomial(400, 0.5 + difference, 4000) / 400
  assert np.mean(rates - 0.5 > 1.96 * 0.5 / 400**0.5) == pytest.approx(0.8, abs=0.03)
