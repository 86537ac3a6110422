import numpy as np

from rlhf_jax.evaluation import pair_models
from rlhf_jax.evaluation.pair_models import Pairs


def make_pairs(better, worse, clusters=None, confidence=None, source='people'):
  count = len(better)
  return Pairs(
    better=np.asarray(better),
    worse=np.asarray(worse),
    weights=np.ones(count),
    confidence=np.ones(count) if confidence is None else np.asarray(confidence),
    clusters=np.arange(count).astype(str) if clusters is None else np.asarray(clusters),
    sources=np.full(count, source),
  )


def test_fit_finds_the_logistic_regression_that_made_the_labels():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(4000, 3))
  first, second = rng.integers(4000, size=(2, 6000))
  margins = (features[first] - features[second]) @ np.array([1.0, -0.5, 0.0])
  first_wins = rng.random(6000) < 1 / (1 + np.exp(-margins))
  pairs = make_pairs(np.where(first_wins, first, second), np.where(first_wins, second, first))
  found = pair_models.fit(features, pairs, ridge=1e-6)
  np.testing.assert_allclose(found, [1.0, -0.5, 0.0], atol=0.06)
  # A soft label says the same as many verdicts: p = σ(margin) gives back the margin.
  chance = 1 / (1 + np.exp(-0.7))
  soft = make_pairs([0], [1], confidence=[chance])
  found = pair_models.fit(np.array([[1.0], [0.0]]), soft, ridge=1e-9)
  np.testing.assert_allclose(found, [0.7], atol=1e-3)


def test_folds_hold_whole_clusters_and_are_measured_by_others():
  # What distinguishes the better text is its cluster's own: nobody who has not seen it knows.
  clusters = np.repeat(np.arange(60), 10)
  features = np.zeros((2 * 600, 60))
  features[np.arange(600), clusters] = np.where(clusters % 2, 1.0, -1.0)
  pairs = make_pairs(np.arange(600), np.arange(600, 1200), clusters=clusters.astype(str))
  folds = pair_models.assign_folds(pairs.clusters, 5)
  assert sorted(np.bincount(folds)) == [120] * 5
  assert all(len(set(folds[clusters == cluster])) == 1 for cluster in range(60))
  right = pair_models.cross_validate(features, pairs, folds)
  assert (right == 0.5).all()  # a tie everywhere, where leaking would give 1
  table = pair_models.compare_models({'a': right, 'b': np.ones(600)}, pairs, 'b')
  assert table['accuracy']['b'] == 1.0 and table['gain']['a'] == 0.5
  assert table['gain']['a_ci95'] == [0.5, 0.5]


def test_bigrams_count_words_and_their_neighbours():
  bags = pair_models.bags_of_bigrams(['No, no dog', 'a dog'])
  # no (twice), ',', dog, 'no ,', ', no', 'no dog'; a, dog, 'a dog'
  np.testing.assert_allclose(sorted(bags[0].data), [*[np.log(2)] * 5, np.log(3)])
  assert bags[1].nnz == 3
  assert bags[0].multiply(bags[1]).nnz == 1  # 'dog'
  # In fewer coordinates the fit is the same.
  bags = pair_models.bags_of_bigrams(['a b c', 'c d', 'a d e', 'b b'])
  pairs = make_pairs([0, 2, 0], [1, 1, 3])
  rotated = pair_models.rotate(bags)
  assert rotated.shape == (4, 4)
  margins = [
    (features[pairs.better] - features[pairs.worse]) @ pair_models.fit(features, pairs, 0.1)
    for features in (bags, rotated)
  ]
  np.testing.assert_allclose(margins[0], margins[1], atol=1e-4)
