"""Models and data sets of the hub, from the cache of `huggingface_hub`; nothing is downloaded."""

import json
import shutil

import pytest

from rlhf_jax import hub
from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained
from rlhf_jax.stages.shared import model_sources

REVISION = 'a' * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and a hub that cannot be reached."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return tmp_path


def snapshot(cache, folder):
  """The folder of a repository's only snapshot, as the library keeps it."""
  (cache / folder / 'refs').mkdir(parents=True)
  (cache / folder / 'refs' / 'main').write_text(REVISION)
  path = cache / folder / 'snapshots' / REVISION
  path.mkdir(parents=True)
  return path


def test_a_data_set_in_the_cache(cache, capsys):
  path = snapshot(cache, 'datasets--org--pairs')
  row = {'prompt': 'Where?', 'chosen': 'There.', 'rejected': 'No.'}
  (path / 'train.jsonl').write_text(json.dumps(row) + '\n')
  options = DataOptions(source='jsonl', path=('hf:org/pairs',))
  [ranking] = sources.load_records(options, 'ranking', 'train')
  assert ranking.responses == ['There.', 'No.']
  assert 'hf:org/pairs: read as prompts with a chosen and a rejected' in capsys.readouterr().err
  with pytest.raises(UserError, match="no files of the split 'validation', got train"):
    sources.load_records(options, 'ranking', 'validation')


def test_a_model_in_the_cache(cache, pytestconfig):
  path = snapshot(cache, 'models--org--tiny')
  shutil.copytree(
    pytestconfig.rootpath / 'tests' / 'interop' / 'fixtures' / 'tiny_llama',
    path,
    dirs_exist_ok=True,
  )
  source = model_sources.find_model('org/tiny')
  assert source.name == 'org/tiny'
  assert source.config == pretrained.read_config(path)


@pytest.mark.parametrize(
  'use, command',
  [
    (
      lambda: sources.load_records(
        DataOptions(source='jsonl', path=('hf:org/pairs@v1',)), 'ranking', 'train'
      ),
      'hf download org/pairs --repo-type dataset --revision v1',
    ),
    (lambda: model_sources.find_model('org/tiny'), 'hf download org/tiny --repo-type model'),
    (lambda: pretrained.open_tokenizer('org/tiny'), 'hf download org/tiny --repo-type model'),
  ],
)
def test_what_is_not_there_comes_with_the_command_that_downloads_it(cache, use, command):
  with pytest.raises(UserError) as error:
    use()
  assert 'not found' in str(error.value) and str(error.value).endswith(command)
  assert '\n' not in str(error.value)


def test_names_of_the_hub():
  assert hub.is_hub_name('org/name') and hub.is_hub_name('org/name.2@main')
  for name in ('smollm2', 'a/b/c', './a', '../a', '/a/b', 'runs/', '~/a'):
    assert not hub.is_hub_name(name)
  with pytest.raises(UserError, match='hf:pairs: expected ORG/NAME'):
    hub.find_snapshot('pairs', 'dataset', ())
