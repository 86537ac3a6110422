"""Finished stages of another run are taken over where nothing that they depend on differs."""

import json

import ml_collections
import pytest

from rlhf_jax import fingerprints
from rlhf_jax.commands import failures
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment.take_over import take_over

SECTIONS = {
  'sft': {'kind': 'sft', 'init': 'random', 'steps': 3},
  # `reward` is what its source would use; it runs later.
  'feedback': {'kind': 'feedback', 'policies': ('sft',), 'reward': 'reward'},
  'reward': {'kind': 'reward', 'init': 'sft', 'path': ('{workdir}/feedback/{split}.jsonl',)},
  'ppo': {'kind': 'ppo', 'init': 'sft', 'reward': ('reward',), 'kl': 0.1},
}


def config_with(**changes):
  values = {'seed': 0, 'data': '', 'model': {'embed': 8}, 'tokenizer': {'init': 'train'}}
  sections = {name: {**section, **changes.get(name, {})} for name, section in SECTIONS.items()}
  values |= {'stages': tuple(SECTIONS), 'mesh': {'data': 1}, **sections}
  values |= {key: value for key, value in changes.items() if key not in SECTIONS}
  return ml_collections.ConfigDict(values)


@pytest.fixture
def base(tmp_path):
  """The workdir of a run whose stages have all finished."""
  folder = tmp_path / 'base'
  for name in SECTIONS:
    (folder / name / 'checkpoints').mkdir(parents=True)
    (folder / name / 'checkpoints' / '3').write_text(name)
    (folder / name / 'finished.json').write_text('{"seconds": 1}')
  (folder / 'tokenizer').mkdir()
  fingerprints.record_files(folder / 'tokenizer')
  fingerprints.write_json(folder / 'config.json', json.loads(configs.as_json(config_with())))
  return folder


@pytest.mark.parametrize(
  'changes, copied',
  [
    ({'ppo': {'kl': 0.2}}, ['sft', 'feedback', 'reward']),
    ({'mesh': {'data': 2}}, ['sft', 'feedback', 'reward', 'ppo']),
    ({'reward': {'init': 'random'}}, ['sft', 'feedback']),  # ppo uses the reward
    ({'feedback': {'policies': ('sft', 'sft')}}, ['sft']),  # reward reads its file
    ({'sft': {'steps': 4}}, []),
  ],
)
def test_equal_stages_are_copied(base, tmp_path, changes, copied):
  workdir = tmp_path / 'new'
  workdir.mkdir()
  assert take_over(config_with(**changes), workdir, base, {}) == copied
  assert sorted(path.name for path in workdir.iterdir()) == sorted(
    [*copied, 'tokenizer'] if copied else []
  )
  for name in copied:
    assert (workdir / name / 'checkpoints' / '3').read_text() == name


def test_what_has_begun_stays(base, tmp_path):
  workdir = tmp_path / 'new'
  (workdir / 'sft').mkdir(parents=True)
  assert take_over(config_with(ppo={'kl': 0.2}), workdir, base, {}) == ['feedback', 'reward']
  assert not list((workdir / 'sft').iterdir())


def test_stages_that_have_not_finished_are_not_copied(base, tmp_path):
  (base / 'feedback' / 'finished.json').unlink()
  assert take_over(config_with(), tmp_path, base, {}) == ['sft']


def test_a_copy_that_broke_off_is_continued(base, tmp_path):
  """The tokenizer comes first: without it, the stages that are here would get a new one."""
  workdir = tmp_path / 'new'
  missing = base / 'feedback' / 'link'
  missing.symlink_to(tmp_path / 'nowhere')  # it cannot be copied, as on a full disk
  with pytest.raises(OSError) as raised:
    take_over(config_with(), workdir, base, {})
  message = failures.describe_os_error(raised.value)
  assert (
    'feedback.part/link: [Errno 2] No such file' in message
    and '\n' not in message
    and '[(' not in message
  )
  assert sorted(path.name for path in workdir.iterdir()) == ['sft', 'tokenizer']
  missing.unlink()
  assert take_over(config_with(), workdir, base, {}) == ['feedback', 'reward', 'ppo']
  fingerprints.check_folder(workdir / 'tokenizer')


def test_other_runs_are_refused(base, tmp_path):
  with pytest.raises(UserError, match='--from=.*: its stages cannot be used here, as config.seed'):
    take_over(config_with(seed=1), tmp_path, base, {})
  with pytest.raises(UserError, match='expected the workdir of a run, but it has no config.json'):
    take_over(config_with(), tmp_path, tmp_path, {})


def test_a_run_of_an_older_version_is_one_with_the_default(base, tmp_path, capsys):
  """A setting that it lacks counts as its default, and as nothing else."""
  defaults = {'model': {'numerics': 'fast'}}
  usual = config_with(model={'embed': 8, 'numerics': 'fast'})
  names = ['sft', 'feedback', 'reward', 'ppo']
  assert take_over(usual, tmp_path, base, defaults) == names
  assert 'an older version wrote it, without config.model.numerics;' in capsys.readouterr().out
  other = config_with(model={'embed': 8, 'numerics': 'exact'})
  with pytest.raises(UserError, match="config.model.numerics: None → 'exact'"):
    take_over(other, tmp_path, base, defaults)
  with pytest.raises(UserError, match='config.model.embed: 8 → None'):  # one that is gone
    take_over(config_with(model={'numerics': 'fast'}), tmp_path, base, defaults)
