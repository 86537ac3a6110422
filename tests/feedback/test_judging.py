import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging, quality
from rlhf_jax.feedback.judging import Comparison, Judgements


def longer(comparisons, bias=0.0):
  """A judge who likes the longer answer, and the one that stands first."""
  p = [1 / (1 + np.exp(-(len(one.first) - len(one.second) + bias))) for one in comparisons]
  return Judgements(np.array(p), [one.first for one in comparisons])


def comparison(first, second):
  return Comparison([dict(role='user', content='Why?')], first, second)


def test_both_orders_remove_a_positional_bias():
  rng = np.random.default_rng(0)
  pairs = [comparison('x' * a, 'x' * b) for a, b in rng.integers(1, 6, (200, 2)) if a != b]
  truth = np.array([len(pair.first) > len(pair.second) for pair in pairs])

  def biased(asked):
    return longer(asked, bias=3.0)

  alone = biased(pairs).probabilities > 0.5
  judged, as_shown = judging.ask_both_orders(biased)(pairs)
  assert (alone == truth).mean() < 0.85 and ((judged.probabilities > 0.5) == truth).all()
  swapped, _ = judging.ask_both_orders(biased)([pair.swapped() for pair in pairs])
  np.testing.assert_allclose(judged.probabilities + swapped.probabilities, 1, atol=1e-12)
  said = quality.measure_position_bias(as_shown)
  assert said['first'] > 0.6 and said['consistency'] < 0.7
  assert (
    quality.measure_position_bias(judging.ask_both_orders(longer)(pairs)[1])['consistency'] == 1
  )


def test_no_verdict_in_one_order_is_none():
  def judge(comparisons):
    return Judgements(
      np.array([np.nan if one.first == 'b' else 0.9 for one in comparisons]),
      [''] * len(comparisons),
    )

  judged, as_shown = judging.ask_both_orders(judge)([comparison('a', 'b'), comparison('a', 'c')])
  assert np.isnan(judged.probabilities[0]) and judged.probabilities[1] == pytest.approx(0.5)
  assert quality.measure_position_bias(as_shown)['without'] == 1


def test_panel_is_the_weighted_mean_of_those_with_a_verdict():
  def say(*p):
    return lambda comparisons: Judgements(np.array(p), ['because'] * len(p))

  panel = judging.build_panel({'a': say(1.0, np.nan, np.nan), 'b': say(0.2, 0.6, np.nan)}, (3, 1))
  judged = panel([comparison('x', 'y')] * 3)
  np.testing.assert_allclose(judged.probabilities, [0.8, 0.6, np.nan])
  assert judged.rationales[0] == 'a: because\nb: because' and list(judged.each) == ['a', 'b']
  assert quality.compare_judges(
    {'a': np.array([1, 0.2, np.nan]), 'b': np.array([0.8, 0.7, 0.1])}
  ) == {'a, b': 0.5}
  with pytest.raises(UserError, match='expected 2 positive numbers'):
    judging.build_panel({'a': longer, 'b': longer}, (1, 0))
