"""Every family beside what transformers computed for it: scripts/record_references.py."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.interop import pretrained
from rlhf_jax.models import experts, heads, transformer
from rlhf_jax.runtime import mesh

DATA = Path(__file__).parent / 'data'
CASES = sorted(path.name for path in DATA.iterdir())
TOKENS = np.array(
  [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8, 0, 0, 0],
    [63, 10, 31, 2, 5, 0, 0, 0, 0, 0, 0, 0],
  ]
)
MASK = np.arange(12) < np.array([12, 9, 5])[:, None]


def batch():
  """Three texts padded on the right, the same padded on the left, and a row of two packed texts."""

  def left(x):
    return np.stack([np.roll(row, 12 - mask.sum()) for row, mask in zip(x, MASK)])

  packed = np.concatenate([TOKENS[0, :7], TOKENS[1, :5]])[None]
  tokens = np.concatenate([TOKENS, left(TOKENS), packed])
  mask = np.concatenate([MASK, left(MASK)]).astype(np.int32)
  segments = np.concatenate([mask, [[1] * 7 + [2] * 5]])
  positions = np.concatenate([np.maximum(mask.cumsum(1) - 1, 0), [[*range(7), *range(5)]]])
  return [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]


@pytest.mark.parametrize('case', CASES)
def test_logits_of_padded_and_packed_texts_and_of_a_cache(case):
  config = pretrained.read_config(DATA / case)
  params, reference = (
    pretrained.load_parameters(DATA / case, config),
    np.load(DATA / case / 'logits.npz'),
  )
  model, (tokens, positions, segments) = transformer.build_model(config), batch()
  hidden = jax.jit(model.apply)(params, tokens, positions, segments)[0]
  logits = np.asarray(heads.next_token_logits(model, params, hidden))
  left = np.asarray(segments[3:6]).astype(bool)
  np.testing.assert_allclose(logits[:3][MASK], reference['right'][MASK], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[3:6][left], reference['left'][left], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[6, :7], reference['right'][0, :7], atol=1e-4, rtol=1e-5)
  np.testing.assert_allclose(logits[6, 7:], reference['right'][1, :5], atol=1e-4, rtol=1e-5)

  apply, weights = jax.jit(model.apply), transformer.unstack_layers(params)
  cache, parts = transformer.empty_cache(config, 7, 12, stacked=False), []
  for start in range(0, 12, 4):
    part = slice(start, start + 4)
    found, cache = apply(weights, tokens[:, part], positions[:, part], segments[:, part], cache)
    parts.append(found)
  seen = np.asarray(segments).astype(bool)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1)[seen], np.asarray(hidden)[seen], atol=2e-5
  )


def test_windows_shorter_and_longer_than_the_text():
  """Local and global layers, scanned and unrolled, without and with a cache."""
  config = dataclasses.replace(pretrained.read_config(DATA / 'gemma3'), rope_local_theta=0.0)
  params, x = pretrained.load_parameters(DATA / 'gemma3', config), batch()
  seen = np.asarray(x[2]).astype(bool)

  def run(windows, weights=params, cache=None):
    model = transformer.build_model(dataclasses.replace(config, windows=windows))
    apply, size, parts = jax.jit(model.apply), 6 if cache else 12, []
    for start in range(0, 12, size):
      found, cache = apply(weights, *(values[:, start : start + size] for values in x), cache)
      parts.append(found)
    return np.concatenate(parts, axis=1)[seen]

  everything, short = run(()), run((11, 0))
  np.testing.assert_allclose(run((12, 0)), everything, atol=1e-6)
  assert np.abs(short - everything).max() > 1e-3  # the twelfth token no longer sees the first
  for stacked in (True, False):  # the cache has room for more than the text
    weights, cache = (
      params if stacked else transformer.unstack_layers(params),
      transformer.empty_cache(config, 7, 20, stacked),
    )
    np.testing.assert_allclose(run((11, 0), weights, cache), short, atol=2e-5)


def test_bfloat16_computes_and_float32_remembers():
  config = pretrained.read_config(DATA / 'llama')
  params, x = pretrained.load_parameters(DATA / 'llama', config), [values[:1] for values in batch()]
  exact, half = (
    transformer.build_model(dataclasses.replace(config, dtype=dtype))
    for dtype in ('float32', 'bfloat16')
  )
  got = half.apply(params, *x)[0]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(got, exact.apply(params, *x)[0], atol=0.1, rtol=0.05)

  def logprobs(params):
    return heads.token_logprobs(half, params, half.apply(params, *x)[0], x[0])[0]

  assert jax.eval_shape(logprobs, params).dtype == jnp.float32
  grads = jax.eval_shape(jax.grad(lambda params: logprobs(params).sum()), params)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_experts_sorted_and_one_after_the_other():
  keys = jax.random.split(jax.random.key(0), 5)
  x, router = jax.random.normal(keys[0], (19, 8)), jax.random.normal(keys[1], (8, 5))
  matrices = [
    jax.random.normal(key, shape) for key, shape in zip(keys[2:], ((5, 8, 6), (5, 8, 6), (5, 6, 8)))
  ]

  def run(x, matrices, ragged):
    weights, chosen = experts.route(x, router, 2, renormalise=True)
    return experts.mix(x, weights, chosen, *matrices, jax.nn.silu, ragged)

  want = np.zeros((19, 8))
  for i, row in enumerate(np.asarray(x, np.float64)):  # by hand, token by token
    odds = np.exp(row @ np.asarray(router))
    for e in np.argsort(-odds)[:2]:
      gate, up, down = (np.asarray(matrix[e], np.float64) for matrix in matrices)
      inner = row @ gate
      want[i] += (
        odds[e] / np.sort(odds)[-2:].sum() * ((inner / (1 + np.exp(-inner)) * (row @ up)) @ down)
      )

  def loss(ragged):
    return jax.jit(
      jax.value_and_grad(lambda x, m: jnp.sum(run(x, m, ragged) ** 2), argnums=(0, 1))
    )(x, matrices)

  for ragged in (False, True):
    np.testing.assert_allclose(run(x, matrices, ragged), want, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), loss(False), loss(True)
  )


def test_experts_take_no_memory_for_all_experts_at_once():
  E, M, D, F = 32, 1024, 32, 64
  gate, down, x = jnp.zeros((E, D, F)), jnp.zeros((E, F, D)), jnp.zeros((M, D))

  def loss(gate, x):
    weights, chosen = experts.route(x, jnp.zeros((D, E)), 2, True)
    return experts.mix(x, weights, chosen, gate, gate, down, jax.nn.silu, False).sum()

  memory = jax.jit(jax.grad(loss)).lower(gate, x).compile().memory_analysis()
  assert (
    memory.temp_size_in_bytes < E * M * F * 4 / 2
  )  # one array of [experts, tokens, mlp] would be twice that


@pytest.mark.parametrize(
  'case, axes', [('mixtral', dict(expert=2, fsdp=2)), ('gemma2', dict(tensor=2, fsdp=2))]
)
def test_sharded_equals_one_device(case, axes):
  layout = mesh.make_layout(mesh.MeshOptions(**axes))
  config = pretrained.read_config(DATA / case)
  plain, sharded = transformer.build_model(config), transformer.build_model(config, layout)
  shardings = layout.shardings(sharded.axes, jax.eval_shape(sharded.init, jax.random.key(0)))
  inputs = [jnp.concatenate([x, x[:1]]) for x in batch()]
  want = jax.jit(plain.apply)(pretrained.load_parameters(DATA / case, config), *inputs)[0]
  params = pretrained.load_parameters(DATA / case, config, shardings)
  got = jax.jit(sharded.apply)(params, *layout.place(inputs))[0]
  np.testing.assert_allclose(got, want, atol=2e-4)
  if 'expert' in axes:
    assert params['layers']['gate'].addressable_shards[0].data.shape == (2, 2, 16, 24)
