import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import block


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('contracted', [1, 2])
def test_the_gradients_are_those_of_an_einsum(contracted, dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (3, 5, 4, 6) if contracted == 2 else (3, 5, 24)
  x = jax.random.normal(keys[0], shape, dtype)
  weight = jax.random.normal(keys[1], (*shape[2:], 2, 7), dtype)
  slopes = jax.random.normal(keys[2], (3, 5, 2, 7), dtype)

  def ours(x, weight):
    return jnp.sum((block.product(x, weight, contracted) * slopes).astype(jnp.float32))

  def plain(x, weight):
    names = 'rtab,abcd->rtcd' if contracted == 2 else 'rta,acd->rtcd'
    return jnp.sum((jnp.einsum(names, x, weight) * slopes).astype(jnp.float32))

  got = jax.grad(ours, argnums=(0, 1))(x, weight)
  want = jax.grad(plain, argnums=(0, 1))(x, weight)
  tolerance = 1e-5 if dtype == 'float32' else 5e-2
  for a, b in zip(got, want, strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
