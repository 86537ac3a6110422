"""The kinds of judges, by their names."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import endpoint, judges, language_judge
from rlhf_jax.feedback.judging import Comparison, Judgements

PAIR = Comparison([dict(role='user', content='Why?')], 'a', 'b')


def resources(open_language_model=None, **changes):
  return judges.JudgeResources(
    judge=language_judge.JudgeOptions(),
    endpoint=endpoint.EndpointOptions(**changes),
    cache=Path('answers.jsonl'),
    open_language_model=open_language_model,
    examples=('So it is (A',),
  )


@pytest.mark.parametrize(
  'name, kind',
  [
    ('http://localhost:8000/v1', 'endpoint'),
    ('https://host', 'endpoint'),
    ('my_judges:longer', 'function'),
    ('my.judges:longer(sure=0.75)', 'function'),
    ('reward:judge', 'reward'),
    ('labeller', 'model'),
    ('runs/one/sft', 'model'),
    ('smollm2', 'model'),
  ],
)
def test_kinds(name, kind):
  assert judges.judge_kind(name) == kind


def test_which_kinds_run_on_devices_and_which_in_one_process():
  flags = {kind.name: (kind.on_device, kind.one_process) for kind in judges.JUDGE_KINDS}
  assert flags == {
    'endpoint': (False, True),
    'function': (False, True),
    'reward': (True, False),
    'model': (True, False),
  }


def test_each_kind_is_opened_with_what_it_needs(monkeypatch, tmp_path):
  (tmp_path / 'judge_of_kinds.py').write_text('def judge(comparisons):\n  return [0.25]\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  judged = judges.open_judge('judge_of_kinds:judge', resources())([PAIR])
  np.testing.assert_array_equal(judged.probabilities, [0.25])

  with pytest.raises(UserError, match='judge: expected a model'):
    judges.open_judge('http://localhost/v1', resources(model=''))

  built = []
  monkeypatch.setattr(language_judge, 'build_judge', lambda *given: built.append(given))
  reader = language_judge.LanguageModel('model', 'params', 'tokenizer', 'layout')
  opened = []
  judges.open_judge('labeller', resources(lambda name: opened.append(name) or reader))
  assert opened == ['labeller']
  expected = ('model', 'params', 'tokenizer', 'layout')
  assert built == [(*expected, language_judge.JudgeOptions(), ('So it is (A',))]


def test_a_reward_model_judges_by_the_difference_of_its_scores():
  def open_reward_model(name):
    assert name == 'judge'
    return lambda messages, texts: np.array([len(text) for text in texts], np.float32)

  given = dataclasses.replace(resources(), open_reward_model=open_reward_model)
  judge = judges.open_judge('reward:judge', given)
  pairs = [PAIR, Comparison(PAIR.messages, 'abc', 'b')]
  judged = judge(pairs)
  np.testing.assert_allclose(judged.probabilities, [0.5, 1 / (1 + np.exp(-2))])
  swapped = judge([pair.swapped() for pair in pairs])
  np.testing.assert_allclose(swapped.probabilities, 1 - judged.probabilities)


def test_a_new_kind_is_one_row(monkeypatch):
  def open_coin(name, resources):
    probability = float(name.removeprefix('coin:'))

    def judge(comparisons):
      return Judgements(np.full(len(comparisons), probability), [''] * len(comparisons))

    return judge

  row = judges.JudgeKind(
    name='coin',
    matches=lambda name: name.startswith('coin:'),
    open=open_coin,
    on_device=False,
    one_process=True,
  )
  monkeypatch.setattr(judges, 'JUDGE_KINDS', (row, *judges.JUDGE_KINDS))
  assert judges.judge_kind('coin:0.75') == 'coin'
  assert judges.judge_kind('my_judges:longer') == 'function'
  judged = judges.open_judge('coin:0.75', resources())([PAIR] * 3)
  np.testing.assert_array_equal(judged.probabilities, [0.75] * 3)
