"""All stages of an experiment are checked before the first one runs."""

import json
import os
from pathlib import Path
import shutil

import pytest

from rlhf_jax.errors import UserError, UserErrors
from rlhf_jax.experiment import pipeline, preflight

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'
TINY_LLAMA = Path(__file__).parents[1] / 'interop/fixtures/tiny_llama'
MODEL = dict(embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
BODY = f"""
import ml_collections

def get_config():
  few = dict(count=20)
  ranked = dict(source='jsonl', path=('{{workdir}}/feedback/{{split}}.jsonl',))
  return ml_collections.ConfigDict(dict(
    stages=('sft', 'feedback', 'reward', 'ppo'),
    model={MODEL},
    tokenizer=dict(vocab_size=300, documents=30, data=few),
    sft=dict(init='random', max_length=60, data=few),
    feedback=dict(data=few),
    reward=dict(data=ranked, demonstrations=few),
    ppo=dict(data=few),
  ))
"""


@pytest.fixture
def check(tmp_path, capsys):
  """Returns a function that checks the experiment with overrides, and gives what it prints."""
  path = tmp_path / 'experiment.py'
  path.write_text(BODY)

  def run(*overrides):
    config = pipeline.load_config(str(path), overrides)
    pipeline.run(config, tmp_path / 'run', only_check=True)
    return capsys.readouterr().out

  return run


def test_mistakes_of_late_stages_are_all_named_at_once(check, tmp_path):
  with pytest.raises(UserErrors) as caught:
    check(
      'feedback.data.variant=harm',
      "reward.data.path=('{workdir}/feedback/{split}.json',)",
      'reward.loss=pairs',
      "ppo.reward=('sft',)",
      'ppo.score_place=end',
      "evaluation.models={'sft': 'sft', 'ppo': 'ppo'}",
      'evaluation.judge=my_judge:missing',
      'evaluation.data.variant=easy',
    )
  assert [text.replace(str(tmp_path), '') for text in caught.value.messages] == [
    "config.feedback.data.variant: of a prompt: expected one of harmful, questions, got 'harm'",
    "config.reward.loss: expected one of pairwise, plackett_luce, plain_pairs, got 'pairs'",
    "config.reward.data.path: /run/feedback/{split}.json: 'feedback' leaves train.jsonl, "
    'validation.jsonl',
    "config.ppo.reward: 'sft' has no scalar head: expected a reward model, such as the stage "
    "'reward' makes, or a directory for sequence classification",
    "config.ppo.score_place: expected eos or after_eos, got 'end'",
    "config.evaluation.data.variant: of a prompt: expected one of harmful, questions, got 'easy'",
    "config.evaluation.judge: reward 'my_judge:missing': No module named 'my_judge'; looked in "
    f'{os.getcwd()} too',
  ]


def test_mistakes_name_the_key_that_holds_the_name(check, tmp_path):
  with pytest.raises(UserErrors) as caught:
    check(
      'sft.init=nowhere',
      'feedback.data.source=jsonl',
      "feedback.data.path=('none-{split}.jsonl',)",
      'reward.demonstrations.source=none:read',
      "ppo.reward=('none:score',)",
    )
  beginnings = [
    'config.sft.init: nowhere: not found',
    'config.feedback.data.path: none-train.jsonl: no such file',
    "config.reward.demonstrations.source 'none:read': No module",
    "config.ppo.reward: reward 'none:score': No module",
  ]
  for beginning in beginnings:
    assert any(text.startswith(beginning) for text in caught.value.messages), caught.value.messages


def test_fields_that_a_reward_needs_are_missed_before_training(check):
  name = 'rlhf_jax.rewards.builtin.math:final_number'
  message = f'config.ppo.reward: reward \'{name}\': record .*: meta lacks "final"'
  with pytest.raises(UserError, match=message):
    check(f"ppo.reward=('{name}',)")
  check("ppo.reward=('rlhf_jax.rewards.builtin.text:length(most=20)',)")


def test_a_judge_may_be_the_reward_model_of_an_earlier_stage(tmp_path, capsys):
  small = ['ppo.batch_size=16', 'rlaif.batch_size=16']
  config = pipeline.load_config(f'{EXPERIMENTS}/rlaif.py:tiny', small)
  pipeline.run(config, tmp_path / 'run', only_check=True)
  assert 'ai_feedback (feedback)' in capsys.readouterr().out


def test_the_oracle_judges_prompts_of_its_world_only(check, tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('{"prompt": "Hi", "kind": "greeting"}\n' * 4)
  own = ['evaluation.data.source=jsonl', f'evaluation.data.path={path}', 'evaluation.data.count=0']
  with pytest.raises(UserError, match="evaluation.judge: 'oracle' knows the prompts of TinyWorld"):
    check("evaluation.models={'sft': 'sft'}", *own)


def test_weights_and_single_responses_are_looked_at(tmp_path):
  folder = shutil.copytree(TINY_LLAMA, tmp_path / 'llama')
  shape = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**shape, 'vocab_size': 260}))
  rated = tmp_path / 'rated.jsonl'
  rated.write_text('{"prompt": "Hi", "completion": "Ho", "label": true}\n' * 8)
  path = tmp_path / 'experiment.py'
  path.write_text(
    'import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict(dict('
    f"stages=('dpo',), dpo=dict(kind='preference', batch_size=8, init='{folder}', "
    f"reference='{folder}', "
    f"data=dict(source='jsonl', path=('{rated}',), hold_out=0.5)),"
    'tokenizer=dict(vocab_size=260, documents=30, data=dict(count=30))))\n'
  )

  def check(*overrides):
    pipeline.run(pipeline.load_config(str(path), overrides), tmp_path / 'run', only_check=True)

  check('dpo.loss=kto')
  with pytest.raises(UserError, match='dpo compares responses, but some prompts have one only'):
    check()
  classifier = {**shape, 'vocab_size': 260, 'architectures': ['LlamaForSequenceClassification']}
  (folder / 'config.json').write_text(json.dumps({**classifier, 'num_labels': 1}))
  with pytest.raises(UserError, match='is a reward model, which predicts no tokens'):
    check('dpo.loss=kto')
  (folder / 'config.json').write_text(json.dumps({**shape, 'vocab_size': 260}))
  for file in folder.glob('model*'):
    file.unlink()
  (folder / 'pytorch_model.bin').touch()
  with pytest.raises(
    UserError, match='config.dpo.init, config.dpo.reference: .*llama: only pickled weights'
  ):
    check('dpo.loss=kto')


