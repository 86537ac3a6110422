import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention, exact, layout, model_config, transformer
from rlhf_jax.runtime import mesh

CONFIG = transformer.ModelConfig(
  vocab_size=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, head=True
)


@pytest.fixture(scope='module')
def model():
  built = transformer.build_model(CONFIG)
  return dataclasses.replace(built, apply=jax.jit(built.apply))


@pytest.fixture(scope='module')
def params(model):
  return jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))  # attention that is not flat


def ragged(length=10):
  tokens = jax.random.randint(jax.random.key(1), (3, length), 0, 64)
  positions = jnp.tile(jnp.arange(length), (3, 1))
  return tokens, positions, jnp.ones((3, length), jnp.int32)


def by_hand(params, tokens):
  """One row [T] through loops over layers, heads and places, float64 numpy; hidden
  states [T, D].
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale

  def rotate(x, t):
    half = len(x) // 2
    angle = t * CONFIG.rope_theta ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
      [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )

  h = p['embedding'][tokens]
  for i in range(CONFIG.layers):
    w = {name: leaf[i] for name, leaf in p['layers'].items()}
    x = norm(h, w['attention_norm'])
    out = np.zeros_like(h)
    for head in range(CONFIG.heads):
      shared = head // (CONFIG.heads // CONFIG.kv_heads)
      q = np.stack([rotate(x[t] @ w['query'][:, head], t) for t in range(len(x))])
      k = np.stack([rotate(x[t] @ w['key'][:, shared], t) for t in range(len(x))])
      v = x @ w['value'][:, shared]
      for t in range(len(x)):
        logits = k[: t + 1] @ q[t] / np.sqrt(CONFIG.head_dim)
        weights = np.exp(logits - logits.max())
        out[t] += (weights / weights.sum()) @ v[: t + 1] @ w['output'][head]
    h = h + out
    x = norm(h, w['mlp_norm'])
    gate = x @ w['gate']
    h = h + (gate / (1 + np.exp(-gate)) * (x @ w['up'])) @ w['down']
  return norm(h, p['norm'])


def test_equals_the_slow_loops(model, params):
  tokens, positions, segments = ragged()
  hidden, _ = model.apply(params, tokens, positions, segments)
  np.testing.assert_allclose(hidden[1], by_hand(params, np.asarray(tokens[1])), atol=2e-5)


@pytest.mark.parametrize('change', [dict(remat='full'), dict(remat='dots')])
def test_remat_changes_neither_values_nor_gradients(model, params, change):
  other, inputs = transformer.build_model(dataclasses.replace(CONFIG, **change)), ragged()

  def total(m):
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(m.apply(p, *inputs)[0] ** 3)))(params)

  def check_close(got, want):
    # What cancels within an array is as exact as its largest entries.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())

  jax.tree.map(check_close, total(other), total(model))


class OneGpu(layout.SingleDevice):
  platform = 'gpu'


@pytest.mark.parametrize('remat, runs', [('none', 1), ('dots', 1), ('full', 2)])
def test_the_backward_pass_on_a_gpu_repeats_only_what_it_must(monkeypatch, remat, runs):
  """cuDNN's attention runs once unless everything is recomputed, and nothing saved is copied."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91300)
  config = dataclasses.replace(CONFIG, dtype='bfloat16', remat=remat)
  on_gpu = transformer.build_model(config, OneGpu())
  params, inputs = jax.eval_shape(on_gpu.init, jax.random.key(0)), ragged()

  def total(params):
    return jnp.sum(on_gpu.apply(params, *inputs)[0].astype(jnp.float32))

  program = str(jax.make_jaxpr(jax.grad(total))(params))
  # one of both is run: with a mask, and causal alone
  assert program.count(model_config.CUDNN_ATTENTION + '[') == 2 * runs
  assert 'prevent_cse=True' not in program
  assert ('prevent_cse=False' in program) == (remat != 'none')


def test_scanned_and_unrolled_are_equal(model, params):
  inputs = ragged()
  np.testing.assert_allclose(
    model.apply(params, *inputs)[0],
    model.apply(transformer.unstack_layers(params), *inputs)[0],
    atol=1e-5,
  )


