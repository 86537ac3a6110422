import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import heads, transformer
from rlhf_jax.runtime import mesh

B, T, D, V = 2, 300, 8, 33
KEYS = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(KEYS[0], (B, T, D))
MODEL = transformer.build_model(transformer.ModelConfig(V, D, 1, 1, 1, 8, 8))
PARAMS = {'embedding': jax.random.normal(KEYS[1], (V, D))}
TARGETS = jax.random.randint(KEYS[2], (B, T), 0, V)


def by_hand(temperature):
  logits = (
    np.asarray(HIDDEN, np.float64) @ np.asarray(PARAMS['embedding'], np.float64).T / temperature
  )
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(logprobs, np.asarray(TARGETS)[..., None], -1)[..., 0], -(
    np.exp(logprobs) * logprobs
  ).sum(-1)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize(
  'length', [1, 127, 128, 129, 300]
)  # one chunk, exact chunks, a ragged last one
def test_logprobs_and_entropies(temperature, length):
  logprobs = jax.jit(functools.partial(heads.token_logprobs, MODEL), static_argnums=3)
  got = logprobs(PARAMS, HIDDEN[:, :length], TARGETS[:, :length], temperature)
  for a, b in zip(got, by_hand(temperature)):
    np.testing.assert_allclose(a, b[:, :length], atol=2e-5)


def test_gradient_of_chunks_equals_that_of_the_whole():

  def total(hidden, params, split):
    return sum(
      heads.token_logprobs(MODEL, params, hidden[:, a:b], TARGETS[:, a:b])[0].sum()
      for a, b in split
    )

  def grad(split):
    return jax.grad(total, argnums=(0, 1))(HIDDEN, PARAMS, split)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    grad([(0, 300)]),
    grad([(0, 100), (100, 200), (200, 300)]),
  )


@pytest.mark.parametrize('length', [100, 300])  # one chunk; three, the last one padded
@pytest.mark.parametrize('cap', [0.0, 2.0])
def test_the_gradient_is_that_of_a_log_softmax(cap, length):
  """The gradient that is written out beside JAX's own; with an offset that rounding would see."""
  model = transformer.build_model(dataclasses.replace(MODEL.config, logit_cap=cap))
  weights = jax.random.normal(jax.random.key(2), (HIDDEN.shape[0], length))
  offset = 0.0 if cap else 1000.0  # a cap would leave nothing of it
  hidden = jnp.concatenate([HIDDEN[:, :length], jnp.ones_like(HIDDEN[:, :length, :1])], axis=-1)
  matrix = jnp.pad(PARAMS['embedding'].T, ((0, 1), (0, 0)), constant_values=offset)
  targets = TARGETS[:, :length]

  def ours(matrix, hidden):
    logprobs, _ = heads.token_logprobs(model, {'unembedding': matrix}, hidden, targets, 0.7)
    return jnp.sum(weights * logprobs)

  def plain(matrix, hidden):
    logits = hidden @ matrix
    if cap:
      logits = cap * jnp.tanh(logits / cap)
    logprobs = jax.nn.log_softmax(logits / 0.7)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * chosen)

  got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(matrix, hidden)
  want = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(matrix, hidden)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-3 if offset else 1e-4)


def test_logits_of_the_whole_batch_are_never_kept():
  T, V = 4096, 4096
  hidden, params = jnp.zeros((1, T, D)), {'embedding': jnp.zeros((V, D))}

  def loss(params):
    return heads.token_logprobs(MODEL, params, hidden, jnp.zeros((1, T), jnp.int32))[0].sum()

  memory = jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis()
  assert memory.temp_size_in_bytes < T * V * 4 / 4


def test_untied_unembedding_is_used():
  params = {**PARAMS, 'unembedding': jnp.zeros((D, V))}
  np.testing.assert_allclose(
    heads.token_logprobs(MODEL, params, HIDDEN, TARGETS)[0], -np.log(V), rtol=1e-6
  )


@pytest.mark.parametrize('length', [7, 300])  # places that do not divide over context, chunks
@pytest.mark.parametrize(
  'axes', [dict(fsdp=8), dict(context=4), dict(fsdp=2, tensor=2), dict(context=2, tensor=2)]
)
def test_every_mesh_gives_the_same_numbers_and_gradients(axes, length):
  """The unembedding is cut, and whole on no device but where it is used."""
  layout = mesh.make_layout(mesh.MeshOptions(**axes))
  keys = jax.random.split(jax.random.key(1), 3)
  hidden, matrix = jax.random.normal(keys[0], (8, length, D)), jax.random.normal(keys[1], (D, 34))
  targets, sharding = (
    jax.random.randint(keys[2], (8, length), 0, 34),
    layout.sharding(('embed', 'vocab')),
  )

  def run(on, matrix, hidden, targets):
    model = transformer.build_model(dataclasses.replace(MODEL.config, vocab_size=34), on)

    def total(matrix, hidden):
      logprobs, entropies = heads.token_logprobs(model, {'unembedding': matrix}, hidden, targets)
      return jnp.sum(logprobs * entropies), (logprobs, entropies)

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(matrix, hidden)

  got = run(layout, jax.device_put(matrix, sharding), *layout.place((hidden, targets)))
  assert got[0][0].sharding.is_equivalent_to(sharding, 2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-4),
    got,
    run(None, matrix, hidden, targets),
  )


def test_scalar_scores_by_hand():
  params = {'score': {'kernel': jnp.array([2.0, -1.0]), 'bias': jnp.array(0.5)}}
  hidden = jnp.array([[1.0, 3.0], [2.0, 1.0]])
  np.testing.assert_allclose(heads.scalar_scores(params, hidden), [-0.5, 3.5])
