import numpy as np

from rlhf_jax.evaluation.controlled_rate import controlled_win_rate


def _pairs(rng, effect, own_words, other_words, worth_of_words):
  """Utilities of responses that differ by an effect, and by what a judge gives for words."""
  own = effect + worth_of_words * own_words + rng.gumbel(size=own_words.shape)
  other = worth_of_words * other_words + rng.gumbel(size=other_words.shape)
  return own, other


def test_length_that_a_judge_likes_does_not_count():
  rng = np.random.default_rng(0)
  own_words = rng.normal(2.0, 2.0, (3000, 2))
  other_words = rng.normal(0.0, 2.0, (3000, 2))
  own, other = _pairs(rng, 0.0, own_words, other_words, worth_of_words=0.5)
  plain = (own[:, :, None] > other[:, None, :]).mean()
  rate, (low, high) = controlled_win_rate(own, other, {'words': (own_words, other_words)})
  assert plain > 0.65  # longer responses win
  assert abs(rate - 0.5) < 0.03 and low < rate < high
  # What is not length is found beside it: σ(1) of the difference of two Gumbel variables.
  own, other = _pairs(rng, 1.0, own_words, other_words, worth_of_words=0.5)
  rate, interval = controlled_win_rate(own, other, {'words': (own_words, other_words)})
  np.testing.assert_allclose(rate, 1 / (1 + np.exp(-1)), atol=0.03)
  # The one-step bootstrap has the width that refitting has (here that of 3000 prompts).
  assert 0.01 < interval[1] - interval[0] < 0.06


def test_what_wins_by_a_phrase_alone_is_a_tie():
  other = np.random.default_rng(1).normal(size=(200, 1))
  phrase = np.arange(200)[:, None] % 5 > 0  # the others have it already
  own = other + 0.2 * phrase
  features = {'polite': (phrase.astype(float), np.zeros((200, 1)))}
  assert (own > other).mean() == 0.8
  rate, _ = controlled_win_rate(own, other, features)
  assert abs(rate - 0.5) < 0.1


def test_edges():
  ours = np.array([[1.0], [2.0], [3.0]])
  words = (np.ones((3, 1)), np.ones((3, 1)))  # never different
  rate, (low, high) = controlled_win_rate(ours, ours, {'words': words})
  assert rate == low == high == 0.5
  rate, (low, high) = controlled_win_rate(ours + 1, ours, {'words': words})
  assert 0.9 < rate <= 1 and low > 0.9 and high <= 1
