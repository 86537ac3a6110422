import numpy as np

from rlhf_jax.evaluation import table
from rlhf_jax.generation.responses import Responses


def test_a_row_and_its_text():
  answers = Responses(
    [['a', 'b']] * 2,
    lengths=np.array([[1, 3], [5, 7]]),
    ended=np.array([[True, False], [True, True]]),
    kl=np.array([[1.0, 2.0], [3.0, 4.0]]),
  )
  judged = {
    'helpful': np.array([[1.0, 0.0], [1.0, 1.0]]),
    'utility': np.array([[1.0, 0.0], [2.0, 2.0]]),
  }
  baseline = {
    'helpful': np.array([[0.0, 0.0], [1.0, 0.0]]),
    'utility': np.array([[0.0, 0.0], [2.0, 1.0]]),
  }
  row = table.make_row(answers, judged, baseline)
  assert row == {
    'helpful': 0.75,
    'helpful_ci95': [0.5, 1.0],
    'utility': 1.25,
    'utility_ci95': [0.5, 2.0],
    'utility_gain': 0.5,
    'utility_gain_ci95': [0.5, 0.5],
    'helpful_gain': 0.5,
    'helpful_gain_ci95': [0.5, 0.5],
    'win_rate_vs_sft': 0.75,
    'win_rate_vs_sft_ci95': [0.75, 0.75],
    'kl_to_sft': 2.5,
    'response_length': 4.0,
    'eos_rate': 0.75,
    'distinct': 0.5,
  }
  head, line = table.format_table({'ppo': row}).splitlines()
  assert head.split()[:3] == ['model', 'helpful', 'utility']
  assert line.split() == [
    'ppo',
    '75.0%',
    '1.250',
    '75.0%',
    '75.0%',
    '–',
    '75.0%',
    '2.50',
    '4.0',
    '75.0%',
    '50.0%',
  ]


def test_substance_is_compared_apart_from_style():
  answers = Responses([['a'], ['b']], np.ones((2, 1)), np.ones((2, 1), bool))
  judged = {'utility': np.array([[2.0], [2.0]]), 'substance': np.array([[7], [3]])}
  baseline = {'utility': np.array([[0.0], [0.0]]), 'substance': np.array([[7], [7]])}
  row = table.make_row(answers, judged, baseline)
  assert (row['win_rate_vs_sft'], row['substance_win_rate_vs_sft']) == (1.0, 0.25)
