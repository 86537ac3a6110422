"""The kinds of reward sources, by their names."""

import ml_collections
import numpy as np
import pytest

from rlhf_jax import options
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import language_judge
from rlhf_jax.rewards import functions, server, sources


@pytest.mark.parametrize(
  'name, kind, model_name',
  [
    ('http://localhost:8000/score', 'server', None),
    ('https://host/score', 'server', None),
    ('scorer:labeller', 'scorer', 'labeller'),
    ('scorer:runs/one/sft', 'scorer', 'runs/one/sft'),
    ('my_rewards:polite', 'function', None),
    ('rlhf_jax.rewards.builtin.text:length(most=20)', 'function', None),
    ('reward', 'model', 'reward'),
    ('runs/one/reward', 'model', 'runs/one/reward'),
  ],
)
def test_kinds(name, kind, model_name):
  source = sources.parse_reward_source(name)
  assert source.name == name and source.kind.name == kind
  assert source.model_name == model_name
  assert source.on_device == (model_name is not None)
  assert source.head == (kind == 'model')
  assert source.scores_texts == (kind != 'model')


def no_model(name):
  raise AssertionError(f'{name} is opened')


def test_a_function_and_a_scorer(monkeypatch, tmp_path):
  (tmp_path / 'own_reward.py').write_text(
    'def letters(prompts, responses, records):\n  return [len(text) for text in responses]\n'
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  settings = sources.RewardSourceOptions(functions.RewardFunctionOptions(workers=0))
  source = sources.parse_reward_source('own_reward:letters')
  score = sources.open_reward_source(source, settings, no_model)
  values, failed = score([[], []], ['abc', ''], [None, None])
  np.testing.assert_array_equal(values, np.float32([3, 0]))
  assert values.dtype == np.float32 and failed == 0

  def build_scorer(model, params, tokenizer, layout, scorer):
    assert (model, params, tokenizer, layout) == ('model', 'params', 'tokenizer', 'layout')
    assert scorer == settings.scorer
    return lambda conversations, responses: np.float32([0.5] * len(responses))

  monkeypatch.setattr(language_judge, 'build_scorer', build_scorer)
  reader = language_judge.LanguageModel('model', 'params', 'tokenizer', 'layout')
  opened = []
  source = sources.parse_reward_source('scorer:labeller')
  score = sources.open_reward_source(source, settings, lambda name: opened.append(name) or reader)
  values, failed = score([[], []], ['a', 'b'], [None, None])
  assert opened == ['labeller'] and values.tolist() == [0.5, 0.5] and failed == 0


def test_a_model_is_opened_by_the_stages():
  source = sources.parse_reward_source('reward')
  with pytest.raises(UserError, match="reward 'reward': expected a source that scores texts"):
    sources.open_reward_source(source, sources.RewardSourceOptions(), no_model)


def test_a_new_kind_is_one_row(monkeypatch):
  def open_constant(name, settings, open_language_model):
    value = float(name.removeprefix('constant:'))

    def score(conversations, responses, records):
      return np.full(len(responses), value, np.float32), 0

    return score

  row = sources.RewardKind(
    name='constant',
    matches=lambda name: name.startswith('constant:'),
    open=open_constant,
  )
  monkeypatch.setattr(sources, 'REWARD_KINDS', (row, *sources.REWARD_KINDS))
  source = sources.parse_reward_source('constant:0.25')
  assert source.kind.name == 'constant' and source.scores_texts
  assert not source.on_device and source.model_name is None
  assert sources.parse_reward_source('my_rewards:polite').kind.name == 'function'
  score = sources.open_reward_source(source, sources.RewardSourceOptions(), no_model)
  values, failed = score([[]] * 3, ['a'] * 3, [None] * 3)
  assert values.tolist() == [0.25] * 3 and failed == 0


def test_each_process_scores_its_share(monkeypatch):
  asked = []

  def score(conversations, responses, records):
    asked.append((conversations, responses, records))
    return np.float32([len(text) for text in responses]), 1

  texts = ['a', 'bb', 'ccc', 'dddd', 'eeeee']
  given = []
  for process in (0, 1):
    monkeypatch.setattr(sources.jax, 'process_index', lambda process=process: process)
    monkeypatch.setattr(sources.jax, 'process_count', lambda: 2)

    def gather(values):
      given.append(values)
      return np.stack([values, np.float32([0, 2, 0, 4, 0, 1])])  # what the other one has

    monkeypatch.setattr(sources.multihost_utils, 'process_allgather', gather)
    values, failed = sources.share_between_processes(score)(texts, texts, texts)
    if process == 0:
      assert values.tolist() == [1, 2, 3, 4, 5] and failed == 2
  assert asked == [(['a', 'ccc', 'eeeee'],) * 3, (['bb', 'dddd'],) * 3]
  assert given[0].tolist() == [1, 0, 3, 0, 5, 1] and given[1].tolist() == [0, 2, 0, 4, 0, 1]


def test_options_of_all_kinds_fit_into_a_section():
  settings = sources.RewardSourceOptions()
  section = ml_collections.ConfigDict(options.defaults(sources.RewardSourceOptions))
  section.reward_server.retries = 7
  section.scorer.max_length = 9
  made = options.from_section(sources.RewardSourceOptions, section)
  assert made.reward_server == server.ServerOptions(retries=7)
  assert made.scorer.max_length == 9 and made.reward_functions == settings.reward_functions
