"""Which products are asked to be exact, read from the program before XLA sees it."""

import re

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.models import heads, transformer
from rlhf_jax.runtime import compilation


@pytest.fixture(autouse=True)
def default_precision():
  """JAX's own setting before the test, and the one of the other tests after it."""
  before = jax.config.jax_default_matmul_precision
  jax.config.update('jax_default_matmul_precision', None)
  yield
  jax.config.update('jax_default_matmul_precision', before)


@pytest.fixture
def exact(monkeypatch):
  monkeypatch.delenv('JAX_DEFAULT_MATMUL_PRECISION', raising=False)
  compilation.request_exact_products()


def products(dtype, **changes):
  """(precision, dtypes of the factors) of every product of a train step."""
  config = transformer.ModelConfig(
    vocab_size=64,
    embed=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp=24,
    dtype=dtype,
    **changes,
  )
  model = transformer.build_model(config)
  params = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

  def total(params, tokens):
    hidden, _ = model.apply(params, tokens, tokens, tokens)
    return heads.token_logprobs(model, params, hidden, tokens)[0].sum()

  traced = jax.jit(jax.grad(total)).trace(params, tokens)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()  # on a CPU products are exact anyway
  factor = r'tensor<[^>]*?x(\w\d+|bf16)>'
  pattern = rf'dot_general.*precision = \[(\w+),.*: \({factor}, {factor}\)'
  matches = [re.search(pattern, line) for line in text.splitlines() if 'dot_general' in line]
  assert matches and all(matches)
  return [(match[1], {match[2], match[3]}) for match in matches]


EXPERTS = dict(experts=2, experts_per_token=1)


@pytest.mark.parametrize('changes', [{}, EXPERTS], ids=['dense', 'experts'])
def test_products_of_a_float32_model_are_exact(exact, changes):
  assert all(product == ('HIGHEST', {'f32'}) for product in products('float32', **changes))


@pytest.mark.parametrize('changes', [{}, EXPERTS], ids=['dense', 'experts'])
def test_a_bfloat16_model_asks_for_no_exact_product_of_float32(exact, changes):
  """Of the logits and of plain attention the slopes are float32.

  Exact, their products would take a quarter of a step.
  """
  asked = products('bfloat16', **changes)
  assert ('DEFAULT', {'f32'}) in asked and ('HIGHEST', {'f32'}) not in asked


def test_the_environment_variable_wins(monkeypatch):
  monkeypatch.setenv('JAX_DEFAULT_MATMUL_PRECISION', 'tensorfloat32')
  compilation.request_exact_products()
  assert jax.config.jax_default_matmul_precision is None
