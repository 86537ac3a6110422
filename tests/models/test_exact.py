import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.models import exact, transformer

LONGROPE = dict(
  rope_type='longrope',
  short_factor=[1.0] * 4,
  long_factor=[2.0] * 4,
  original_max_position_embeddings=8,
)
PROGRAM = Path(__file__).with_name('exactness.py')


def compare(*cases):
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  run = subprocess.run(
    [sys.executable, str(PROGRAM), *cases], capture_output=True, text=True, env=environment
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
def test_texts_have_the_same_bits_in_every_program():
  results = compare('llama', 'gemma', 'gpt', 'experts', 'olmo', 'lora')
  assert len(results) == 6
  for gaps in results:
    case = gaps.pop('case')
    assert len(gaps) == 8 and not any(gaps.values()), (case, gaps)


@pytest.mark.slow
def test_without_exact_numerics_they_have_not():
  (gaps,) = compare('fast')
  assert gaps['training'] > 0 and gaps['8 devices'] > 0


def test_sums_and_maxima_are_those_of_halves():
  x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  halves = (x[:, 0] + x[:, 3]) + x[:, 2], x[:, 1] + x[:, 4]
  np.testing.assert_array_equal(exact.total(jnp.asarray(x))[:, 0], halves[0] + halves[1])
  np.testing.assert_array_equal(exact.peak(jnp.asarray(x))[:, 0], x.max(1))


def test_products_are_rounded_before_they_are_added():
  a, b, c = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
  added = jax.jit(lambda a, b, c: exact.rounded(a * b) + c)(a, b, c)
  np.testing.assert_array_equal(added, a * b + c)  # numpy has no fused instruction


@pytest.mark.parametrize('changes', [{}, dict(attention_cap=20.0, windows=(5,))])
def test_gradients_are_those_of_fast_numerics(changes):
  rows = testing.make_sequences(rows=4)

  def compute(numerics):
    model = testing.make_model(numerics=numerics, **changes)
    params = testing.make_params(testing.make_model(**changes))

    def loss(params):
      hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
      return jnp.sum(jnp.sin(hidden) * rows.loss_mask[..., None])

    return jax.jit(jax.value_and_grad(loss))(params)

  fast, exact_values = compute('fast'), compute('exact')
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=3e-4), fast, exact_values
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(dtype='bfloat16'), 'needs model.dtype float32'),
    (dict(attention='splash'), 'model.attention auto or plain'),
    (dict(rope_scaling=LONGROPE), 'a model with longrope'),
  ],
)
def test_models_that_cannot_be_exact_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    testing.make_model(numerics='exact', **changes)


@pytest.mark.parametrize('mesh', ['tensor 2', 'context 2'])
def test_devices_that_share_rows_are_refused(mesh):
  layout = testing.make_layout(f'{mesh}, data 4')
  with pytest.raises(UserError, match='mesh.tensor = mesh.context = 1'):
    transformer.build_model(testing.make_model(numerics='exact').config, layout)
