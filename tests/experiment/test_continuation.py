"""More steps of a finished stage, another evaluation, and rows from other runs."""

import json
from pathlib import Path

import pytest

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import continuation, pipeline

QUICKSTART = f'{Path(__file__).parents[2]}/experiments/quickstart.py:tiny'
SHORT = (
  'stages=("pretrain",)',
  'pretrain.optimizer.schedule=constant',
  'pretrain.loop.eval_every=2',
)

DEFAULTS = pipeline.common_defaults()


def load(*overrides):
  return pipeline.load_config(QUICKSTART, [*SHORT, *overrides])


def begin(workdir, *overrides, finished=('pretrain',)):
  """A workdir in which these stages have finished."""
  config = load(*overrides)
  fingerprints.write_json(workdir / 'config.json', json.loads(configs.as_json(config)))
  for name in finished:
    for file in ('finished.json', 'model.json'):
      fingerprints.write_json(workdir / name / file, {})


def test_what_a_longer_run_would_not_have_been_is_refused(tmp_path):
  with pytest.raises(UserError, match='--extend: expected a stage with more loop.steps'):
    continuation.extend(load(), tmp_path, DEFAULTS)
  begin(tmp_path, 'pretrain.loop.steps=4')
  more = 'pretrain.loop.steps=6'
  for other in ('pretrain.loop.steps=3', 'pretrain.loop.steps=4'):
    with pytest.raises(UserError, match='more loop.steps'):
      continuation.extend(load(other), tmp_path, DEFAULTS)
  with pytest.raises(UserError, match='more loop.steps'):  # claim_workdir names the difference
    continuation.extend(load(more, 'pretrain.batch_size=16'), tmp_path, DEFAULTS)
  assert (tmp_path / 'pretrain/finished.json').is_file()

  linear = 'pretrain.optimizer.schedule=linear'
  begin(tmp_path, 'pretrain.loop.steps=4', linear)
  with pytest.raises(UserError, match="schedule is 'linear', whose learning rate depends on"):
    continuation.extend(load(more, linear), tmp_path, DEFAULTS)

  two = 'stages=("pretrain","sft")'
  begin(tmp_path, 'pretrain.loop.steps=4', two, finished=('pretrain', 'sft'))
  with pytest.raises(UserError, match="'sft' has begun with 'pretrain' as it is; .*--from="):
    continuation.extend(load(more, two), tmp_path, DEFAULTS)


def test_results_are_put_aside(tmp_path):
  assert continuation.put_results_aside(tmp_path) == ''
  for number in (1, 2):
    (tmp_path / 'results.json').write_text(str(number))
    assert continuation.put_results_aside(tmp_path) == f'results-{number}.json'
  assert (tmp_path / 'results-2.json').read_text() == '2'


def test_results_stay_where_the_new_evaluation_cannot_be_made(tmp_path):
  config = load('evaluation.models={"base": "pretrain"}', 'evaluation.judge=none:compare')
  with config.unlocked():
    config.evaluation.update(baseline='pretrain', controls=False)
  (tmp_path / 'results.json').write_text('1')
  with pytest.raises(UserError, match="config.evaluation.judge: .*'none:compare'"):
    pipeline.run(config, tmp_path, evaluate_again=True)
  assert (tmp_path / 'results.json').read_text() == '1'


def test_rows_of_another_run(tmp_path):
  config = pipeline.load_config(QUICKSTART)
  other = tmp_path / 'other'
  fingerprints.write_json(other / 'config.json', json.loads(configs.as_json(config)))
  with pytest.raises(UserError, match='--baseline=.*: no row of its table'):
    continuation.with_baseline(config, str(other))
  for stage in ('sft', 'ppo'):
    fingerprints.write_json(other / stage / 'finished.json', {})
  changed = continuation.with_baseline(config, str(other))
  added = {k: v for k, v in changed.evaluation.models.items() if k not in config.evaluation.models}
  assert list(added.values()) == [str(other / 'ppo')]
  assert all(name.startswith('other/') for name in added)
  with pytest.raises(UserError, match='--baseline=.*no config.json'):
    continuation.with_baseline(config, str(tmp_path / 'none'))


@pytest.mark.slow
def test_an_extended_run_equals_one_that_was_longer_from_the_start(tmp_path):
  def run(folder, steps, **options):
    config = load(f'pretrain.loop.steps={steps}', 'evaluation.models={}')
    pipeline.run(config, tmp_path / folder, **options)
    return fingerprints.read_json(tmp_path / folder / 'pretrain/finished.json')['checkpoint']

  def metrics(folder):
    rows = map(json.loads, (tmp_path / folder / 'pretrain/metrics.jsonl').read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith('time/')} for row in rows]

  assert run('short', 4)['step'] == 4
  with pytest.raises(UserError, match='this workdir was begun with another config'):
    run('short', 8)
  assert run('short', 8, extend=True)['step'] == run('long', 8)['step'] == 8
  assert metrics('short') == metrics('long')
  for name in sorted((tmp_path / 'long/pretrain/export').glob('*.safetensors')):
    assert name.read_bytes() == (tmp_path / 'short/pretrain/export' / name.name).read_bytes()
