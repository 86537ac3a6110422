import contextlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from rlhf_jax import testing
from rlhf_jax.experiment import pipeline
from rlhf_jax.stages.shared.context import Context

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'

# What makes a stage begin with random models, so that a test needs no earlier stage.
RANDOM = {
  'ppo': ['ppo.init=random', 'ppo.value=', 'ppo.reference=random'],
  'critique': ['critique.model=random'],
  'feedback': ['feedback.policies=("random",)'],
}


@pytest.fixture(scope='session')
def quickstart():
  """The tiny quickstart, as a command line names it."""
  return f'{EXPERIMENTS}/quickstart.py:tiny'


@pytest.fixture(scope='session')
def tokenizer():
  return testing.make_tokenizer()


@pytest.fixture
def context(tmp_path, tokenizer):
  """context(stage, *overrides): a stage's surroundings in a tiny experiment, from random models."""

  def make(name, *overrides, layout=None, experiment='quickstart'):
    random = RANDOM.get(name, [f'{name}.init=random'])
    path = f'{EXPERIMENTS}/{experiment}.py:tiny'
    config = pipeline.load_config(path, [*random, *overrides])
    return Context(config, name, tmp_path, layout or testing.make_layout(), tokenizer)

  return make


@pytest.fixture(scope='module')
def own_cache(tmp_path_factory):
  """Compiled programs go to the module's folder, and nothing of it stays."""
  before = jax.config.jax_compilation_cache_dir
  with contextlib.ExitStack() as stack:
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    stack.callback(compilation_cache.reset_cache)  # else later tests go on writing there
    stack.callback(jax.config.update, 'jax_compilation_cache_dir', before)
    stack.callback(jax.config.update, 'jax_compilation_cache_max_size', -1)
    yield
