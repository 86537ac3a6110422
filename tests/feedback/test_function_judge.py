"""Python functions as judges."""

import textwrap

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import function_judge
from rlhf_jax.feedback.judging import Comparison

FUNCTIONS = """
  NUMBER = 3

  def longer(comparisons, sure=1.0):
    gaps = [len(row.first) - len(row.second) for row in comparisons]
    return [float('nan') if not gap else sure if gap > 0 else 1 - sure for gap in gaps]

  def many(comparisons):
    return [0.5] * (len(comparisons) + 1)

  def large(comparisons):
    return [1.5] * len(comparisons)

  def words(comparisons):
    return ['first'] * len(comparisons)

  def nothing(comparisons):
    return None

  def broken(comparisons):
    raise KeyError('no such\\nword')
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'own_judges.py').write_text(textwrap.dedent(FUNCTIONS))
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(__import__('sys').modules, 'own_judges', raising=False)
  return 'own_judges'


def comparisons(*pairs):
  messages = [dict(role='user', content='Why?')]
  return [Comparison(messages, first, second) for first, second in pairs]


def test_probabilities_and_no_verdict(module):
  judge = function_judge.build_function_judge(f'{module}:longer(sure=0.75)')
  judged = judge(comparisons(('a b', 'a'), ('a', 'a b'), ('a', 'b')))
  np.testing.assert_array_equal(judged.probabilities, [0.75, 0.25, np.nan])
  assert judged.probabilities.dtype == np.float64
  assert judged.rationales == ['', '', ''] and judged.each == {}
  assert judge([]).probabilities.shape == (0,)


@pytest.mark.parametrize(
  'function, message',
  [
    ('many', 'expected 2 probabilities from 0 to 1, or NaN for no verdict, got [0.5, '),
    ('large', 'expected 2 probabilities from 0 to 1, or NaN for no verdict, got [1.5, '),
    ('words', "got ['first', 'first']"),
    ('nothing', 'got None'),
    ('broken', "KeyError: 'no such"),
  ],
)
def test_what_a_wrong_function_returns_is_named(module, function, message):
  name = f'{module}:{function}'
  judge = function_judge.build_function_judge(name)
  with pytest.raises(UserError) as error:
    judge(comparisons(('a', 'b'), ('c', 'd')))
  assert str(error.value).startswith(f'judge {name!r}: ') and message in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['own_judges:NUMBER', 'own_judges:none', 'no_module:judge'])
def test_what_is_no_function_is_named_at_once(module, name):
  with pytest.raises(UserError, match=f'judge {name!r}: ') as error:
    function_judge.build_function_judge(name)
  assert '\n' not in str(error.value)
