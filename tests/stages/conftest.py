"""A tiny model on several meshes, a tiny world, and what the tests of every stage ask."""

import contextlib
import functools
from pathlib import Path
import sys

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from rlhf_jax import pipeline
from rlhf_jax.data import sources
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.models import transformer
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages.shared import common

CONFIG = transformer.ModelConfig(
    vocab_size=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, head=True)
MESHES = {'one device': None, 'data 8': {}, 'fsdp 8': dict(data=1, fsdp=8),
          'data 4, tensor 2': dict(tensor=2), 'data 2, context 4': dict(context=4),
          'data 2, fsdp 2, tensor 2': dict(data=2, fsdp=2, tensor=2)}
EXPERIMENT = str(Path(__file__).parents[2] / 'experiments/quickstart.py:tiny')


def layout(name='one device'):
  axes = MESHES[name]
  return mesh.make_layout(mesh.DEFAULTS, jax.devices()[:1]) if axes is None else mesh.make_layout({**mesh.DEFAULTS, **axes})


def model(on):
  """The tiny decoder with a scalar head, on a layout."""
  return transformer.build_model(CONFIG, on)


@functools.cache
def values(seed):
  return jax.device_get(jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, transformer.build_model(CONFIG).init(key)))(
      jax.random.key(seed)))


def params(model, on, seed=0):
  """The same numbers on every mesh, of a size that makes a difference."""
  return jax.device_put(values(seed), on.shardings(model.axes, values(seed)))


def close(got, want, said, tolerance=1e-5):
  """Two trees of arrays are equal within the tolerance, relative or absolute."""
  got, want = jax.device_get((got, want))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=said + jax.tree_util.keystr(path))


@pytest.fixture(scope='session')
def tiny():
  """The functions above, for test files."""
  return sys.modules[__name__]


@pytest.fixture(scope='session')
def tokenizer():
  config = pipeline.load_config(EXPERIMENT)
  documents = sources.load_records(config.tokenizer.data, 'document', 'train')[:200]
  return Tokenizer(vocabulary.train_tokenizer((row.text for row in documents), 384), vocabulary.CHAT_TEMPLATE, eos='<eos>',
                   pad='<pad>')


@pytest.fixture
def context(tmp_path, tokenizer):
  """context(stage, *overrides): a stage's surroundings in the tiny quickstart, or another experiment, from random models
  on one device."""
  def make(name, *overrides, on=None, experiment='quickstart'):
    random = {'ppo': ['ppo.init=random', 'ppo.value=', 'ppo.reference=random'], 'critique': ['critique.model=random'],
              'feedback': ['feedback.policies=("random",)', 'feedback.ai.judges=("random",)']}
    path = Path(EXPERIMENT).with_name(f'{experiment}.py:tiny')
    return common.Context(pipeline.load_config(str(path), [*random.get(name, [f'{name}.init=random']), *overrides]),
                          name, tmp_path, on or layout(), tokenizer)
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
    yield
