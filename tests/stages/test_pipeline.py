import datetime
import json
import shutil
import time

import jax
import numpy as np
import pytest

from rlhf_jax import fingerprints, testing
from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import final_table, pipeline
from rlhf_jax.interop import chat_template, pretrained
from rlhf_jax.models import transformer
from rlhf_jax.report import kept_responses
from rlhf_jax.runtime import checkpoint
from rlhf_jax.stages.shared import model_sources, training
from rlhf_jax.stages.shared.model_store import ModelStore

ROW = {
  'helpful',
  'honest',
  'harmless',
  'bare_refusal',
  'unfitting_offer',
  'ignorance',
  'unread',
  'substance',
  'utility',
  'win_rate_vs_sft',
  'win_rate_vs_sft_ci95',
  'substance_win_rate_vs_sft',
  'response_length',
  'eos_rate',
  'distinct',
}


@pytest.fixture(scope='module')
def finished(quickstart, tmp_path_factory, own_cache):
  """The tiny quickstart on eight devices: (config, workdir, results)."""
  config = pipeline.load_config(quickstart, ['ppo.batch_size=16'])
  workdir = tmp_path_factory.mktemp('runs') / 'quickstart'
  return config, workdir, pipeline.run(config, workdir)


def test_four_steps_end_to_end(quickstart, finished, capsys):
  """The tiny quickstart; the same command again; the models as Hugging Face directories."""
  config, workdir, results = finished
  assert results == fingerprints.read_json(workdir / 'results.json')
  assert list(results['models']) == ['base', 'sft', 'ppo']
  for group in ('models', 'controls', 'unseen'):
    for decodings in results[group].values():
      assert 'sampled' in decodings and all(ROW <= set(row) for row in decodings.values())
  for decodings in results['models'].values():
    assert set(decodings) == {'sampled', 'greedy'}
    for row in decodings.values():
      assert all(
        0 <= row[name] <= 1
        for name in ('helpful', 'honest', 'harmless', 'win_rate_vs_sft', 'eos_rate')
      )
      assert len(row['win_rate_vs_sft_ci95']) == 2 and 1 <= row['response_length'] <= 40
  sft = results['models']['sft']
  assert sft['sampled']['win_rate_vs_sft'] == sft['greedy']['win_rate_vs_sft'] == 0.5
  assert abs(sft['sampled']['kl_to_sft']) < 1e-3 and 'kl_to_sft' not in sft['greedy']
  assert set(results['controls']) == {
    'phrase_and_refusal',
    'phrase_and_refusal_by_oracle',
    'prompted_base',
    'best_of_16_by_reward',
    'best_of_16_by_oracle',
    'tilt_by_reward',
    'tilt_by_oracle',
  }
  assert set(results['kinds']) == {*results['models'], *results['controls']}
  of_kinds = results['kinds']['ppo']['greedy']
  assert sum(row['prompts'] for row in of_kinds.values()) == 16
  by_oracle = results['controls']['best_of_16_by_oracle']['sampled']
  assert by_oracle['utility'] >= sft['sampled']['utility']
  assert set(results['reward']['by_kind']) == {'seen', 'unseen'}
  assert {'truth', 'fit', 'harm', 'refusal', 'manner', 'length'} <= set(
    results['reward']['by_kind']['unseen']
  )
  assert 0 <= results['reward']['accuracy'] <= 1
  for name in ('pretrain', 'sft', 'reward', 'ppo'):
    lines = (workdir / name / 'metrics.jsonl').read_text().splitlines()
    last = [line for line in map(json.loads, lines) if 'loss' in line][-1]
    assert 0 <= last['padding_share'] < 1 and 0 < last['time/mfu_update'] < 2
    assert ('time/rollout_share' in last) == (name == 'ppo')
  assert set(results['seconds']) == {'pretrain', 'sft', 'feedback', 'reward', 'ppo', 'evaluation'}
  page = (workdir / 'report.html').read_text()
  assert 'id="table"' in page and 'id="tokens"' in page and 'ppo.batch_size' in page
  kept = kept_responses.read(workdir)
  assert {row.model for row in kept if row.evaluation == 'final'} == {
    *results['models'],
    *results['controls'],
  }
  during = {(row.stage, row.step) for row in kept if row.evaluation == 'training'}
  names = ('pretrain', 'sft', 'reward', 'ppo')
  assert during == {(name, step) for name in names for step in (0, 2, 4)}
  of_ppo = [row for row in kept if row.stage == 'ppo' and row.evaluation == 'training']
  assert all(None not in (row.score, row.kl) and 'utility' in row.verdict for row in of_ppo)
  shown = [row for row in of_ppo if row.tokens]
  assert len(shown) == 3 * config.ppo.shown_responses
  for row in shown:
    columns = {name: np.array(values) for name, values in row.tokens.items()}
    assert len(columns['advantage']) == len(columns['token']) == row.length
    kl = columns['logprob'] - columns['reference_logprob']
    assert kl.sum() == pytest.approx(row.kl, abs=1e-2)  # rounded token by token

  (workdir / 'run.lock').unlink()  # says who ran last
  files = {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}
  capsys.readouterr()
  began = time.monotonic()
  assert pipeline.run(config, workdir) == results
  assert time.monotonic() - began < 5 and results['table'] in capsys.readouterr().out
  (workdir / 'run.lock').unlink()
  assert files == {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file()}

  assert not (workdir / 'reward/export').exists()  # its head sees likelihoods
  for name in ('pretrain', 'sft', 'ppo'):
    source = pretrained.open_pretrained(str(workdir / name / 'export'))
    assert not source.config.head
    assert source.tokenizer.vocab_size == source.config.vocab_size
    saved = fingerprints.read_json(workdir / name / 'model.json')
    assert saved.pop('base_model') == ''
    model = transformer.build_model(transformer.ModelConfig(**saved))
    on = testing.make_layout()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    want = checkpoint.restore_params(
      workdir / name / 'checkpoints',
      jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        on.shardings(model.axes, shapes),
      ),
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(source.load()), jax.device_get(want))
    last = model_sources.find_model(f'{workdir / name}@4')  # the checkpoint of a step
    loaded = last.load(shapes, on.shardings(model.axes, shapes))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), jax.device_get(want))
  with pytest.raises(UserError, match='ppo@3: no such checkpoint; kept are'):
    model_sources.find_model(f'{workdir}/ppo@3')

  with pytest.raises(UserError, match='config.seed: 0 → 1'):
    pipeline.run(pipeline.load_config(quickstart, ['ppo.batch_size=16', 'seed=1']), workdir)


