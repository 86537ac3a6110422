import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import ranking


def softplus(x):
  return np.logaddexp(0.0, x)


def by_hand(name, scores, ranks, group, sure=None):
  """Loops over prompts and pairs in float64: (sum, count). `sure` is the probability
  that a place's order is right.
  """
  total, count = 0.0, 0
  for b in range(len(scores)):
    for g in set(group[b]) - {0}:
      places = [i for i in range(len(scores[b])) if group[b][i] == g]
      pairs = [(i, j) for i, j in itertools.permutations(places, 2) if ranks[b][i] < ranks[b][j]]
      if not pairs:
        continue
      p = 1.0 if sure is None else sure[b][places[0]]
      losses = [
        p * softplus(scores[b][j] - scores[b][i]) + (1 - p) * softplus(scores[b][i] - scores[b][j])
        for i, j in pairs
      ]
      if name == 'pairwise':
        total, count = total + np.mean(losses), count + 1
      elif name == 'plain_pairs':
        total, count = total + np.sum(losses), count + len(pairs)
      else:
        count += 1
        for i in places:
          worse = [scores[b][j] for j in places if ranks[b][j] > ranks[b][i]]
          if worse:
            total += np.log(np.sum(np.exp([scores[b][i], *worse]))) - scores[b][i]
  return total, count


@functools.cache
def compiled(name):
  """(scores, ranks, group, …) → ((sum, number), gradient of the sum), in one program."""
  return jax.jit(jax.value_and_grad(ranking.REWARD_LOSSES[name].function, has_aux=True))


def packed(seed, B=4, K=12):
  """Rows that hold several prompts of 2 to 9 responses, with ties, empty places and a
  row without any.
  """
  rng = np.random.default_rng(seed)
  group, ranks = np.zeros((B, K), np.int32), np.zeros((B, K), np.int32)
  for b in range(B - 1):
    start, g = 0, 1
    while (k := int(rng.integers(2, 10))) <= K - start:
      group[b, start : start + k], ranks[b, start : start + k] = g, rng.integers(1, k + 1, k)
      start, g = start + k, g + 1
  return rng.normal(size=(B, K)), ranks, group


@pytest.mark.parametrize('name', list(ranking.REWARD_LOSSES))
@pytest.mark.parametrize('seed', range(4))
def test_losses_and_gradients_equal_the_slow_loops(name, seed):
  scores, ranks, group = packed(seed)
  want, count = by_hand(name, scores, ranks, group)
  (got, weight), gradient = compiled(name)(jnp.asarray(scores), ranks, group)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  np.testing.assert_allclose(weight, count, rtol=1e-6)
  for b, k in [(0, 0), (1, 3), (2, 5)]:
    step = np.zeros_like(scores)
    step[b, k] = 1e-5
    slope = (
      by_hand(name, scores + step, ranks, group)[0] - by_hand(name, scores - step, ranks, group)[0]
    ) / 2e-5
    np.testing.assert_allclose(gradient[b, k], slope, atol=1e-4)
  same = (group[:, :, None] == group[:, None, :]) & (group > 0)[:, :, None]
  np.testing.assert_allclose(
    (gradient[:, None, :] * same).sum(-1), 0.0, atol=1e-5
  )  # only differences matter


@pytest.mark.parametrize('K', range(2, 10))
@pytest.mark.parametrize('name', list(ranking.REWARD_LOSSES))
def test_every_size_with_soft_labels_and_ties(name, K):
  """Loss and the whole gradient; one row is empty, one all tied, and labels are soft
  where a loss takes such.
  """
  rng = np.random.default_rng(K)
  scores, ranks = rng.normal(size=(4, K)), rng.integers(1, K + 1, (4, K)).astype(np.int32)
  ranks[3] = rng.permutation(K) + 1
  ranks[1], group = 2, np.array([[1], [1], [0], [1]], np.int32).repeat(K, 1)
  sure = None if name == 'plackett_luce' else rng.uniform(0.5, 1.0, (4, 1)).repeat(K, 1)
  soft = () if sure is None else (jnp.float32(sure),)
  want, count = by_hand(name, scores, ranks, group, sure)

  (got, weight), gradient = compiled(name)(jnp.float32(scores), ranks, group, *soft)
  np.testing.assert_allclose([got, weight], [want, count], rtol=1e-5)
  slopes = np.zeros_like(scores)
  for place in np.ndindex(scores.shape):
    step = np.zeros_like(scores)
    step[place] = 1e-6
    slopes[place] = (
      by_hand(name, scores + step, ranks, group, sure)[0]
      - by_hand(name, scores - step, ranks, group, sure)[0]
    ) / 2e-6
  np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-5)
  assert not gradient[1].any() and not gradient[2].any()


@pytest.mark.parametrize('name', list(ranking.REWARD_LOSSES))
def test_two_responses_are_bradley_terry(name):
  total, weight = ranking.REWARD_LOSSES[name].function(
    jnp.array([[0.3, 1.1]]), jnp.array([[2, 1]]), jnp.array([[1, 1]])
  )
  np.testing.assert_allclose(total, -np.log(1 / (1 + np.exp(-0.8))), rtol=1e-6)
  assert weight == 1


def test_plackett_luce_by_hand():
  total, _ = ranking.plackett_luce(
    jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[2, 3, 1]]), jnp.array([[1, 1, 1]])
  )
  want = (np.log(np.exp(2) + np.exp(1) + 1) - 2) + (np.log(np.exp(1) + 1) - 1)
  np.testing.assert_allclose(total, want, rtol=1e-6)


def test_a_tie_says_nothing():
  for loss in ranking.REWARD_LOSSES.values():
    total, weight = loss.function(
      jnp.array([[5.0, -5.0]]), jnp.array([[1, 1]]), jnp.array([[1, 1]])
    )
    assert (total, weight) == (0, 0)


@pytest.mark.parametrize('name', list(ranking.REWARD_LOSSES))
def test_order_of_places_changes_nothing(name):
  scores, ranks, group = packed(9)
  order = np.random.default_rng(0).permutation(scores.shape[1])
  a = ranking.REWARD_LOSSES[name].function(jnp.asarray(scores), ranks, group)
  b = ranking.REWARD_LOSSES[name].function(
    jnp.asarray(scores[:, order]), ranks[:, order], group[:, order]
  )
  np.testing.assert_allclose(a, b, rtol=1e-5)


def test_accuracy_counts_equal_scores_half():
  right, pairs = ranking.accuracy(
    jnp.array([[2.0, 1.0, 1.0]]), jnp.array([[1, 2, 3]]), jnp.array([[1, 1, 1]])
  )
  assert (right, pairs) == (2.5, 3)


def test_ranks_from_scores():
  scores = jnp.array([[0.5, 2.0, 0.5, -1.0], [1.0, 1.0, 1.0, 1.0]])
  np.testing.assert_array_equal(ranking.from_scores(scores), [[2, 1, 2, 4], [1, 1, 1, 1]])


def test_the_best_and_the_worst_of_each_prompt():
  ranks, group = np.array([[1, 2, 3, 2, 2, 1, 2, 5, 0]]), np.array([[1, 1, 1, 2, 2, 3, 4, 5, 0]])
  best, worst = ranking.best_and_worst(ranks, group)  # of three, of two that tie, and of one each
  np.testing.assert_array_equal(best, [[1, 0, 0, 0, 0, 1, 0, 0, 0]])
  np.testing.assert_array_equal(worst, [[0, 0, 1, 0, 0, 0, 1, 1, 0]])
