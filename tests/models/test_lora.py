import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained
from rlhf_jax.models import heads, lora, quantised, transformer
from rlhf_jax.runtime import mesh

DATA = Path(__file__).parents[1] / 'interop' / 'data'
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12)).astype(np.int32)


def forward(config, params, tokens=TOKENS):
  model = transformer.build_model(config)
  hidden, _ = model.apply(
    params, tokens, jnp.tile(jnp.arange(12), (2, 1)), jnp.ones((2, 12), jnp.int32)
  )
  return heads.next_token_logits(model, params, hidden)


def adapted(case, **changes):
  """A family's tiny model and its config with adapters on all that it has; both parts
  of them random.
  """
  base = pretrained.read_config(DATA / case)
  config = dataclasses.replace(
    base, **{'lora_rank': 3, 'lora_alpha': 6.0, 'lora_targets': base.matrices, **changes}
  )
  params, new = (
    pretrained.load_parameters(DATA / case, base),
    transformer.build_model(config).init(jax.random.key(0)),
  )
  rng = np.random.default_rng(0)
  params['layers'] |= {
    name: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
    for name, leaf in new['layers'].items()
    if '_lora_' in name
  }
  return base, config, params


@pytest.mark.parametrize('case', ['llama', 'gpt2', 'gemma2', 'olmo2', 'mixtral'])
def test_a_new_adapter_computes_its_base_and_merging_changes_no_output(case):
  base, config, params = adapted(case)
  assert set(config.matrices) == {
    name.removesuffix(lora.A) for name in params['layers'] if name.endswith(lora.A)
  }
  fresh = {
    **params,
    'layers': {
      name: 0 * leaf if name.endswith(lora.B) else leaf for name, leaf in params['layers'].items()
    },
  }
  before = forward(base, pretrained.load_parameters(DATA / case, base))
  np.testing.assert_array_equal(forward(config, fresh), before)
  got = forward(config, params)
  assert np.abs(got - before).max() > 0.1
  np.testing.assert_allclose(
    got, forward(base, lora.merge_adapters(config, params)), atol=1e-4, rtol=1e-4
  )


def test_new_adapters_change_nothing_and_have_the_usual_scale():
  config = adapted('llama')[1]
  layers = transformer.build_model(config).init(jax.random.key(0))['layers']
  assert not any(leaf.any() for name, leaf in layers.items() if name.endswith(lora.B))
  for name in config.lora_targets:
    a = layers[name + lora.A]
    inputs = a[0].size / config.lora_rank
    assert float(a.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.2)


