import json
from pathlib import Path

import pytest

from rlhf_jax import fingerprints
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline

DEFAULTS = dict(
  seed=0, stages=(), model=dict(embed=8, dtype='float32'), evaluation=dict(models=dict())
)


def experiment(tmp_path, body):
  path = tmp_path / 'experiment.py'
  path.write_text(
    'import ml_collections\ndef get_config(tiny=False):\n  c = ml_collections.ConfigDict()\n'
    "  c.stages = ('sft',)\n" + ''.join(f'  {line}\n' for line in body) + '  return c\n'
  )
  return str(path)


def load(path, *overrides):
  return configs.load(path, overrides, defaults=DEFAULTS)


def test_an_experiment_overrides_the_defaults(tmp_path):
  path = experiment(
    tmp_path,
    [
      "c.sft = dict(data=dict(path=['a', 'b']))",
      'c.seed = 7 if tiny else 3',
      "c.evaluation = dict(models=dict(base='sft'))",
    ],
  )
  config = load(
    path,
    'sft.optimizer.learning_rate=2',
    'model.dtype=bfloat16',
    'sft.data.fields={"text": "body"}',
  )
  assert (config.seed, config.sft.kind, config.sft.data.path) == (3, 'sft', ('a', 'b'))
  assert (
    config.sft.optimizer.learning_rate == 2.0 and type(config.sft.optimizer.learning_rate) is float
  )
  assert config.model.to_dict() == dict(embed=8, dtype='bfloat16')
  assert config.sft.data.fields.to_dict() == {'text': 'body'}
  assert config.evaluation.models.to_dict() == {'base': 'sft'}
  assert load(path + ':tiny').seed == 7
  with pytest.raises((AttributeError, KeyError)):
    config.sft.learning_rate = 1


def test_a_default_that_sections_share_is_changed_in_one_of_them_only(tmp_path):
  path = experiment(tmp_path, ["c.stages = ('sft', 'reward')"])
  config = load(path, 'sft.data.splits.train=other')
  assert (config.sft.data.splits.train, config.reward.data.splits.train) == ('other', 'train')
  assert load(path).sft.data.splits.train == 'train'


def test_a_loss_brings_its_own_settings_and_no_other_loss_s(tmp_path):
  path = experiment(tmp_path, ["c.stages = ('dpo',)", "c.dpo = dict(kind='preference')"])
  assert load(path).dpo.beta == 0.1 and 'margin' not in load(path).dpo
  assert load(path, 'dpo.loss=simpo', 'dpo.margin=0.7').dpo.margin == 0.7
  with pytest.raises(UserError, match='config.dpo.margin is no known key'):
    load(path, 'dpo.margin=0.7')
  with pytest.raises(UserError, match="config.dpo.loss: expected one of dpo, .*, got 'dop'"):
    load(path, 'dpo.loss=dop')


