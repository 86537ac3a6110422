import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import policy_gradient


def ragged(seed, N=6, R=9):
  """logprobs, old logprobs, advantages and a mask of ragged answers, one of them empty: float64."""
  rng = np.random.default_rng(seed)
  mask = np.arange(R) < np.r_[0, 1, R, rng.integers(2, R, N - 3)][:, None]
  old = -rng.uniform(0.1, 4.0, (N, R))
  return old + 0.4 * rng.normal(size=(N, R)), old, rng.normal(size=(N, R)), mask


def by_hand(name, logprobs, old, advantages, mask, low, high):
  """The losses of each token, and their gradients with respect to its own log-probability, in float64 loops."""
  losses, slopes = np.zeros(mask.shape), np.zeros(mask.shape)
  for n, t in zip(*np.nonzero(mask)):
    A, count = advantages[n, t], mask[n].sum()
    ratio = np.exp(logprobs[n, t] - old[n, t])
    if name == 'gspo':
      ratio = np.exp((logprobs[n] - old[n])[mask[n]].sum() / count)
    kept = min(max(ratio, 1 - low), 1 + high)
    if name in ('clipped', 'gspo'):
      losses[n, t] = -min(ratio * A, kept * A)
      if ratio * A <= kept * A:  # not clipped
        places = np.flatnonzero(mask[n]) if name == 'gspo' else [t]
        slopes[n, places] -= A * ratio / len(places)
    else:
      weight = kept if name == 'cispo' else 1.0
      losses[n, t], slopes[n, t] = -weight * A * logprobs[n, t], -weight * A
  return losses, slopes


@pytest.mark.parametrize('name', policy_gradient.POLICY)
@pytest.mark.parametrize('seed', range(3))
def test_losses_and_gradients_against_float64(name, seed):
  logprobs, old, advantages, mask = ragged(seed)
  loss = lambda x: policy_gradient.POLICY[name](x, jnp.float32(old), jnp.float32(advantages), mask, 0.2, 0.28)
  x = jnp.float32(logprobs)
  losses, slopes = by_hand(name, logprobs, old, advantages, mask, 0.2, 0.28)
  np.testing.assert_allclose(np.where(mask, loss(x)[0], 0.0), losses, rtol=2e-5, atol=1e-6)
  got = jax.grad(lambda x: jnp.sum(jnp.where(mask, loss(x)[0], 0.0)))(x)
  np.testing.assert_allclose(got, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('name,expected', [
    ('token_mean', lambda rows: np.concatenate(rows).mean()),
    ('sequence_mean', lambda rows: np.mean([row.mean() for row in rows])),
    ('sequence_sum', lambda rows: np.mean([row.sum() for row in rows])),
    ('constant', lambda rows: sum(row.sum() for row in rows) / (len(rows) * 9))])
def test_reductions(name, expected):
  losses, _, _, mask = ragged(3)
  rows = [row[seen] for row, seen in zip(losses, mask) if seen.any()]
  total, weight = policy_gradient.REDUCE[name](jnp.where(mask, jnp.float32(losses), jnp.nan), mask)
  np.testing.assert_allclose(total / weight, expected(rows), rtol=1e-5)


def test_truncated_weights():
  old, sampler, mask = jnp.zeros((1, 3)), jnp.log(jnp.array([[0.5, 0.1, 9.0]])), jnp.array([[True, True, False]])
  np.testing.assert_allclose(policy_gradient.truncated_weights(old, sampler, mask, 3.0), [[2.0, 3.0, 0.0]], rtol=1e-6)


def test_policy_loss_by_hand():
  ratios = jnp.array([[1.0, 1.5, 0.5, 1.5, 0.5]])
  advantages = jnp.array([[2.0, 1.0, 1.0, -1.0, -1.0]])
  losses, got, held = policy_gradient.clipped(jnp.log(ratios), jnp.zeros((1, 5)), advantages, None, 0.2, 0.2)
  np.testing.assert_allclose(got, ratios, rtol=1e-6)
  np.testing.assert_allclose(losses, [[-2.0, -1.2, -0.5, 1.5, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[False, True, False, False, True]])
  slope = jax.grad(lambda x: policy_gradient.clipped(x, jnp.zeros((1, 5)), advantages, None, 0.2, 0.2)[0].sum())
  np.testing.assert_allclose(slope(jnp.log(ratios)), [[-2.0, 0.0, -0.5, 1.5, 0.0]], rtol=1e-6)


def test_value_loss_by_hand():
  values, old, returns = jnp.array([[1.0, 1.0, 0.1]]), jnp.array([[0.0, 0.0, 0.0]]), jnp.array([[2.0, 0.0, 1.0]])
  losses, held = policy_gradient.clipped_value(values, old, returns, 0.2)
  np.testing.assert_allclose(losses, [[0.5 * 1.8 ** 2, 0.5 * 1.0, 0.5 * 0.81]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[True, False, False]])
