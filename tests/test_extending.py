"""What docs/extending.md shows works: its examples are run."""

import dataclasses
import functools
import json
from pathlib import Path
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import options as options_lib
from rlhf_jax import stages, testing
from rlhf_jax.errors import UserError
from rlhf_jax.experiment import pipeline
from rlhf_jax.feedback.judging import Comparison
from rlhf_jax.interop import families, pretrained
from rlhf_jax.objectives import advantages, preference
from rlhf_jax.rewards import sources
from rlhf_jax.stages import sft

PAGE = (Path(__file__).resolve().parents[1] / 'docs/extending.md').read_text()


def read_example(title):
  section = PAGE.split(f'\n## {title}\n')[1].split('\n## ')[0]
  return re.search(r'```python\n(.*?)```', section, re.DOTALL)[1]


def run_example(title, module):
  """Runs an example as if it stood at the end of a module; returns what it defines."""
  names = dict(vars(module))
  exec(compile(read_example(title), title, 'exec'), names)
  return names


OWN_STAGE = """
import entropy_sft
import ml_collections

def get_config():
  config = ml_collections.ConfigDict()
  config.stages = ('entropy_sft',)
  config.entropy_sft = dict(init='random', entropy_coefficient=0.5)
  return config
"""


def test_a_stage(monkeypatch, tmp_path):
  """Beside an experiment, the stage is run in its tiny form; its loss is that of SFT less c H."""
  (tmp_path / 'entropy_sft.py').write_text(read_example('A stage'))
  (tmp_path / 'experiment.py').write_text(OWN_STAGE)
  monkeypatch.setattr(stages, '_REGISTERED', {})
  monkeypatch.delitem(sys.modules, 'entropy_sft', raising=False)
  path = f'{tmp_path}/experiment.py:tiny'
  with pytest.raises(UserError, match="did you mean 'entropy_coefficient'"):
    pipeline.load_config(path, ['entropy_sft.entropy_coeficient=1'])
  config = pipeline.load_config(path)
  assert config.entropy_sft.loop.steps == 4
  results = pipeline.run(config, tmp_path / 'run')
  assert results['entropy_sft']['loss'] > 0
  assert (tmp_path / 'run/entropy_sft/export/model.safetensors').is_file()

  own = sys.modules['entropy_sft']
  definitions = testing.make_definitions()
  batch = testing.make_sequences()
  metrics = []
  for step, options in ((sft.train_step, sft.Options()), (own.train_step, own.Options())):
    train_step = jax.jit(functools.partial(step, definitions=definitions, options=options))
    metrics.append(train_step(testing.make_state(definitions), batch)[1])
  plain, with_bonus = metrics
  want = plain['loss'] - 0.01 * plain['entropy']
  np.testing.assert_allclose(with_bonus['loss'], want, rtol=1e-6)


def test_a_loss_with_a_setting(monkeypatch):
  monkeypatch.setattr(preference, 'PREFERENCE_LOSSES', dict(preference.PREFERENCE_LOSSES))
  names = run_example('A loss with a setting', preference)
  loss = preference.PREFERENCE_LOSSES['squared_hinge']
  better = preference.Response(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([5]))
  worse = preference.Response(jnp.array([-5.0]), jnp.array([-4.0]), jnp.array([5]))
  settings = names['SquaredHingeSettings'](beta=0.5, target=3.0)  # βΔ = 1
  np.testing.assert_allclose(loss.function(better, worse, settings), [4.0])
  with pytest.raises(UserError, match='beta: expected a number above 0'):
    options_lib.check_ranges(names['SquaredHingeSettings'](beta=0.0), 'config.dpo')


def test_an_advantage_that_needs_lengths(monkeypatch):
  monkeypatch.setattr(advantages, 'GROUP_ADVANTAGES', dict(advantages.GROUP_ADVANTAGES))
  run_example('An advantage that needs lengths', advantages)
  per_token = advantages.GROUP_ADVANTAGES['per_token']
  values = per_token(jnp.array([[1.0, 2.0]]), jnp.array([[1, 4]]))
  np.testing.assert_allclose(values, [[0.25, -0.25]])


def test_a_reward_source(monkeypatch):
  names = run_example('A reward source', sources)
  monkeypatch.setattr(sources, 'REWARD_KINDS', names['REWARD_KINDS'])
  source = sources.parse_reward_source('constant:0.5')
  assert not source.on_device
  score = sources.open_reward_source(source, sources.RewardSourceOptions(), None)
  values, failed = score([[], []], ['a', 'b'], [None, None])
  np.testing.assert_array_equal(values, [0.5, 0.5])
  assert failed == 0


def test_a_judge():
  names = {}
  exec(compile(read_example('A judge'), 'A judge', 'exec'), names)
  comparisons = [Comparison([], 'a', 'bb'), Comparison([], 'aa', 'b'), Comparison([], 'a', 'b')]
  assert names['shorter'](comparisons) == [1.0, 0.0, 0.5]


def test_a_model_family(monkeypatch, tmp_path):
  """A recorded OLMo 2 under the new family's name: the same shape, parameters and export."""
  monkeypatch.setitem(families.FAMILIES, 'own_olmo', None)  # taken away again
  run_example('A model family', families)
  recorded = Path(__file__).parent / 'interop/data/olmo2'
  for path in recorded.glob('*.safetensors'):
    shutil.copy(path, tmp_path)
  config = json.loads((recorded / 'config.json').read_text())
  config |= {'model_type': 'own_olmo', 'architectures': ['OwnOlmoForCausalLM']}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  shape = pretrained.read_config(tmp_path)
  want_shape = pretrained.read_config(recorded)
  assert shape == dataclasses.replace(want_shape, family='own_olmo')
  params = pretrained.load_parameters(tmp_path, shape)
  want = pretrained.load_parameters(recorded, want_shape)
  jax.tree.map(np.testing.assert_array_equal, params, want)
