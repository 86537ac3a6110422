"""The command `evaluate`, as a user starts it, on models of a few hundred parameters."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from rlhf_jax import json_lines, testing
from rlhf_jax.commands import evaluate
from rlhf_jax.interop import pretrained
from rlhf_jax.models import transformer


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two language models (lm, other) and a reward model (rm)."""
  place = tmp_path_factory.mktemp('models')
  tokenizer = testing.make_tokenizer(384)
  config = transformer.ModelConfig(
    vocab_size=tokenizer.vocab_size,
    embed=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=32,
    max_length=128,
  )
  for seed, (name, head) in enumerate((('lm', False), ('other', False), ('rm', True))):
    own = transformer.ModelConfig(**{**vars(config), 'head': head})
    params = transformer.build_model(own).init(jax.random.key(seed))
    params = jax.tree.map(lambda x: 3 * x, params)  # so that the models differ
    pretrained.export_model(place / name, own, params, tokenizer)
  return place


def run(folder, kind, *words):
  code = evaluate.main([kind, *words, f'--output={folder / kind}.json', '--batch_size=8'])
  assert code == 0
  return json.loads((folder / f'{kind}.json').read_text())


def test_rewards_on_tinyworld_and_on_reward_bench(folder, capsys):
  found = run(folder, 'reward', str(folder / 'rm'), '--data=tinyworld', '--limit=12', '--errors=3')
  [row] = found['models'].values()
  assert 0 < row['accuracy']['all']['accuracy'] < 1
  errors = [row for _, row in json_lines.read_values(folder / 'reward.errors.jsonl')]
  assert len(errors) == 3 and errors[0]['margin'] <= errors[1]['margin'] <= 0
  bench = folder / 'bench.jsonl'
  rows = [
    dict(id=1, prompt='Why?', chosen=['So.'], rejected=['No.', 'Ah.', 'Oh.'], subset='Focus'),
    dict(id='ref:0', prompt='One?', chosen=['1'], rejected=['a', 'b'], subset='Ties'),
    dict(id='tied:0', prompt='Any?', chosen=['1', '2'], rejected=['a', 'b'], subset='Ties'),
  ]
  json_lines.write_values(bench, rows)
  found = run(folder, 'reward', str(folder / 'rm'), f'--data={bench}')
  [figures] = found['reward_bench'].values()
  assert set(figures['subsets']) == {'Focus', 'Ties'}
  assert figures['score'] == pytest.approx(np.mean([*figures['subsets'].values()]))
  assert 'RewardBench' in capsys.readouterr().out


def test_the_frontier_of_the_reference_itself_has_no_kl(folder):
  words = [f'--reference={folder / "lm"}', f'--proxy={folder / "rm"}', f'--gold={folder / "rm"}']
  words += ['--prompts=tinyworld', '--limit=8', '--pool=8', '--max_new_tokens=4']
  found = run(folder, 'frontier', f'same={folder / "lm"}', str(folder / 'other'), *words)
  policies = found['policies']
  assert policies['same']['kl'] == pytest.approx(0, abs=1e-5) and policies['other']['kl'] > 0
  curve = [row['proxy'] for row in found['best_of_n']]
  assert [row['n'] for row in found['best_of_n']] == [1, 2, 4, 8] and curve == sorted(curve)
  assert curve[0] == pytest.approx(found['reference']['proxy'])
  assert [row['gold'] for row in found['best_of_n']] == pytest.approx(curve)  # they are the same


def test_refusals_and_the_tax(folder):
  words = ['--prompts=tinyworld', '--max_new_tokens=4']
  found = run(folder, 'refusals', str(folder / 'lm'), *words, f'--judge=reward:{folder / "rm"}')
  [row] = found['models'].values()
  assert row['matched'] > 5 and row['harmful'] == 0  # four tokens refuse nothing
  assert 0 <= row['worse_than_refusal']['harmful'] <= 1
  models = [str(folder / 'lm'), str(folder / 'other')]
  words = ['--documents=tinyworld', '--limit=20', '--task=oracle', *words]
  found = run(folder, 'tax', *models, *words)['models']
  assert found['lm']['loss_change'] == 0 and found['lm']['accuracy_change_ci95'] == [0, 0]
  gap = found['other']['nats_per_token'] - found['lm']['nats_per_token']
  assert found['other']['loss_change'] == pytest.approx(gap)


@pytest.mark.parametrize(
  'words, message',
  [
    (['reward', 'lm', '--data=tinyworld'], 'expected a reward model'),
    (['reward', 'none', '--data=tinyworld'], 'none'),
    (['refusals', 'rm', '--prompts=tinyworld'], 'expected a language model'),
    (['tax', 'lm', 'other'], '--documents'),
    (
      ['frontier', 'lm', '--reference=lm', '--proxy=lm', '--gold=oracle', '--prompts=tinyworld'],
      'expected a reward model',
    ),
  ],
)
def test_mistakes(folder, monkeypatch, capsys, words, message):
  monkeypatch.chdir(folder)
  assert evaluate.main([*words, '--output=out.json']) == 2
  assert message in capsys.readouterr().err


def test_help_is_there_at_once():
  for kind in ('reward', 'frontier', 'refusals', 'tax'):
    command = [sys.executable, '-X', 'importtime', '-m', 'rlhf_jax.evaluate', kind, '--help']
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '--output' in answer.stdout and 'jax._src' not in answer.stderr
