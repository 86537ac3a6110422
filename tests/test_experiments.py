"""Every experiment documents itself: purpose, command, expected result, time, an override."""

import ast
from pathlib import Path
import re

import pytest

from rlhf_jax.experiment import pipeline

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / 'experiments').glob('*.py'))


def read_docstring(name):
  return ast.get_docstring(ast.parse((ROOT / f'experiments/{name}.py').read_text()))


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_docstring_has_all_parts(name):
  text = read_docstring(name)
  assert re.search(rf'^  python -m rlhf_jax.* --config=experiments/{name}\.py', text, re.MULTILINE)
  for part in ('Expected: ', 'Time: ', 'Try'):
    assert re.search(f'^{part}', text, re.MULTILINE), part
  assert '--' in text.split('\nTry')[1]


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_config_accepts_the_override(name):
  advice = read_docstring(name).split('\nTry')[1]
  overrides = [word.rstrip(',') for word in re.findall(r'--config\.(\S+=\S+)', advice)]
  pipeline.load_config(str(ROOT / f'experiments/{name}.py'), overrides)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_the_list_of_experiments_names_it(name):
  assert f'`{name}`' in (ROOT / 'docs/experiments.md').read_text()
