"""Every method has a page with command, formula, code, settings, departures and result.

What a page says of code and settings is checked; of results, in test_figures.py.
"""

import importlib
from pathlib import Path
import re

import pytest

from rlhf_jax.experiment import pipeline

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.stem for path in (ROOT / 'docs/methods').glob('*.md'))
PARTS = (
  '**Computes**',
  '**Code:**',
  '**Settings:**',
  '**Kept:**',
  '**Left out:**',
  '**Result**',
)
OTHER_EXPERIMENTS = {  # without a page in docs/methods
  'quickstart',
  'people',
  'pretrain_text',
  'rlaif',
  'direct_rlaif',
  'reward_halves',
  'constitutional_ai',
  'large_base',
  'small_against_large',
  'llama_1b_ppo',
  'llama_8b_ppo',
  'llama_70b_ppo',
}
SETTINGS = (  # a pattern on the page, and the field of the stage's section that it gives
  (r'kl_coefficient=([\d.]+)', 'kl_coefficient'),
  (r'γ = ([\d.]+)', 'margin'),
  (r'rate ([\d.e-]+\d)', 'optimizer.learning_rate'),
  (r'(\d+) steps', 'loop.steps'),
  (r'ε = ([\d.]+)', 'label_smoothing'),
  (r'(\d+) prompts', 'batch_size'),
  (r'× (\d+) responses?', 'num_samples'),
  (r'resampling=(\d+)', 'resampling'),
  (r'overlong_buffer=(\d+)', 'overlong_buffer'),
)
LAMBDAS = {'cpo': 'nll_coefficient', 'dpop': 'dpop_lambda', 'orpo': 'beta'}  # a loss's λ
NUMBERS = {'two': 2, 'four': 4}


def read_page(name):
  return (ROOT / f'docs/methods/{name}.md').read_text()


def read_part(name, title):
  return read_page(name).split(title)[1].split('\n**')[0].replace('\n', ' ')


def look_up(section, key):
  for part in key.split('.'):
    section = section[part]
  return section


@pytest.mark.parametrize('name', PAGES)
def test_a_page_has_all_parts_in_order(name):
  text = read_page(name)
  command = f'python -m rlhf_jax --config=experiments/{name}.py --workdir=runs/{name}\n'
  assert command in text
  assert all(text.count(part) == 1 for part in PARTS)
  assert sorted(PARTS, key=text.index) == list(PARTS)
  table = (ROOT / 'docs/methods.md').read_text()
  assert f'(methods/{name}.md)' in table.split('<!-- methods-table -->')[0]
  assert f'| [{name}](methods/{name}.md) |' in table


@pytest.mark.parametrize('name', PAGES)
def test_the_code_that_a_page_names_exists(name):
  code = read_part(name, '**Code:**')
  references = re.findall(r'((?:`\w+`(?:,| and)? )+)(?:on \S+ )?in `(\w+)/(\w+)\.py`', code)
  assert references
  for names, folder, module_name in references:
    module = importlib.import_module(f'rlhf_jax.{folder}.{module_name}')
    for attribute in re.findall(r'`(\w+)`', names):
      # A key of the config may stand among the functions.
      assert hasattr(module, attribute) or attribute == 'label_smoothing', (module, attribute)


@pytest.mark.parametrize('name', PAGES)
def test_the_settings_of_a_page_are_those_of_its_experiment(name):
  config = pipeline.load_config(str(ROOT / f'experiments/{name}.py'))
  section = config[config.stages[-1]]
  settings = read_part(name, '**Settings:**')
  for number in re.findall(r'β = ([\d.]+)', settings):
    key = 'beta' if 'beta' in section else 'kl_coefficient'
    assert float(number) == section[key]
  for number in re.findall(r'λ = ([\d.]+)', settings):
    assert float(number) == section[LAMBDAS[name]]
  for pattern, key in SETTINGS:
    for number in re.findall(pattern, settings):
      assert float(number) == look_up(section, key), (pattern, number)
  minibatches = re.search(r'(two|four) minibatches', settings)
  if minibatches:
    assert section.minibatches == NUMBERS[minibatches[1]]


def test_every_methods_experiment_has_a_page():
  experiments = {path.stem for path in (ROOT / 'experiments').glob('*.py')}
  real = {name for name in experiments if name.startswith('smollm2')}
  assert experiments - OTHER_EXPERIMENTS - real == set(PAGES)


def test_what_differs_from_annotators_when_an_ai_labels():
  """Of the RLAIF experiment's collecting stage: who judges, and what only a judge has."""
  config = pipeline.load_config(str(ROOT / 'experiments/rlaif.py'))
  annotators = config.feedback.to_dict()
  ai = config.ai_feedback.to_dict()
  assert annotators.keys() == ai.keys()
  assert {key for key in ai if annotators[key] != ai[key]} == {'source', 'ai'}
  assert (annotators['source'], ai['source']) == ('simulated', 'ai')
  ppo = config.ppo.to_dict()
  rlaif = config.rlaif.to_dict()
  assert {key for key in ppo if ppo[key] != rlaif[key]} == {'reward', 'value'}