@pytest.mark.parametrize(
  'name,row',
  [
    pytest.param('raft', 'raft', marks=pytest.mark.slow),
    ('iterated_dpo', 'iterated_dpo'),
    pytest.param('best_of_n', 'best_of_4', marks=pytest.mark.slow),
  ],
)
def test_other_methods_continue_from_the_same_models(quickstart, finished, tmp_path, name, row):
  """Sampling, ranking by the reward model, SFT on the best or DPO on the order.

  The best of N has a row in the table.
  """
  _, workdir, _ = finished
  config = pipeline.load_config(
    quickstart.replace('quickstart', name),
    ['dpo1.reference_logprobs=live'] if name == 'iterated_dpo' else [],
  )
  for stage in ('tokenizer', 'pretrain', 'sft', 'feedback', 'reward'):
    shutil.copytree(workdir / stage, tmp_path / stage)
  fingerprints.write_json(tmp_path / 'config.json', json.loads(configs.as_json(config)))
  before = (tmp_path / 'reward/finished.json').stat().st_mtime_ns
  results = pipeline.run(config, tmp_path)
  assert (tmp_path / 'reward/finished.json').stat().st_mtime_ns == before
  assert ROW | ({'score'} if name == 'best_of_n' else set()) <= set(
    results['models'][row]['sampled']
  )
  if name == 'best_of_n':
    rows = {name: row['sampled'] for name, row in results['models'].items()}
    assert rows['best_of_16']['score'] > rows['best_of_4']['score']
    assert (
      rows['best_of_4']['kl_to_sft'] == pytest.approx(np.log(4) - 0.75)
      and rows['sft']['win_rate_vs_sft'] == 0.5
    )
  else:
    rankings = records.read_records(
      tmp_path / ('samples2' if name == 'raft' else 'rankings2') / 'train.jsonl', 'ranking'
    )
    assert len(rankings) == 16 and all(min(ranking.ranks) == 1 for ranking in rankings)


