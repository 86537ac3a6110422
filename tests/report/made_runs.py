import json

import numpy as np
import pytest

from rlhf_jax import fingerprints
from rlhf_jax.generation.responses import Responses
from rlhf_jax.report import kept_responses

EVIL = '\x1b[31mred\x1b[0m <script>alert(1)</script> \ud800 "quoted\' \u202e & {{ 7 * 7 }}'


def responses(texts, **columns):
  """One response to each prompt; the columns as given."""
  count = len(texts)
  given = {name: np.array(values, float)[:, None] for name, values in columns.items()}
  return Responses(
    [[text] for text in texts],
    lengths=np.array([[len(text.split()) + 1] for text in texts]),
    ended=np.ones((count, 1), bool),
    **given,
  )


def keep_training(workdir, step, texts, scores, utility=None, stage='ppo', tokens=None):
  prompts = [f'Question {number}?' for number in range(len(texts))]
  verdicts = {} if utility is None else {'utility': np.array(utility, float)[:, None]}
  rows = kept_responses.make_rows(
    responses(texts, scores=scores, kl=[0.1 * step] * len(texts)),
    prompts,
    [f'p{number}' for number in range(len(texts))],
    verdicts,
    tokens,
    evaluation='training',
    stage=stage,
    step=step,
    model='',
    decoding='sampled',
  )
  kept_responses.keep(workdir, rows)


def keep_final(workdir, models):
  """models: name → (texts, utility)."""
  rows = []
  for name, (texts, utility) in models.items():
    rows += kept_responses.make_rows(
      responses(texts),
      [f'Question {number}?' for number in range(len(texts))],
      [f'p{number}' for number in range(len(texts))],
      {'utility': np.array(utility, float)[:, None]},
      evaluation='final',
      stage=name,
      step=None,
      model=name,
      decoding='sampled',
    )
  kept_responses.keep(workdir, rows)


def row(wins, low, high, **more):
  return {
    'win_rate_vs_sft': wins,
    'win_rate_vs_sft_ci95': [low, high],
    'kl_to_sft': 1.0,
    'response_length': 5.0,
    'eos_rate': 1.0,
    **more,
  }


@pytest.fixture
def make_run(tmp_path):
  """make_run(name, seed=, finished=, text=): a workdir with what a run leaves."""

  def make(name, seed=0, finished=True, text=EVIL, coefficient=0.1):
    workdir = tmp_path / name
    config = {
      'seed': seed,
      'stages': ['sft', 'ppo'],
      'sft': {'kind': 'sft', 'loop': {'steps': 4}},
      'ppo': {'kind': 'ppo', 'kl_coefficient': coefficient, 'loop': {'steps': 4}},
      'evaluation': {
        'models': {'sft': 'sft', 'ppo': 'ppo'},
        'baseline': 'sft',
        'best_of': {},
        'judge': 'oracle',
        'split': 'validation',
      },
    }
    fingerprints.write_json(workdir / 'config.json', config)
    for stage, metric in (('sft', 'loss'), ('ppo', 'reward/score')):
      lines = [{'step': step, metric: seed + step / 2, 'time/step': 1.5} for step in range(1, 5)]
      lines.append({'step': 4, f'eval/{metric}': 1.0, 'eval/kl': 0.4})
      (workdir / stage).mkdir()
      written = ''.join(json.dumps(line) + '\n' for line in lines)
      (workdir / stage / 'metrics.jsonl').write_text(written)
    done = {'seconds': 6.0, 'checkpoint': {'step': 4, 'fingerprint': 'abc123'}}
    fingerprints.write_json(workdir / 'sft' / 'finished.json', done)
    tokens = {
      0: {'token': ['It', ' is'], 'logprob': [-1.0, -0.5], 'reference_logprob': [-2.0, 0.0]}
    }
    for step in (0, 2, 4):
      texts = [f'{text} at {step}', 'It is red.', 'No.']
      keep_training(workdir, step, texts, [step, step, step], [step] * 3, tokens=tokens)
    fingerprints.write_json(
      workdir / 'sessions.json',
      {
        'defaults': {**config, 'ppo': {**config['ppo'], 'kl_coefficient': 0.05}},
        'sessions': [
          {
            'date': '2026-01-01',
            'command': 'python -m rlhf_jax --workdir=x',
            'versions': {'jax': '1.2.3'},
            'devices': '1 × cpu',
            'processes': 1,
            'system': 'Linux',
          }
        ],
      },
    )
    if finished:
      fingerprints.write_json(workdir / 'ppo' / 'finished.json', done)
      keep_final(
        workdir,
        {
          'sft': (['It is red.', 'No.', text], [1, 0, 1]),
          'ppo': (['It is blue.', 'Yes.', 'No.'], [2, -1, 1]),
        },
      )
      models = {'sft': row(0.5, 0.5, 0.5, helpful=0.2), 'ppo': row(0.7, 0.6, 0.8, helpful=0.4)}
      results = {
        'models': {name: {'sampled': values} for name, values in models.items()},
        'controls': {},
        'reward': {'accuracy': 0.7, 'length_accuracy': 0.5, 'pairs': 100.0},
        'seconds': {'sft': 6.0, 'ppo': 6.0, 'evaluation': 2.0},
        'table': 'the table',
      }
      fingerprints.write_json(workdir / 'results.json', results)
    return workdir

  return make
