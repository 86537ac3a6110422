import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives import policy_gradient


def test_policy_loss_by_hand():
  ratios = jnp.array([[1.0, 1.5, 0.5, 1.5, 0.5]])
  advantages = jnp.array([[2.0, 1.0, 1.0, -1.0, -1.0]])
  losses, got, held = policy_gradient.clipped_policy(jnp.log(ratios), jnp.zeros((1, 5)), advantages, 0.2)
  np.testing.assert_allclose(got, ratios, rtol=1e-6)
  np.testing.assert_allclose(losses, [[-2.0, -1.2, -0.5, 1.5, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[False, True, False, False, True]])
  slope = jax.grad(lambda x: policy_gradient.clipped_policy(x, jnp.zeros((1, 5)), advantages, 0.2)[0].sum())
  np.testing.assert_allclose(slope(jnp.log(ratios)), [[-2.0, 0.0, -0.5, 1.5, 0.0]], rtol=1e-6)


def test_value_loss_by_hand():
  values, old, returns = jnp.array([[1.0, 1.0, 0.1]]), jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[2.0, 0.0, 1.0]])
  losses, held = policy_gradient.clipped_value(values, old, returns, 0.2)
  np.testing.assert_allclose(losses, [[0.5 * 1.8 ** 2, 0.5 * 1.0, 0.5 * 0.81]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[True, False, False]])