def test_mistakes_before_anything_is_made(quickstart, tmp_path, own_cache):
  with pytest.raises(UserError, match='config.mesh: data 3 does not fit 8 device'):
    pipeline.run(pipeline.load_config(quickstart, ['mesh.data=3']), tmp_path / 'run')
  with pytest.raises(UserError, match='--workdir=.*: expected a path without'):
    pipeline.run(pipeline.load_config(quickstart), tmp_path / 'run[1]')
  assert not (tmp_path / 'run').exists()


def test_the_table_has_the_stages_that_are_run(quickstart):
  def rows(stages):
    return final_table.shown_rows(pipeline.load_config(quickstart, [f'stages={stages}']))

  assert rows(('pretrain', 'sft')) == {'base': 'pretrain', 'sft': 'sft'}
  assert rows(('pretrain',)) == {}  # nothing to compare with


def test_a_row_may_show_a_model_from_elsewhere(quickstart, finished, tmp_path):
  _, workdir, results = finished
  changes = [
    "stages=('pretrain', 'sft')",
    f'evaluation.models.base={workdir}/ppo',
    'evaluation.controls=False',
  ]
  config = pipeline.load_config(quickstart, changes)
  for stage in ('tokenizer', 'pretrain', 'sft'):
    shutil.copytree(workdir / stage, tmp_path / stage)
  fingerprints.write_json(tmp_path / 'config.json', json.loads(configs.as_json(config)))
  models = pipeline.run(config, tmp_path)['models']
  assert list(models) == ['base', 'sft']
  # Greedily it says there what it says in the run that trained it.
  expected = results['models']['ppo']['greedy']
  assert models['base']['greedy']['utility'] == pytest.approx(expected['utility'])


def test_controls_need_the_reward_that_they_choose_by(quickstart):
  def has(*stages):
    return final_table.has_controls(pipeline.load_config(quickstart, [f'stages={stages}']))

  assert has('pretrain', 'sft', 'feedback', 'reward') and not has('pretrain', 'sft')


def test_a_table_that_cannot_be_made_is_refused_first(quickstart, tmp_path, own_cache):
  for override, message in (
    ('models.base=dance', "models.base: 'dance' is no stage"),
    ('baseline=reward', "expected a row for the baseline 'reward'"),
    ('batch_size=12', 'a batch of 12 rows does not divide over the 8 device'),
    ('split=train', "split: expected validation or test, got 'train'"),
    ('judge=reward', "controls: expected the judge 'oracle' and data of tinyworld, got 'reward'"),
  ):
    with pytest.raises(UserError, match=message):
      pipeline.run(pipeline.load_config(quickstart, [f'evaluation.{override}']), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_names_of_models(context):
  made = context('sft')
  with pytest.raises(UserError, match="holds no model yet; is 'pretrain' an earlier stage"):
    ModelStore(made).open('pretrain')
  with pytest.raises(UserError, match='nowhere: not found; expected'):
    ModelStore(made).open('nowhere')


def test_a_model_without_a_head_is_no_reward(finished, context):
  """One that was trained to speak only; what is asked for as random is random, and that is said."""
  _, workdir, _ = finished
  with pytest.raises(UserError, match='has no scalar head: expected a reward model'):
    ModelStore(context('ppo')).open_reward(str(workdir / 'sft'))


def test_batch_that_does_not_divide(context):
  with pytest.raises(
    UserError, match='config.sft: a batch of 12 rows in 1 parts does not divide over the 8'
  ):
    training.check_batch(context('sft', layout=testing.make_layout('data 8')), 12, 1)


def test_templates_see_the_date_of_the_first_start(tmp_path, monkeypatch):
  """Whatever another run in this process saw, and on whatever day the run is resumed."""
  monkeypatch.setattr(chat_template, '_now', datetime.datetime(2001, 2, 3))
  pipeline._write_date(tmp_path)
  pipeline._fix_date(tmp_path)
  first = chat_template.current_date()
  assert abs(datetime.datetime.now() - first) < datetime.timedelta(days=1)
  chat_template.fix_date(datetime.datetime(2030, 2, 3))
  pipeline._write_date(tmp_path)
  pipeline._fix_date(tmp_path)
  assert chat_template.current_date() == first
