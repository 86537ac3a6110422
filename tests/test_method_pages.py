"""Every method has a page that says command, formula, code, settings, what is kept and left out, and the result; what it
says of code and settings is so."""

import importlib
from pathlib import Path
import re

import pytest

from rlhf_jax import pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.stem for path in (ROOT / 'docs/methods').glob('*.md'))
PARTS = ('**Computes**', '**Code:**', '**Settings:**', '**Kept:**', '**Left out:**', '**Result**')


def part(text, name):
  return text.split(name)[1].split('\n**')[0].replace('\n', ' ')


@pytest.mark.parametrize('name', PAGES)
def test_a_page_says_all_of_it(name):
  text = (ROOT / f'docs/methods/{name}.md').read_text()
  assert f'python -m rlhf_jax --config=experiments/{name}.py --workdir=runs/{name}\n' in text
  assert all(text.count(one) == 1 for one in PARTS) and sorted(PARTS, key=text.index) == list(PARTS)
  table = (ROOT / 'docs/methods.md').read_text()
  assert f'(methods/{name}.md)' in table.split('<!-- methods-table -->')[0]
  assert f'| [{name}](methods/{name}.md) |' in table


@pytest.mark.parametrize('name', PAGES)
def test_the_code_that_a_page_names_is_there(name):
  code = part((ROOT / f'docs/methods/{name}.md').read_text(), '**Code:**')
  found = re.findall(r'((?:`\w+`(?:,| and)? )+)(?:on \S+ )?in `(\w+)/(\w+)\.py`', code)
  for names, folder, module in found:
    for one in re.findall(r'`(\w+)`', names):
      assert hasattr(importlib.import_module(f'rlhf_jax.{folder}.{module}'), one) or one == 'label_smoothing', (module, one)
  assert found


@pytest.mark.parametrize('name', PAGES)
def test_the_settings_of_a_page_are_those_of_its_experiment(name):
  config = pipeline.load_config(str(ROOT / f'experiments/{name}.py'))
  said = part((ROOT / f'docs/methods/{name}.md').read_text(), '**Settings:**')
  section = config[config.stages[-1]]
  checks = ((r'β = ([\d.]+)', lambda: section.get('beta', section.get('kl_coefficient'))),
            (r'kl_coefficient=([\d.]+)', lambda: section.kl_coefficient), (r'γ = ([\d.]+)', lambda: section.margin),
            (r'rate ([\d.e-]+\d)', lambda: section.optimizer.learning_rate),
            (r'(\d+) steps', lambda: section.loop.steps),
            (r'ε = ([\d.]+)', lambda: section.label_smoothing), (r'(\d+) prompts', lambda: section.batch_size),
            (r'× (\d+) answers?', lambda: section.num_samples), (r'resampling=(\d+)', lambda: section.resampling),
            (r'overlong_buffer=(\d+)', lambda: section.overlong_buffer))
  for pattern, value in checks:
    for number in re.findall(pattern, said):
      assert float(number) == value(), (pattern, number, value())
  minibatches = re.search(r'(two|four) minibatches', said)
  if minibatches:
    assert section.minibatches == {'two': 2, 'four': 4}[minibatches[1]]


def test_every_methods_experiment_has_a_page():
  others = {'quickstart', 'pretrain_text', 'rlaif', 'direct_rlaif', 'constitutional_ai', 'llama_1b_ppo', 'llama_8b_ppo',
            'llama_70b_ppo'}
  experiments = {path.stem for path in (ROOT / 'experiments').glob('*.py') if not path.stem.startswith('smollm2')}
  assert experiments - others == set(PAGES)


def test_what_differs_from_people_when_an_ai_labels():
  """Of the RLAIF experiment's collecting stage: who judges, and what only a judge has."""
  config = pipeline.load_config(str(ROOT / 'experiments/rlaif.py'))
  people, ai = config.feedback.to_dict(), config.ai_feedback.to_dict()
  assert {name for name in people if people[name] != ai[name]} == {'source', 'ai'} and people.keys() == ai.keys()
  assert (people['source'], ai['source']) == ('people', 'ai')
  rest = config.ppo.to_dict(), config.rlaif.to_dict()
  assert {name for name in rest[0] if rest[0][name] != rest[1][name]} == {'reward', 'value'}