def test_at_full_rank_a_step_of_adapters_is_a_step_of_the_whole_matrix():
  """With A Aᵀ = I a step of SGD on B changes A B by the full gradient, times (α/r)²."""
  base, config, params = adapted('llama', lora_rank=48, lora_alpha=24.0)
  layers = params['layers']
  for name in config.lora_targets:
    a, b = layers[name + lora.A], layers[name + lora.B]
    square = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0]
    rows = square[: a[0].size // 48].reshape(a.shape[1:])
    layers[name + lora.A], layers[name + lora.B] = (
      jnp.broadcast_to(rows, a.shape).astype(jnp.float32),
      0 * b,
    )

  def loss(trained, frozen, config):
    logprobs = jax.nn.log_softmax(
      forward(config, {**frozen, 'layers': {**frozen['layers'], **trained['layers']}})
    )
    return -jnp.take_along_axis(logprobs[:, :-1], TOKENS[:, 1:, None], -1).mean()

  trained, frozen = lora.split_trainable(params)
  stepped = jax.tree.map(lambda x, g: x - 0.1 * g, trained, jax.grad(loss)(trained, frozen, config))
  stepped['layers'] |= {
    name: leaf for name, leaf in trained['layers'].items() if name.endswith(lora.A)
  }
  after = lora.merge_adapters(
    config, {**frozen, 'layers': {**frozen['layers'], **stepped['layers']}}
  )
  full = jax.grad(lambda params: loss(params, params, base))(frozen)
  for name in config.lora_targets:
    change, want = (
      after['layers'][name] - frozen['layers'][name],
      -0.1 * 0.25 * full['layers'][name],
    )
    np.testing.assert_allclose(
      change, want, atol=1e-6 + 1e-3 * float(jnp.abs(want).max()), err_msg=name
    )


def test_what_is_trained_and_what_is_not():
  _, config, params = adapted('llama')
  params['score'] = {'kernel': jnp.ones(32), 'bias': jnp.zeros(())}
  trained, frozen = lora.split_trainable(params)
  assert set(trained) == {'layers', 'score'} and 'score' not in frozen
  assert len(trained['layers']) == 14 and set(frozen['layers']) == {
    name for name in params['layers'] if 'lora' not in name
  }
  assert lora.split_trainable(frozen) == (frozen, {})


def test_targets_that_the_model_does_not_have_are_refused():
  for case, targets in (
    ('gpt2', ('gate',)),
    ('mixtral', ('up',)),
    ('llama', ('querry',)),
    ('llama', ()),
  ):
    with pytest.raises(
      UserError, match='lora: expected a rank from 1 and targets of query, key, value, output'
    ):
      transformer.build_model(
        dataclasses.replace(pretrained.read_config(DATA / case), lora_rank=2, lora_targets=targets)
      )


@functools.cache
def wide():
  """A model of wide matrices, quantised or not, with adapters; (config, float32 params, logits)."""
  config = transformer.ModelConfig(
    vocab_size=64,
    embed=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp=256,
    lora_rank=2,
    lora_targets=('query', 'down'),
  )
  params = transformer.build_model(config).init(jax.random.key(0))
  return config, params, forward(config, params)


@pytest.mark.parametrize(
  'kind,error,bits',
  [
    pytest.param('bfloat16', 0.02, 16, marks=pytest.mark.slow),
    ('int8', 0.02, 8),
    ('nf4', 0.15, 4),
    ('int4', 0.2, 4),
  ],
)
def test_a_quantised_base_is_close_and_small(kind, error, bits):
  if kind in quantised.QUANTISED_KINDS:
    pytest.importorskip('qwix')
  config, params, want = wide()
  trained, frozen = lora.split_trainable(params)
  kept = quantised.convert(frozen, kind)
  got = forward(config, {**kept, 'layers': {**kept['layers'], **trained['layers']}})
  assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < error

  def matrices(tree):
    return [tree['layers'][name] for name in config.matrices]

  size = sum(
    leaf.size * leaf.dtype.itemsize * (8 if 'int4' not in leaf.dtype.name else 4)
    for leaf in jax.tree.leaves(matrices(kept))
  )
  assert size < (bits + 0.6) * sum(
    leaf.size for leaf in matrices(params)
  )  # scales: 32 bits for 64 weights
  back = jax.tree.map(
    lambda leaf: quantised.restore(leaf, jnp.float32), kept, is_leaf=quantised.is_quantised
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=error * float(jnp.abs(y).max())),
    back,
    frozen,
  )
  gradient = jax.grad(
    lambda new: forward(config, {**kept, 'layers': {**kept['layers'], **new['layers']}})[0, 0, 0]
  )(trained)
  assert float(jnp.abs(gradient['layers']['down' + lora.B]).max()) > 0


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_a_quantised_base_stays_sharded(kind):
  pytest.importorskip('qwix')
  config, params, _ = wide()
  on = mesh.make_layout(mesh.MeshOptions(data=1, fsdp=4, tensor=2))
  model = transformer.build_model(config, on)
  here = jax.device_put(params, on.shardings(model.axes, params))
  kept, alone = quantised.convert(here, kind), quantised.convert(params, kind)
  for name in config.matrices:
    whole = kept['layers'][name].qvalue
    assert whole.sharding.shard_shape(whole.shape) == here['layers'][name].sharding.shard_shape(
      whole.shape
    ), name
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), kept, alone
  )


def test_no_such_kind():
  with pytest.raises(
    UserError, match="lora.base: expected one of float32, bfloat16, int8, int4, nf4, got 'fp3'"
  ):
    quantised.convert({}, 'fp3')
