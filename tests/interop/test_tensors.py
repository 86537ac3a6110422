import dataclasses
import functools

from interop_cases import CASES, DATA
import jax
import numpy as np
import pytest

from rlhf_jax.interop import families, pretrained
from rlhf_jax.models import transformer

CONFIG = transformer.ModelConfig(
  vocab_size=64, embed=32, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=48
)


@pytest.mark.parametrize('case', CASES)
def test_every_leaf_of_the_model_has_its_place_and_comes_back_whole_and_in_parts(case):
  config = dataclasses.replace(pretrained.read_config(DATA / case), head=True)
  random = np.random.default_rng(0)
  made = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  del made['score']['bias']  # Hugging Face has none
  table = families.list_tensors(config)
  assert len(table) == len(jax.tree.leaves(made))
  leaves = {}  # row → random values
  parts_of = {}  # name in the file → what its rows write
  shapes = {}
  fused_axes = {}
  for tensor in table:
    leaf = functools.reduce(lambda tree, key: tree[key], tensor.keys, made)
    assert leaf.shape == tensor.shape(config), tensor.path
    leaves[tensor] = random.normal(size=leaf.shape).astype(np.float32)
    for name, place in zip(tensor.names(config), tensor.places(config)):
      written = tensor.write(config, leaves[tensor][place])
      parts_of.setdefault(name, []).append(written)
      shapes[name] = tensor.file_shape(config)
      fused_axes[name] = tensor.fused_axis or 0
  files = {name: np.concatenate(parts, axis=fused_axes[name]) for name, parts in parts_of.items()}
  assert {name: matrix.shape for name, matrix in files.items()} == shapes

  def fetch(name, slices):
    return files[name][slices]

  for tensor, leaf in leaves.items():
    np.testing.assert_array_equal(tensor.read(config, fetch), leaf)
    index = tuple(slice(size // 2, size) for size in leaf.shape)
    np.testing.assert_array_equal(tensor.read(config, fetch, index), leaf[index])


def test_query_rows_are_heads():
  query = next(tensor for tensor in families.list_tensors(CONFIG) if tensor.path == 'layers.query')
  # 4 heads of 6: row r is head r // 6, place r % 6
  rows = np.repeat(np.arange(24.0)[:, None], 32, 1)
  leaf = query.read(CONFIG, lambda name, slices: rows[slices])
  assert leaf[2, 0, 1].tolist() == [6, 7, 8, 9, 10, 11]
