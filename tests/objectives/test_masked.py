import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import masked


def test_mean_ignores_what_is_masked_even_nan():
  x = jnp.array([1.0, jnp.nan, 3.0])
  assert masked.mean(x, jnp.array([True, False, True])) == 2.0
  assert masked.mean(x, jnp.zeros(3, bool)) == 0.0


def test_whiten():
  x, mask = jnp.array([[1.0, 3.0, 1e6], [5.0, 7.0, 1e6]]), jnp.array([[True, True, False]] * 2)
  white = masked.whiten(x, mask)
  want = (np.array([1, 3, 5, 7]) - 4) / np.sqrt(5 + 1e-8)
  np.testing.assert_allclose(white[:, :2].ravel(), want, rtol=1e-6)
  np.testing.assert_array_equal(white[:, 2], 0)
  np.testing.assert_allclose(
    masked.whiten(x, mask, shift_mean=False)[:, :2].ravel(), want + 4, rtol=1e-6
  )


@pytest.mark.parametrize('wrap', [jax.jit, jax.vmap])
def test_masks_may_be_bool_or_numbers(wrap):
  x = jnp.array([[1.0, 2.0, 4.0]])
  for mask in (jnp.array([[True, False, True]]), jnp.array([[1.0, 0.0, 0.5]])):
    assert wrap(masked.total)(x, mask) == 5.0
    assert wrap(masked.count)(mask) == 2.0


def test_other_shapes_are_refused():
  with pytest.raises(AssertionError):
    masked.mean(jnp.ones((2, 3)), jnp.ones((3, 2), bool))
