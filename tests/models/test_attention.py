"""All hands that compute attention beside the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, decode_attention, transformer
from rlhf_jax.runtime import mesh

CONFIG = transformer.ModelConfig(
  vocab_size=16,
  embed=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp=16,
  windows=(40, 0),
  attention_cap=5.0,
)


def inputs(T=128):
  """Rows padded on the right, on the left, and packed."""
  segments = np.ones((4, T), np.int32)
  segments[0, 100:] = 0
  segments[1, :30] = 0
  segments[2, 60:] = 2
  positions = np.concatenate(
    [np.maximum(segments[:2].cumsum(1) - 1, 0), [[*range(60), *range(T - 60)], range(T)]]
  )
  tokens = jax.random.randint(jax.random.key(1), (4, T), 0, 16)
  return tokens, jnp.asarray(positions, jnp.int32), jnp.asarray(segments)


def build(way, *on):
  return transformer.build_model(dataclasses.replace(CONFIG, attention=way), *on)


def seen(model, params, x):
  return jnp.where(x[2][..., None] > 0, model.apply(params, *x)[0], 0.0)


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(lambda x: 4 * x, transformer.build_model(CONFIG).init(jax.random.key(0)))


def test_splash_equals_plain_with_windows_caps_and_segments(params):
  """The kernel interpreted, one window after the other in scanned layers."""
  x = inputs()

  def run(model):
    return jax.jit(lambda params: seen(model, params, x))(params)

  np.testing.assert_allclose(run(build('splash')), run(build('plain')), atol=2e-5)


@pytest.mark.slow
def test_splash_has_the_gradients_of_plain_and_runs_on_a_mesh(params):
  x, layout = (
    inputs(),
    mesh.make_layout(mesh.MeshOptions(data=2, tensor=2), jax.devices()[:4]),
  )

  def run(model):
    return jax.jit(jax.value_and_grad(lambda params: jnp.mean(seen(model, params, x) ** 3)))(params)

  want = run(build('plain'))
  for model in (build('splash'), build('splash', layout)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), run(model), want
    )


def attend_by_xla(query, key, value, mask, **options):
  mask = attention.mask_for_library(mask)
  return attention.attend_with_library(query, key, value, mask, implementation='xla', **options)


def test_the_library_equals_plain():
  """What cuDNN is asked, asked of XLA."""
  random, segments = np.random.default_rng(0), np.repeat([[0, 1, 1, 2], [1, 1, 2, 0]], 4, axis=1)
  query, key, value = (
    random.normal(size=(2, 16, heads, 8)).astype(np.float32) for heads in (4, 2, 2)
  )
  mask = attention.causal_mask(segments, segments) & (attention.distances(16, 16) < 5)
  got, want = (
    np.asarray(jax.jit(f)(query, key, value, mask))
    for f in (
      lambda *x: attend_by_xla(*x, scale=0.3),
      lambda *x: attention.attend(*x, 0.3),
    )
  )
  np.testing.assert_allclose(got[segments > 0], want[segments > 0], atol=2e-6)
  assert np.isfinite(got).all()


def test_the_library_takes_rows_of_an_odd_length(monkeypatch):
  """cuDNN refuses them in training, so they are made even and cut again."""
  query, key, value = (
    jax.random.normal(jax.random.key(n), (2, 7, heads, 8)) for n, heads in enumerate((4, 2, 2))
  )
  segments = jnp.asarray([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2]])
  mask = attention.causal_mask(segments, segments)

  def run(attend):
    def on_real_places(*x):
      return jnp.where(segments[..., None, None] > 0, attend(*x, mask), 0)

    out, back = jax.vjp(on_real_places, query, key, value)
    return out, *back(jnp.cos(out))

  got = jax.jit(functools.partial(run, attend_by_xla))()
  want = jax.jit(functools.partial(run, attention.attend))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)

  lengths = []

  def library(query, key, value, mask, **options):
    lengths.extend((query.shape[1], mask.shape[-1]))
    return query

  monkeypatch.setattr(jax.nn, 'dot_product_attention', library)
  mask = attention.mask_for_library(mask)
  assert attention.attend_with_library(query, key, value, mask).shape == query.shape
  assert lengths == [8, 8]


@pytest.mark.parametrize(
  'segments, simple',
  [
    ([[1, 1, 1, 1, 1], [2, 2, 2, 0, 0], [0, 0, 0, 0, 0]], True),
    ([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]], False),  # packed
    ([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], False),  # padding on the left
    ([[1, 1, 0, 1, 1]], False),  # padding in between
  ],
)
def test_one_text_in_each_row_needs_no_mask(segments, simple):
  """Output and gradients are those of plain attention, with and without the mask."""
  segments = jnp.asarray(segments)
  rows = len(segments)
  query, key, value = (
    jax.random.normal(jax.random.key(n), (rows, 5, heads, 8)) for n, heads in enumerate((4, 2, 2))
  )
  mask = attention.causal_mask(segments, segments)
  one_text = attention.hold_one_text(segments)
  assert bool(one_text) == simple

  def run(attend):
    def on_real_places(*x):
      return jnp.where(segments[..., None, None] > 0, attend(*x, mask), 0)

    out, back = jax.vjp(on_real_places, query, key, value)
    return out, *back(jnp.cos(out))

  got = jax.jit(functools.partial(run, functools.partial(attend_by_xla, one_text=one_text)))()
  want = jax.jit(functools.partial(run, attention.attend))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)


@pytest.mark.parametrize('cap', [0.0, 2.0])
@pytest.mark.parametrize('sizes', [[7], [2, 4, 1]])
def test_gradients_are_those_of_differentiating_each_step(sizes, cap):
  """Grouped queries, segments of a cache, and rows in which a query sees no key."""
  keys = jax.random.split(jax.random.key(0), 6)
  query = 3 * jax.random.normal(keys[0], (2, 5, 4, 8))
  key, value = (jax.random.normal(k, (2, 2, sum(sizes), 8)) for k in keys[1:3])
  mask = jax.random.bernoulli(keys[3], 0.6, (2, 5, sum(sizes))).at[0, 0].set(False)
  toward = jax.random.normal(keys[4], (2, 5, 4, 8))
  ends = np.cumsum(sizes)[:-1]

  def plainly(query, key, value):
    key, value = (jnp.repeat(x, 2, axis=1) for x in (key, value))
    logits = jnp.einsum('bthc,bhsc->bhts', query, key) * 8**-0.5
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    shares = jnp.where(mask[:, None], jnp.exp(logits), 0.0)
    # Where no key is seen, all are alike.
    unseen = ~mask.any(-1)[:, None, :, None]
    shares = jnp.where(unseen, 1.0, shares)
    weights = shares / shares.sum(-1, keepdims=True)
    return jnp.einsum('bhts,bhsc->bthc', weights, value)

  def ours(query, key, value):
    segments = (jnp.split(x, ends, axis=2) for x in (key, value))
    filled = jnp.asarray(sum(sizes), jnp.int32)
    return attention.attend_to_filled(query, *segments, mask, filled, cap=cap)

  got, want = (jax.vjp(f, query, key, value) for f in (ours, plainly))
  np.testing.assert_allclose(got[0], want[0], atol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got[1](toward), want[1](toward)
  )


@pytest.mark.parametrize('cap', [0.0, 2.0])
@pytest.mark.parametrize('queries', [1, 3])
def test_the_decoding_kernel_equals_plain_attention(queries, cap):
  """Interpreted, over slots that are no multiple of its blocks, and masked in all ways."""
  keys = jax.random.split(jax.random.key(0), 3)
  query = jax.random.normal(keys[0], (4, 1, 2 * queries, 16), jnp.bfloat16)
  key, value = (jax.random.normal(k, (4, 2, 100, 16), jnp.bfloat16) for k in keys[1:])
  places = np.arange(100)
  mask = (places >= [[0], [70], [3], [99]]) & (places < [[100], [90], [40], [100]])
  mask[0, 20:75] = False  # whole blocks in between
  mask = jnp.asarray(mask)
  got = decode_attention.attend_one(
    query, key, value, mask, decode_attention.filled_range(mask), cap=cap, interpret=True
  )
  exact = (x.astype(jnp.float32) for x in (query, key, value))
  want = attention.attend_to_cache(*exact, mask[:, None], cap=cap)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


def test_a_row_without_filled_slots_gives_zeros():
  query, cached = jnp.ones((1, 1, 2, 16), jnp.bfloat16), jnp.ones((1, 1, 40, 16), jnp.bfloat16)
  mask = jnp.zeros((1, 40), bool)
  filled = decode_attention.filled_range(mask)
  got = decode_attention.attend_one(query, cached, cached, mask, filled, interpret=True)
  np.testing.assert_array_equal(got, jnp.zeros_like(query))


@pytest.mark.parametrize(
  'change, places, cached, platform, want',
  [
    ({}, 256, False, 'cpu', 'plain'),
    ({}, 256, False, 'tpu', 'splash'),
    ({}, 200, False, 'tpu', 'plain'),
    ({}, 256, True, 'tpu', 'plain'),
    ({}, 256, False, 'gpu', 'plain'),
    ({'dtype': 'bfloat16'}, 256, False, 'gpu', 'plain'),
    ({'dtype': 'bfloat16', 'attention_cap': 0.0}, 250, False, 'gpu', 'cudnn'),
    ({'dtype': 'bfloat16', 'head_dim': 64}, 1, True, 'gpu', 'decode'),
    ({'dtype': 'bfloat16', 'head_dim': 64}, 2, True, 'gpu', 'plain'),  # a prompt
    ({'dtype': 'bfloat16', 'head_dim': 24}, 1, True, 'gpu', 'plain'),
    ({'head_dim': 64}, 1, True, 'gpu', 'plain'),  # float32 products must be exact
    ({'dtype': 'bfloat16', 'head_dim': 64}, 1, True, 'cpu', 'plain'),
    ({'dtype': 'bfloat16', 'attention_cap': 0.0, 'attention': 'plain'}, 256, False, 'gpu', 'plain'),
  ],
)
def test_which_implementation_is_chosen(change, places, cached, platform, want):
  assert (
    attention.choose_implementation(dataclasses.replace(CONFIG, **change), places, cached, platform)
    == want
  )


@pytest.mark.parametrize(
  'way, message', [('cudnn', 'cudnn needs bfloat16'), ('splash', 'multiple of 128 tokens, got 9')]
)
def test_an_implementation_that_cannot_be_used_is_refused(way, message):
  model = transformer.build_model(dataclasses.replace(CONFIG, attention=way))
  with pytest.raises(UserError, match=message):
    jax.eval_shape(
      model.apply,
      jax.eval_shape(model.init, jax.random.key(0)),
      *inputs() if way == 'cudnn' else (jnp.zeros((1, 9), jnp.int32),) * 3,
    )


def test_learned_positions_end():
  config = dataclasses.replace(CONFIG, learned_positions=True, max_length=8)
  model = transformer.build_model(config)
  with pytest.raises(UserError, match='rows of 9 tokens, expected at most 8'):
    jax.eval_shape(
      model.apply,
      jax.eval_shape(model.init, jax.random.key(0)),
      *(jnp.zeros((1, 9), jnp.int32),) * 3,
    )
