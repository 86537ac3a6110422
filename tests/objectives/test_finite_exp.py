"""Log-ratios at which exp overflows: finite losses and gradients, and none at masked tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import divergence, finite_exp, masked, policy_gradient

LOSSES = {**policy_gradient.POLICY_LOSSES, **divergence.KL_TERMS}


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('low, high', [(-150.0, -10.0), (-10.0, -150.0), (-1e4, -1.0)])
def test_a_token_far_from_the_other_policy(name, low, high):
  logprobs = jnp.array([[-1.5, low, low]])
  others = jnp.array([[-1.0, high, high]])
  mask = jnp.array([[True, True, False]])

  def total(x):
    if name in divergence.KL_TERMS:
      losses = LOSSES[name](x, others)
    else:
      advantages = jnp.array([[1.0, -1.0, 0.0]])
      losses = LOSSES[name](x, others, advantages, mask, 0.2, 0.2).losses
    return masked.total(losses, mask)

  loss, gradient = jax.value_and_grad(total)(logprobs)
  assert np.isfinite(loss) and np.isfinite(gradient).all()
  assert np.isfinite(jnp.sum(gradient**2))  # the norm by which gradients are clipped
  assert gradient[0, 2] == 0


def test_what_stands_at_a_masked_token_changes_nothing():
  mask = jnp.array([[True, False]])
  for odd in (jnp.nan, -jnp.inf, 1e30):
    for name, loss in policy_gradient.POLICY_LOSSES.items():

      def total(x, loss=loss):
        others = jnp.array([[-1.0, odd]])
        losses = loss(x, others, jnp.array([[1.0, 0.0]]), mask, 0.2, 0.2).losses
        return masked.total(losses, mask)

      value, gradient = jax.value_and_grad(total)(jnp.array([[-1.1, -2.0]]))
      assert np.isfinite(value) and gradient[0, 1] == 0, name


def test_where_exp_is_exact_and_where_it_goes_on():
  x = np.float32([-200, -1, 0, 1e-8, 19.9])
  np.testing.assert_array_equal(finite_exp.exp(x), jnp.exp(x))
  np.testing.assert_array_equal(finite_exp.expm1(x), jnp.expm1(x))
  slope = jax.vmap(jax.grad(finite_exp.exp))(jnp.float32([0.5, 19.0, 25.0, 1e6]))
  np.testing.assert_allclose(slope, np.exp([0.5, 19.0, 20.0, 20.0]), rtol=1e-6)