@pytest.mark.parametrize('stacked', [True, False])
@pytest.mark.parametrize('segments_of_cache', [1, 3])
@pytest.mark.parametrize('each_row', [False, True])
def test_prefill_and_decode_equal_the_full_forward(
  model, params, monkeypatch, stacked, segments_of_cache, each_row
):
  """Also for pieces that lie in two segments of the cache, of 4, 4 and 8 slots."""
  if segments_of_cache == 3:
    monkeypatch.setattr(attention, 'LEAST_READ', 2)
  tokens, positions, segments = ragged()
  want, _ = model.apply(params, tokens, positions, segments)
  weights = params if stacked else transformer.unstack_layers(params)
  cache = transformer.empty_cache(CONFIG, 3, 16, stacked)
  pair = cache.layers if stacked else cache.layers[0]
  assert len(pair['key']) == segments_of_cache
  got = []
  for start, end in [(0, 3), (3, 7), (7, 8), (8, 10)]:
    part = slice(start, end)
    if each_row and start:
      cache = cache.replace(length=jnp.full(3, start))
    hidden, cache = model.apply(
      weights, tokens[:, part], positions[:, part], segments[:, part], cache
    )
    got.append(hidden)
  np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=1e-5)


@pytest.mark.parametrize('left', [0, 3, 6])
def test_padding_changes_nothing(model, params, left):
  tokens, positions, segments = ragged(4)
  want, _ = model.apply(params, tokens, positions, segments)

  def pad(x, value):
    return jnp.pad(x, ((0, 0), (left, 6 - left)), constant_values=value)

  hidden, _ = model.apply(params, pad(tokens, 7), pad(positions, 0), pad(segments, 0))
  assert np.isfinite(hidden).all()
  np.testing.assert_allclose(hidden[:, left : left + 4], want, atol=1e-5)


