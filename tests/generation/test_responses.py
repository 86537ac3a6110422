import numpy as np

from rlhf_jax.generation import responses


def test_best_of_n_takes_the_highest_of_each_group():
  """Two prompts, two answers each, each the best of three."""
  scores = np.array([[0.1, 0.9, 0.2, -1.0, -3.0, -2.0], [5.0, 5.0, 4.0, 0.0, 1.0, 2.0]])
  given = responses.Responses(
    [list('abcdef'), list('uvwxyz')],
    np.arange(12).reshape(2, 6),
    np.arange(12).reshape(2, 6) % 2 == 0,
    None,
    scores,
  )
  best = responses.select_best_of(given, 3)
  assert best.texts == [['b', 'd'], ['u', 'z']]
  np.testing.assert_array_equal(best.lengths, [[1, 3], [6, 11]])
  np.testing.assert_array_equal(best.ended, [[False, False], [True, False]])
  np.testing.assert_array_equal(best.scores, [[0.9, -1.0], [5.0, 2.0]])
  np.testing.assert_allclose(best.kl, np.log(3) - 2 / 3)
