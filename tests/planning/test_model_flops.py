import dataclasses

import pytest

from rlhf_jax import testing
from rlhf_jax.planning import model_flops

CONFIG = testing.MODEL_CONFIG  # D 32, L 2, H 4, N 2, C 8, F 48, V 64
# query and output 32 · 32 each, key and value 32 · 16 each; gate, up and down 32 · 48 each
MATRICES = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


def test_a_sequence_by_hand():
  # Of 3 tokens 1 + 2 + 3 pairs are visible in each of 2 layers.
  attention = 4 * 4 * 8 * 2 * 6
  body = 2 * 3 * MATRICES + attention
  assert model_flops.sequence_flops(CONFIG, 3, 0) == body
  assert model_flops.sequence_flops(CONFIG, 3, 2) == body + 2 * 2 * 32 * 64


@pytest.mark.parametrize('windows, length', [((), 7), ((3,), 7), ((3, 0), 7), ((9,), 4)])
def test_visible_pairs_by_counting(windows, length):
  config = dataclasses.replace(CONFIG, windows=windows)
  pairs = 0
  for window in config.layer_windows:
    for query in range(length):
      pairs += sum(not window or query - key < window for key in range(query + 1))
  assert model_flops.count_visible(config, length) == pairs


def test_a_sequence_of_which_the_end_is_read_by_hand():
  # The last layer: of 3 of 5 tokens only key and value, and 1 + 2 + 3 of its 15 pairs fewer.
  query_and_output, mlp = 2 * 32 * 32, 3 * 32 * 48
  unread = 2 * 3 * (query_and_output + mlp) + 4 * 4 * 8 * 6
  full = model_flops.sequence_flops(CONFIG, 5, 1)
  assert model_flops.needed_flops(CONFIG, 5, 2, 1) == full - unread
  assert model_flops.needed_flops(CONFIG, 5, 5, 1) == full


def test_decoding_reads_the_matrices_and_the_filled_cache():
  # 2 steps after 3 tokens: the cache has 3, then 4 filled places of 2 · 2 · 2 · 8 numbers.
  read = 2 * (MATRICES + 32 * 64) + 5 * 2 * 2 * 2 * 8 * (3 + 4)
  assert model_flops.decoding_bytes(CONFIG, 5, 3, 2, 4) == 4 * read
