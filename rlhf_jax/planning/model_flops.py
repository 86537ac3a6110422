"""Counts the FLOPs that a model needs for its tokens, whatever the machine does beside them.

Counted are the products of the matrices and the causal half of attention: 2 FLOPs
for each element of a matrix and each token going forward, twice that going
backward (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). What is computed
again to save memory, masked places of attention, norms and the optimizer do not
count, so that the share of a machine's limit that remains is comparable between
implementations.
"""

import dataclasses

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.planning import work


def sequence_flops(config: ModelConfig, length: float, head: float) -> float:
  """Counts the FLOPs of a forward pass over one sequence.

  Args:
    config: the model's shape.
    length: its tokens; a mean of several sequences need not be whole.
    head: places at which the logits of the next token are computed.
  """
  elements = work.count_matrix_elements(config, config.experts_per_token)
  logits = head * config.embed * config.vocab_size
  # Queries with keys, then weights with values; a multiplication and an addition each.
  attention = 4 * config.heads * config.head_dim * count_visible(config, length)
  return 2.0 * (length * elements + logits) + attention


def count_visible(config: ModelConfig, length: float) -> float:
  """Counts the pairs of a query and a key that it sees in one sequence, over all layers."""
  pairs = 0.0
  for window in config.layer_windows:
    seen = min(window or length, length)  # by the last query
    # 1, 2, …, seen, and then `seen` again for every query behind.
    pairs += seen * (seen + 1) / 2 + (length - seen) * seen
  return pairs


def needed_flops(config: ModelConfig, length: float, read: float, head: float) -> float:
  """Counts the FLOPs that a forward pass over one sequence needs where few states are read.

  Of the other tokens the last layer needs only keys and values: no query, nothing after attention.

  Args:
    config: the model's shape.
    length: its tokens.
    read: tokens whose states are read, the last ones.
    head: places at which the logits of the next token are computed.
  """
  layer = dataclasses.replace(config, layers=1, windows=tuple(config.layer_windows[-1:]))
  keys_and_values = 2 * config.embed * config.kv_heads * config.head_dim
  elements = work.count_matrix_elements(layer, config.experts_per_token) - keys_and_values
  attention = 4 * config.heads * config.head_dim * count_visible(layer, length - read)
  unread = 2.0 * (length - read) * elements + attention
  return sequence_flops(config, length, head) - unread


def decoding_bytes(
  config: ModelConfig,
  rows: int,
  prompt_length: int,
  response_length: int,
  itemsize: int,
) -> float:
  """Counts the bytes that decoding must read: at each step all matrices, and the filled cache.

  Args:
    config: the model's shape.
    rows: responses that are decoded at once.
    prompt_length: tokens of a prompt.
    response_length: steps.
    itemsize: bytes of an element of parameters and cache.
  """
  elements = work.count_matrix_elements(config, config.experts or 1)
  elements += config.embed * config.vocab_size
  place = 2 * config.layers * config.kv_heads * config.head_dim  # keys and values
  filled = prompt_length + (response_length - 1) / 2  # places, mean over the steps
  return response_length * itemsize * (elements + rows * place * filled)
