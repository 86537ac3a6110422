import gzip
import math

import numpy as np

from rlhf_jax.data.records import Document
from rlhf_jax.evaluation import baselines


def documents(*texts):
  return [Document('', '', '', text) for text in texts]


def test_bigrams_cost_a_bit_for_a_fair_coin_and_nothing_for_a_certain_letter():
  rng = np.random.default_rng(0)

  def coin(n):
    return ''.join(rng.choice(['a', 'b'], n))

  got = baselines.nats_per_character(documents(coin(20000)), documents(coin(5000)))
  np.testing.assert_allclose(got['bigram_nats_per_character'], math.log(2), rtol=0.01)
  alternating = baselines.nats_per_character(documents('ab' * 5000), documents('ab' * 500))
  assert alternating['bigram_nats_per_character'] < 0.01


def test_gzip_is_gzip_and_unseen_letters_are_finite():
  text = 'the quick brown fox ' * 40
  got = baselines.nats_per_character(documents('aaaa'), documents(text))
  assert got['gzip_nats_per_character'] == 8 * math.log(2) * len(
    gzip.compress(text.encode(), 9)
  ) / len(text)
  assert math.isfinite(got['bigram_nats_per_character'])
