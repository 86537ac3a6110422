"""The reward model whose head alone is fitted."""

import json

import numpy as np

from rlhf_jax import testing
from rlhf_jax.data import records, sources
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.stages import frozen_reward
from rlhf_jax.stages.shared import scores
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore

MODEL = dict(embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16)


def write_experiment(tmp_path):
  path = tmp_path / 'frozen.py'
  path.write_text(f"""import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.stages = ('frozen_reward',)
  config.tokenizer = dict(vocab_size=300, documents=50)
  config.model = dict({', '.join(f'{key}={value}' for key, value in MODEL.items())})
  config.frozen_reward = dict(
    init='random', likelihood=True, batch_size=8, max_length=128, folds=3, measured_pairs=10,
    data=dict(count=24),
  )
  return config
""")
  return path


def test_the_head_is_fitted_stored_and_scores_as_it_was_measured(tmp_path, capsys):
  config = pipeline.load_config(str(write_experiment(tmp_path)))
  results = pipeline.run(config, tmp_path / 'run')
  folder = tmp_path / 'run' / 'frozen_reward'
  report = json.loads((folder / 'folds.json').read_text())
  assert report['tinyworld']['pairs'] > 100 and {'length', 'bigrams', 'head', 'joint'} <= {
    *report['tinyworld']['accuracy']
  }
  # The stored model gives the accuracy that was measured, by the path that judges use.
  workdir = tmp_path / 'run'
  resolved = configs.resolve(config, workdir=workdir, data=config.data)
  layout, tokenizer = testing.make_layout(), pipeline.open_tokenizer(resolved, workdir)
  context = Context(resolved, 'frozen_reward', workdir, layout, tokenizer)
  score = scores.open_text_score(context, ModelStore(context), 'frozen_reward', 8)
  options = context.read_options(frozen_reward.STAGE)
  rows = sources.load_records(options.data, 'ranking', 'validation')
  right = []
  for row in rows:
    values = score([records.conversation(row)] * len(row.responses), row.responses)
    ranks = np.array(row.ranks)
    margins = values[:, None] - values[None, :]
    right += [*(margins[ranks[:, None] < ranks[None, :]] > 0)]
  # Not to the digit: where a text comes twice in a ranking, the stage leaves that pair out.
  assert abs(np.mean(right) - results['reward']['accuracy']) < 0.02
  # A second run reads no text again.
  (folder / 'done.json').unlink()
  (tmp_path / 'run' / 'results.json').unlink()
  capsys.readouterr()
  pipeline.run(config, tmp_path / 'run')
  assert 'texts are read' not in capsys.readouterr().out
