"""Rates by kind of prompt, on a table small enough to count by hand."""

import numpy as np

from rlhf_jax.evaluation import by_kind


def test_gains_and_losses_are_told_apart():
  """Better in one kind and worse in the other: equal on the whole, and not by kind."""
  kinds = ['fact', 'form', 'fact', 'form']
  ours = {
    'helpful': np.array([[1, 1], [0, 0], [1, 0], [0, 1]], float),
    'substance': np.array([[7, 7], [3, 3], [7, 3], [3, 7]], float),
  }
  theirs = {'substance': np.array([[3], [7], [3], [7]], float)}
  rows = by_kind.make_rows(kinds, ours, theirs, ['a', 'b', 'c', 'd'])
  assert list(rows) == ['fact', 'form']
  assert rows['fact']['prompts'] == rows['form']['prompts'] == 2
  assert (rows['fact']['helpful'], rows['form']['helpful']) == (0.75, 0.25)
  # facts: two wins, then a win and a tie; forms: two losses, then a loss and a tie
  assert rows['fact']['substance_win_rate_vs_sft'] == (1 + 0.75) / 2
  assert rows['form']['substance_win_rate_vs_sft'] == (0 + 0.25) / 2
  low, high = rows['fact']['helpful_ci95']
  assert low == 0.5 and high == 1.0  # of two clusters at 1 and 0.5
