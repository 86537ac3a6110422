import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import language_model


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bool_])
def test_nll_sums_over_the_masked_targets(dtype):
  logprobs = jnp.array([[-0.5, -1.0, jnp.nan], [-2.0, -4.0, -8.0]])
  mask = jnp.array([[1, 1, 0], [0, 0, 1]], dtype)
  np.testing.assert_array_equal(language_model.nll(logprobs, mask), [9.5, 3.0])


def test_other_shapes_are_refused():
  with pytest.raises(AssertionError):
    language_model.nll(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
