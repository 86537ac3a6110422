"""What the tests of this folder share: recorded cases, their texts, compiled forwards."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import transformer
from rlhf_jax.runtime import mesh

HERE = Path(__file__).parent
DATA = HERE / 'data'  # a tiny model of each family: scripts/record_references.py
ADAPTERS = HERE / 'adapters'  # on some of them, by the same script
FIXTURES = HERE / 'fixtures'  # Llama as language and as reward model, by the same script
GGUF = HERE / 'gguf'  # models of the same kind as llama.cpp converts them: scripts/record_gguf.py
CASES = sorted(path.name for path in DATA.iterdir())

TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
LENGTHS = np.array([12, 9, 5])
MASK = np.arange(12) < LENGTHS[:, None]


def batch():
  """Returns tokens, positions and segment ids, [7, 12] int32 each.

  They are the three texts padded on the right, the same padded on the left, and a row of two
  packed texts.
  """
  packed = np.concatenate([TOKENS[0, :7], TOKENS[1, :5]])[None]
  tokens = np.concatenate([TOKENS, pad_left(TOKENS), packed])
  mask = np.concatenate([MASK, pad_left(MASK)]).astype(np.int32)
  segments = np.concatenate([mask, [[1] * 7 + [2] * 5]])
  row_positions = np.maximum(mask.cumsum(1) - 1, 0)
  positions = np.concatenate([row_positions, [[*range(7), *range(5)]]])
  return [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]


def pad_left(rows):
  return np.stack([np.roll(row, 12 - length) for row, length in zip(rows, LENGTHS)])


@functools.cache
def compiled_apply(config):
  """Returns the jitted forward of a model; tests of a file share what they compile."""
  return jax.jit(transformer.build_model(config).apply)


def hidden_states(config, params, tokens, mask):
  """Returns the hidden states of texts padded on the right, [B, T, D]."""
  positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))
  segments = jnp.asarray(mask, jnp.int32)
  return compiled_apply(config)(params, jnp.asarray(tokens), positions, segments)[0]


def layout(devices=None, **axes):
  return mesh.make_layout(mesh.MeshOptions(**axes), devices)


def shardings(config, on):
  """Returns the shardings of a model's parameters on a layout."""
  model = transformer.build_model(config, on)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return on.shardings(model.axes, shapes)


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