def test_tinyworld_beside_own_data_is_said(check, tmp_path):
  path = tmp_path / 'own.jsonl'
  path.write_text('{"prompt": "Hi", "response": "Ho"}\n' * 40)
  own = ['sft.data.source=jsonl', f'sft.data.path={path}', 'sft.data.hold_out=0.5']
  text = check('stages=sft', 'sft.data.count=0', *own)
  assert text.endswith('the config names no other data: config.tokenizer.data\n')
  assert 'note: ' not in check()


def test_training_data_are_not_held_out_data(check, tmp_path):
  path = tmp_path / 'all.jsonl'
  path.write_text('{"prompt": "Hi", "response": "Ho"}\n' * 40)
  use = ['sft.data.source=jsonl', f"sft.data.path=('{path}',)", 'sft.data.count=0', 'stages=sft']
  with pytest.raises(
    UserError, match='sft.data.path: .* has no {split}, so that training and held'
  ):
    check(*use)
  text = check(*use, 'sft.data.hold_out=0.1')
  assert f'36 demonstrations of jsonl {path}, train' in text
  assert f'4 demonstrations of jsonl {path}, validation' in text


def test_the_stages_are_described_before_they_run(check, tmp_path):
  text = check()
  assert 'devices: 8 cpu as data 8; vocabulary: 300 tokens' in text
  assert '\n  data: made by feedback' in text
  assert 'sft (sft)\n  parameters: ' in text and ' trained, 0 read only' in text
  assert '20 demonstrations of tinyworld, train, ' in text and '% too long (drop)' in text
  example = next(line for line in text.splitlines() if line.startswith('    │ Assistant:'))
  assert example.startswith('    │ Assistant:⟦ ') and example.endswith('<eos>⟧')
  assert not (tmp_path / 'run' / 'sft').exists()  # nothing has run


def test_what_is_cut_keeps_its_mark_and_lines_fit_the_terminal(monkeypatch):
  assert [preflight._left_out(text) for text in ('a⟦b', 'a⟧b', 'a⟦b⟧')] == ['… ⟦', '…⟧', '…']
  monkeypatch.setenv('COLUMNS', '40')
  lines = preflight._wrap('    │ ' + 'five ' * 20)
  assert max(map(len, lines)) <= 40
  assert all(line.startswith('    │ five') for line in lines)


def test_the_shape_of_a_new_model_is_not_silently_ignored(tmp_path):
  """Where no stage makes a new model, the header says which settings nothing reads."""
  path = tmp_path / 'experiment.py'
  path.write_text(BODY)
  usual = pipeline.common_defaults()['model']
  config = pipeline.load_config(str(path), ['model.remat=full'])
  assert preflight.note_unread_shape(config, usual) == ''
  config = pipeline.load_config(str(path), ['model.remat=full', 'sft.init=smollm2'])
  note = preflight.note_unread_shape(config, usual)
  assert 'config.model.embed, config.model.head_dim' in note and 'remat' not in note