def test_an_experiment_without_a_tiny_form_has_that_of_its_stages(tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text(
    'import ml_collections\ndef get_config():\n  c = ml_collections.ConfigDict()\n'
    "  c.stages = ('sft',)\n  c.sft = dict(batch_size=64)\n  return c\n"
  )
  assert pipeline.load_config(str(path)).sft.batch_size == 64
  config = pipeline.load_config(f'{path}:tiny')
  assert (config.sft.batch_size, config.sft.loop.steps, config.model.embed) == (8, 4, 32)


def test_one_kind_of_stage_may_run_twice(tmp_path):
  path = experiment(
    tmp_path, ["c.stages = ('sft', 'again')", "c.again = dict(kind='sft', init='sft')"]
  )
  config = load(path)
  assert (config.again.kind, config.again.init, config.sft.init) == ('sft', 'sft', 'pretrain')


@pytest.mark.parametrize(
  'body,overrides,message',
  [
    (
      ['c.sft = dict(optimiser=dict())'],
      (),
      "config.sft.optimiser is no known key; did you mean 'optimizer'?",
    ),
    (
      [],
      ('sft.optimizer.learning_rat=1',),
      "config.sft.optimizer.learning_rat is no known key; did you mean 'learning_rate'?",
    ),
    ([], ('sftt.init=random',), "config.sftt is no known key; did you mean 'sft'?"),
    ([], ('seed=x',), "config.seed must be int, got str 'x'"),
    (['c.seed = 1.5'], (), 'config.seed must be int, got float 1.5'),
    (['c.model = 3'], (), 'config.model is a section, got 3'),
    ([], ('seed',), 'expected --config.seed=VALUE'),
    (["c.stages = ('dance',)"], (), "config.dance.kind: no stage is called 'dance'"),
    (['c.stages = ()'], (), 'names no stage; expected some of critique'),
  ],
)
def test_mistakes_are_named_in_one_line(tmp_path, body, overrides, message):
  with pytest.raises(UserError) as error:
    load(experiment(tmp_path, body), *overrides)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_missing_experiment_is_named(tmp_path):
  with pytest.raises(UserError, match='nowhere.py: no such file'):
    load(str(tmp_path / 'nowhere.py'))


def test_differences_and_workdir(tmp_path):
  path = experiment(tmp_path, ["c.sft = dict(data=dict(path=('{workdir}/x.jsonl',)))"])
  a, b = load(path), load(path, 'seed=1')
  parsed = [json.loads(configs.as_json(config)) for config in (a, b)]
  assert configs.differences(*parsed) == ['config.seed: 0 → 1'] and not configs.differences(
    parsed[0], parsed[0]
  )
  assert configs.resolve(a, workdir='runs/1').sft.data.path == ('runs/1/x.jsonl',)


def test_the_seed_of_a_run_is_that_of_its_world(tmp_path):
  path = experiment(tmp_path, ['c.sft = dict(data=dict(seed=3))'])
  assert configs.resolve(load(path, 'seed=7')).sft.data.seed == 3
  config = load(path, 'seed=7', 'sft.data.seed=-1')
  assert config.sft.data.seed == -1  # as config.json keeps it
  assert configs.resolve(config).sft.data.seed == 7


@pytest.mark.parametrize('variant', ['', ':tiny'])
@pytest.mark.parametrize(
  'path', sorted(Path(__file__).parents[2].glob('experiments/*.py')), ids=lambda path: path.stem
)
def test_every_experiment_says_what_its_stages_know(path, variant):
  config = pipeline.load_config(f'{path}{variant}')
  rows = {stage for stage in config.evaluation.models.values() if '/' not in stage}
  assert rows <= {*config.stages}  # the others are models from elsewhere


@pytest.mark.parametrize(
  'removed, differing',
  [
    ('model.numerics', ''),  # a common setting
    ('dpo.sampling.drafts', ''),  # a nested one of a stage
    ('export', ''),  # a whole section
    ('dpo.batch_size', 'config.dpo.batch_size: None → 8'),  # not the default
    (
      'dpo.loss',
      "config.dpo.loss: None → 'ipo'",
    ),  # it meant the default, whatever this run chooses
    ('dpo', "config.dpo: None → {'"),  # a stage is not completed
  ],
)
def test_what_an_older_config_lacks_counts_as_its_default(removed, differing):
  path = f'{Path(__file__).parents[2]}/experiments/dpo.py:tiny'
  config = pipeline.load_config(path, ['dpo.loss=ipo'])
  new = json.loads(configs.as_json(config))
  old = json.loads(configs.as_json(config))
  *sections, key = removed.split('.')
  place = old
  for name in sections:
    place = place[name]
  del place[key]
  completed, lacking = configs.complete(old, config, pipeline.common_defaults())
  differences = configs.differences(completed, new)
  assert bool(lacking) != bool(differing)
  assert len(differences) == bool(differing)
  assert ''.join(differences).startswith(differing)


def test_a_run_resumes_the_workdir_of_an_older_version(tmp_path, capsys):
  """Only where the setting that is new is left at its default."""
  path = f'{Path(__file__).parents[2]}/experiments/dpo.py:tiny'
  config = pipeline.load_config(path)
  old = json.loads(configs.as_json(config))
  del old['model']['numerics']
  fingerprints.write_json(tmp_path / 'config.json', old)
  fingerprints.write_json(tmp_path / 'pretrain/finished.json', {})
  other = pipeline.load_config(path, ['model.numerics=exact'])
  with pytest.raises(UserError, match="model.numerics: None → 'exact'; give another --workdir"):
    pipeline.claim_workdir(other, tmp_path)
  pipeline.claim_workdir(config, tmp_path)
  assert 'an older version wrote it, without config.model.numerics' in capsys.readouterr().out
  pipeline.claim_workdir(config, tmp_path)  # said once: config.json has it now
  assert not capsys.readouterr().out
