import numpy as np

from rlhf_jax.evaluation import winrate


def test_a_tie_is_half_a_win():
  won = winrate.win_rate([[1.0, 2.0], [0.5, 0.5], [0.0, 3.0]], [[0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])
  # Every response meets every one: 1 and 2 meet 0 and 2, which is win, loss, win and tie.
  np.testing.assert_array_equal(won, [0.625, 0.0, 0.625])
  np.testing.assert_array_equal(winrate.win_rate([[1.0]], [[0.0, 1.0, 2.0, 2.0]]), [0.375])
  ours = np.random.default_rng(0).normal(size=(5, 3))
  np.testing.assert_allclose(winrate.win_rate(ours, ours), 0.5)
  assert winrate.win_rate([[0.1 + 0.2]], [[0.3]]) == 0.5  # rounding is no win


def test_interval_covers_the_truth_about_as_often_as_it_says():
  rng, inside = np.random.default_rng(0), 0
  for trial in range(200):
    low, high = winrate.bootstrap((rng.random(100) < 0.65).astype(float), seed=trial, resamples=400)
    inside += low <= 0.65 <= high
  assert 0.90 <= inside / 200 <= 0.99


def test_samples_of_one_prompt_are_drawn_together():
  alone = np.tile([0.0, 1.0], 50)
  low, high = winrate.bootstrap(alone)
  doubled = np.repeat(alone.reshape(-1, 1), 2, axis=1).mean(
    axis=1
  )  # two equal samples of each prompt tell no more
  np.testing.assert_allclose(winrate.bootstrap(doubled), (low, high))
  assert 0.15 < high - low < 0.25  # 2 · 1.96 · 0.5 / √100


def test_clusters_are_drawn_whole():
  values = np.repeat([0.0, 1.0, 0.0, 1.0], 25)
  clusters = np.repeat(['a', 'b', 'c', 'd'], 25)
  low, high = winrate.bootstrap(values, clusters)
  alone = winrate.bootstrap([0.0, 1.0, 0.0, 1.0])  # a cluster of equal prompts tells as much as one
  np.testing.assert_allclose((low, high), alone)
  assert winrate.bootstrap(values)[0] > low + 0.2


def test_prompts_of_which_a_measure_says_nothing_do_not_count():
  values = np.array([1.0, np.nan, 0.0, 1.0, np.nan])
  assert winrate.bootstrap(values) == winrate.bootstrap([1.0, 0.0, 1.0])
