"""All hands that compute attention beside the plain one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, transformer
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
      lambda *x: attention.attend_with_library(*x, 0.3, implementation='xla'),
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

  by_library = functools.partial(attention.attend_with_library, implementation='xla')
  got = jax.jit(functools.partial(run, by_library))()
  want = jax.jit(functools.partial(run, attention.attend))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, want)

  lengths = []

  def library(query, *rest, **options):
    lengths.append(query.shape[1])
    return query

  monkeypatch.setattr(jax.nn, 'dot_product_attention', library)
  assert attention.attend_with_library(query, key, value, mask).shape == query.shape
  assert lengths == [8]


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
