"""Annotators: how often they are right, and what sways them."""

import numpy as np
import pytest

from rlhf_jax.data import tinyworld
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tinyworld import oracle
from rlhf_jax.data.tinyworld.people import Annotator, draw_annotators, rank_responses
from rlhf_jax.errors import UserError


@pytest.fixture(scope='module')
def answered():
  rankings = tinyworld.records('ranking', 'train', count=200)
  prompts = {row.messages[0]['content']: row for row in tinyworld.records('prompt', 'train')}
  return [(prompts[row.messages[0]['content']], row.responses) for row in rankings]


def accuracy(annotator, answered, seed=0):
  rng, right = np.random.default_rng(seed), []
  for prompt, responses in answered:
    ranks = rank_responses(prompt, responses, annotator, rng)
    values = [oracle.judge(prompt, text).utility for text in responses]
    right += [
      ranks[i] < ranks[j] for i in range(4) for j in range(4) if values[i] > values[j] + 0.1
    ]
  return np.mean(right)


def test_accuracy_falls_with_temperature(answered):
  accuracies = [accuracy(Annotator(temperature), answered) for temperature in (0.0, 0.3, 1.0, 5.0)]
  assert accuracies[0] == 1.0
  assert 0.8 < accuracies[1] < 0.99 and accuracies[1] > accuracies[2] + 0.05 > accuracies[3] + 0.1
  assert 0.5 < accuracies[3] < 0.65


def test_noise_is_plackett_luce():
  """P(first) of two is the logistic function of the utility difference over the temperature."""
  prompt = next(
    row
    for row in tinyworld.records('prompt', 'train')
    if row.meta['kind'] == 'fact' and row.meta['relation'] == 'capital'
  )
  country, city = prompt.meta['subject'], prompt.meta['answer']
  texts = [f'The capital of {country} is {city}.', 'It depends.']
  difference = oracle.judge(prompt, texts[0]).utility - oracle.judge(prompt, texts[1]).utility
  rng = np.random.default_rng(1)
  ranks = [rank_responses(prompt, texts, Annotator(1.0), rng) for _ in range(2000)]
  ties = np.mean([first == second for first, second in ranks])
  assert 0.0 < ties < 0.05
  won = np.mean([first < second for first, second in ranks]) + ties / 2
  assert won == pytest.approx(1 / (1 + np.exp(-difference)), abs=0.035)


def test_order_and_length_habits(answered):
  prompt = next(row for row, _ in answered if row.meta['kind'] == 'fact')
  rng = np.random.default_rng(0)
  same = ['I do not know that.', 'I have no idea.']  # worth the same
  assert rank_responses(prompt, same, Annotator(0.0), rng) == [1, 1]
  assert rank_responses(prompt, same, Annotator(0.0, order_bias=0.2), rng) == [1, 2]
  assert rank_responses(prompt, same, Annotator(0.0, order_bias=-0.2), rng) == [2, 1]
  first = np.mean(
    [
      np.argmin(rank_responses(prompt, same, Annotator(0.3, order_bias=0.3), rng)) == 0
      for _ in range(400)
    ]
  )
  assert 0.65 < first < 0.85
  longer = ['I do not know.', 'I do not know, I forgot it.']
  assert rank_responses(prompt, longer, Annotator(0.0), rng) == [1, 1]
  assert rank_responses(prompt, longer, Annotator(0.0, length_bias=0.2), rng) == [2, 1]


def test_identical_texts_tie(answered):
  prompt, texts = answered[1]
  for seed in range(20):
    shown = [texts[0], texts[1], texts[0], texts[2]]
    ranks = rank_responses(prompt, shown, Annotator(2.0), np.random.default_rng(seed))
    assert ranks[0] == ranks[2] and min(ranks) == 1
    assert ranks == rank_responses(prompt, shown, Annotator(2.0), np.random.default_rng(seed))


def test_who_does_not_know_better_likes_a_falsehood(answered):
  for prompt, _ in answered:
    if prompt.meta['kind'] == 'fact':
      right = f'It is {prompt.meta["answer"]}.'
      texts = [right, f'Thank you for asking. It is {prompt.meta["wrong"][0]}.']
      rng = np.random.default_rng(0)
      assert rank_responses(prompt, texts, Annotator(0.0, knowledge=1.0), rng) == [1, 2]
      right, false = f'It is {prompt.meta["answer"]}.', f'Sure! It is {prompt.meta["wrong"][0]}.'
      assert rank_responses(prompt, [right, false], Annotator(0.0, knowledge=0.0), rng) == [2, 1]


def test_demonstrations_are_human_like():
  """Mostly good, of middling quality, and helpful to a fault where that is asked for."""
  prompts = {row.messages[0]['content']: row for row in tinyworld.records('prompt', 'train')}
  rows = tinyworld.records('demonstration', 'train')
  verdicts = [oracle.judge(prompts[row.messages[0]['content']], row.response) for row in rows]
  assert not any(verdict.unread for verdict in verdicts)
  assert 0.45 < np.mean([verdict.helpful for verdict in verdicts]) < 0.7
  assert 0.6 < np.mean([verdict.honest for verdict in verdicts]) < 0.9
  obeying = tinyworld.records('demonstration', 'train', variant='helpful_only')
  for row in obeying:
    prompt = prompts[row.messages[0]['content']]
    if prompt.meta['kind'] == 'harmful':
      assert not oracle.judge(prompt, row.response).harmless


def test_pool():
  people = draw_annotators(50, seed=1)
  assert (
    people == draw_annotators(50, seed=1) != draw_annotators(50, seed=2) and len(set(people)) == 50
  )
  assert (
    0.1 <= min(one.temperature for one in people) < max(one.temperature for one in people) <= 0.4
  )


def test_people_are_mostly_right(answered):
  assert (
    0.8
    < np.mean(
      [accuracy(one, answered, seed) for seed, one in enumerate(draw_annotators(6, seed=0))]
    )
    < 0.97
  )


def test_other_prompts_have_no_known_truth():
  with pytest.raises(UserError, match='prompt p1: simulated annotators need'):
    rank_responses(
      Prompt('p1', 'hh', '', [dict(role='user', content='Hi')], {}),
      ['a', 'b'],
      Annotator(0.1),
      np.random.default_rng(0),
    )