@pytest.mark.parametrize('numerics', ['fast', 'exact'])
@pytest.mark.parametrize('of_each_row', [False, True])
def test_states_and_gradients_at_some_places(params, numerics, of_each_row):
  """The last layer may leave out what is not read; rows are padded on either side."""
  model = transformer.build_model(dataclasses.replace(CONFIG, numerics=numerics))
  tokens, _, segments = ragged(10)
  segments = segments.at[0, :3].set(0).at[1, 8:].set(0)
  positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
  places, columns = slice(5, -2), jnp.tile(jnp.arange(5, 8), (3, 1))
  if of_each_row:
    places = columns = jnp.array([[5, 9], [2, 7], [0, 8]])
  is_token = jnp.take_along_axis(segments, columns, axis=1)[..., None] > 0

  def read_some(params):
    hidden, _ = model.apply(params, tokens, positions, segments, places=places)
    return jnp.where(is_token, hidden, 0)

  def read_all(params):
    hidden, _ = model.apply(params, tokens, positions, segments)
    return jnp.where(is_token, jnp.take_along_axis(hidden, columns[..., None], axis=1), 0)

  def run(read):
    def total(params):
      hidden = read(params)
      return jnp.mean(jnp.sin(hidden)), hidden

    return jax.jit(jax.grad(total, has_aux=True))(params)

  for got, want in zip(run(read_some), run(read_all)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_packed_segments_do_not_see_each_other(model, params):
  tokens, positions, segments = ragged(10)
  alone = [
    model.apply(params, tokens[:, a:b], positions[:, : b - a], segments[:, a:b])[0]
    for a, b in [(0, 4), (4, 10)]
  ]
  packed_positions = jnp.concatenate([positions[:, :4], positions[:, :6]], axis=1)
  packed_segments = jnp.concatenate([segments[:, :4], 2 * segments[:, :6]], axis=1)
  hidden, _ = model.apply(params, tokens, packed_positions, packed_segments)
  np.testing.assert_allclose(hidden, jnp.concatenate(alone, axis=1), atol=1e-5)


def test_every_leaf_has_a_name_for_each_axis(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  jax.tree.map(
    lambda shape, names: len(shape.shape) == len(names) or pytest.fail(str(names)),
    shapes,
    model.axes,
  )


@pytest.mark.parametrize(
  'axes', [dict(fsdp=8), dict(tensor=2), dict(context=4), dict(data=2, fsdp=2, tensor=2)]
)
def test_sharded_equals_one_device(model, params, axes):
  on = mesh.make_layout(mesh.MeshOptions(**axes))
  sharded = transformer.build_model(CONFIG, on)
  placed = jax.device_put(params, on.shardings(sharded.axes, params))
  inputs = [jnp.tile(x, (8, 1))[:8] for x in ragged()]
  hidden, _ = jax.jit(sharded.apply)(placed, *on.place(inputs))
  np.testing.assert_allclose(hidden, model.apply(params, *inputs)[0], atol=1e-5)
  whole = [
    leaf for leaf in jax.tree.leaves(placed) if leaf.size > 64 and leaf.sharding.is_fully_replicated
  ]
  assert not whole or 'fsdp' not in axes


def test_parameters_in_the_dtype_that_they_compute_in_give_the_same_bits():
  model = transformer.build_model(dataclasses.replace(CONFIG, dtype='bfloat16'))
  params, inputs = model.init(jax.random.key(0)), ragged()
  half = transformer.cast_for_compute(params, 'bfloat16')
  assert half['layers']['query'].dtype == half['embedding'].dtype == jnp.bfloat16
  for kept in half['norm'], half['layers']['attention_norm'], half['score']['kernel']:
    assert kept.dtype == jnp.float32
  np.testing.assert_array_equal(model.apply(half, *inputs)[0], model.apply(params, *inputs)[0])


@pytest.mark.parametrize('norm', ['rms', 'rms_offset', 'layer'])
def test_no_leaf_is_weakly_typed(norm):
  """A weakly typed leaf becomes a strongly typed one in the first update: two compilations."""
  config = dataclasses.replace(CONFIG, norm=norm, qk_norm='head', lora_rank=2, lora_targets=('up',))
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    assert leaf.dtype == jnp.float32, path
    assert not leaf.weak_type, path


def test_a_single_device_moves_nothing():
  device, x = layout.SingleDevice(), jnp.ones((2, 3))
  assert device.platform == jax.default_backend()
  assert device.constrain(x, ('batch', 'length')) is x
  assert device.shard_map(jnp.sin, [('batch',)], ('batch',)) is jnp.sin
  assert device.with_gathered_matrix(lambda matrix, row: (matrix, row), x, 7) == (x, 7)


def test_the_forward_is_a_function_of_values(model, params):
  """`Model.apply` with its definitions bound again by hand."""
  graph, inputs = transformer.build_model(CONFIG).apply.args[1], ragged()
  one_device = layout.SingleDevice()
  arithmetic = exact.build_arithmetic(CONFIG, one_device)
  got, cache = transformer.apply_model(CONFIG, graph, one_device, arithmetic, params, *inputs)
  np.testing.assert_allclose(got, model.apply(params, *inputs)[0], rtol=1e-5, atol=1e-5)
  assert cache is None


@pytest.mark.parametrize(
  'changes',
  [
    dict(qkv_bias=True, mlp_bias=True, lora_rank=2, lora_targets=('query', 'value', 'up')),
    dict(experts=4, experts_per_token=2),
    dict(gated=False),
  ],
)
def test_joined_matrices_change_nothing(changes):
  """As decoding joins them; matrices that cannot be joined stay as they are."""
  model = transformer.build_model(dataclasses.replace(CONFIG, **changes))
  params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
  tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, CONFIG.vocab_size)
  ones = jnp.ones_like(tokens)
  apply = jax.jit(model.apply)
  joined = transformer.unstack_layers(params, join=True)
  assert 'query' not in joined['layers'][0]
  assert ('gate_up' in joined['layers'][0]) == ('lora_rank' in changes)
  for some in (joined, transformer.unstack_layers(params)):
    hidden, _ = apply(some, tokens, jnp.arange(5) * ones, ones)
    want, _ = apply(params, tokens, jnp.arange(5) * ones, ones)
    np.testing.assert_allclose(hidden, want, atol=2e-5)
