import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import advantages


def slow_gae(rewards, values, mask, discount, smoothing):
  result = np.zeros_like(rewards)
  for b in range(len(rewards)):
    inside = np.flatnonzero(mask[b])
    following_advantage = following_value = 0.0
    for t in inside[::-1]:
      delta = rewards[b, t] + discount * following_value - values[b, t]
      following_advantage = delta + discount * smoothing * following_advantage
      following_value = values[b, t]
      result[b, t] = following_advantage
  return result


def ragged(seed, B=5, R=7):
  rng = np.random.default_rng(seed)
  mask = np.arange(R) < rng.integers(0, R + 1, (B, 1))
  mask[0] = False  # a row without an answer
  mask[1] = [True, False, True, True, False, True, False]  # holes are stepped over
  return rng.normal(size=(B, R)), rng.normal(size=(B, R)), mask


@pytest.mark.parametrize('discount,smoothing', [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize('wrap', [lambda f: f, lambda f: jax.jit(f, static_argnums=(3, 4))])
def test_gae_equals_the_slow_loop(discount, smoothing, wrap):
  rewards, values, mask = ragged(0)
  got, returns = wrap(advantages.gae)(
    jnp.asarray(rewards), jnp.asarray(values), mask, discount, smoothing
  )
  want = slow_gae(rewards, values, mask, discount, smoothing)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(returns, np.where(mask, want + values, 0), atol=1e-5)


def test_gae_by_hand():
  got, returns = advantages.gae(
    jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.25]]), jnp.array([[True, True]]), 1.0, 0.5
  )
  np.testing.assert_allclose(got, [[0.125, 0.75]])  # δ = (-0.25, 0.75); A_0 = -0.25 + 0.5 · 0.75
  np.testing.assert_allclose(returns, [[0.625, 1.0]])


def test_garbage_outside_the_mask_changes_nothing():
  rewards, values, mask = ragged(1)
  clean, _ = advantages.gae(jnp.asarray(rewards), jnp.asarray(values), mask, 1.0, 0.95)
  dirty, _ = advantages.gae(
    jnp.where(mask, rewards, 1e9), jnp.where(mask, values, 1e9), mask, 1.0, 0.95
  )
  np.testing.assert_array_equal(clean, dirty)


def test_the_score_may_stand_after_the_end():
  mask = jnp.array([[True, True, False, False], [True, True, True, True]])
  after = advantages.after_end(mask)
  np.testing.assert_array_equal(after, [[1, 1, 1, 0], [1, 1, 1, 1]])
  placed = advantages.place_rewards(jnp.array([0.75, 0.5]), jnp.where(mask, 0.5, 0.0), after, 0.1)
  np.testing.assert_allclose(
    placed, [[-0.05, -0.05, 0.75, 0], [-0.05, -0.05, -0.05, 0.45]], atol=1e-7
  )


def test_a_fractional_reward_is_not_rounded():
  mask = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
  kl = jnp.full((3, 3), 0.5)
  placed = advantages.place_rewards(jnp.array([0.75, -0.5, 9.0]), kl, mask, 0.1)
  np.testing.assert_allclose(
    placed, [[-0.05, 0.70, 0], [-0.05, -0.05, -0.55], [0, 0, 0]], atol=1e-7
  )
  whole = advantages.place_rewards(jnp.array([0.75, 0.75, 0.75]), kl, mask, 0.0)
  np.testing.assert_array_equal(whole.sum(1), [0.75, 0.75, 0.0])
  _, returns = advantages.gae(whole, jnp.zeros((3, 3)), mask, 1.0, 1.0)
  np.testing.assert_array_equal(returns[0], [0.75, 0.75, 0.0])


def test_reward_to_go_by_hand():
  np.testing.assert_allclose(
    advantages.reward_to_go(jnp.array([[1.0, -2.0, 4.0], [0.5, 0, 0]])), [[3, 2, 4], [0.5, 0, 0]]
  )


def test_group_advantages_by_hand():
  rewards = jnp.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
  lengths = jnp.ones((2, 3), int)
  expected = {
    'leave_one_out': [[-3.0, -1.5, 4.5], [0, 0, 0]],
    'above_mean': [[-2.0, -1.0, 3.0], [0, 0, 0]],
    'standardised': np.array([[-2.0, -1.0, 3.0], [0, 0, 0]]) / (7**0.5 + 1e-4),
    'batch_baseline': np.asarray(rewards) - 3.5,
  }
  assert set(expected) == set(advantages.GROUP_ADVANTAGES)
  for name, values in expected.items():
    np.testing.assert_allclose(
      advantages.GROUP_ADVANTAGES[name](rewards, lengths),
      values,
      rtol=1e-5,
      atol=1e-6,
      err_msg=name,
    )


@pytest.mark.parametrize('name', advantages.GROUP_ADVANTAGES)
def test_group_advantages_do_not_move_with_the_reward_and_know_no_order(name):
  rewards = jnp.float32(np.random.default_rng(0).normal(size=(5, 4)))

  def of(rewards):
    return advantages.GROUP_ADVANTAGES[name](rewards, jnp.ones(rewards.shape, int))

  np.testing.assert_allclose(of(rewards + 100.0), of(rewards), atol=2e-4)
  order = np.random.default_rng(1).permutation(5)
  np.testing.assert_allclose(of(rewards[order][:, ::-1]), of(rewards)[order][:, ::-1], atol=1e-6)
  alone = of(jnp.array([[7.0]]))
  assert np.isfinite(alone).all() and alone == 0  # no NaN


@pytest.mark.parametrize('K', range(1, 10))
def test_group_advantages_against_float64(K):
  """Random rewards, a group that all score the same, and from K = 1 on: 0 and no NaN there."""
  rewards = np.random.default_rng(K).normal(size=(6, K))
  lengths = jnp.ones((6, K), int)
  rewards[2] = 0.75
  expected = {name: np.zeros((6, K)) for name in advantages.GROUP_ADVANTAGES}
  for b, k in np.ndindex(6, K):
    others = np.delete(rewards[b], k)
    expected['leave_one_out'][b, k] = rewards[b, k] - others.mean() if K > 1 else 0.0
    expected['above_mean'][b, k] = rewards[b, k] - rewards[b].mean()
    expected['standardised'][b, k] = (
      expected['above_mean'][b, k] / (np.std(rewards[b], ddof=1) + 1e-4) if K > 1 else 0.0
    )
    expected['batch_baseline'][b, k] = rewards[b, k] - rewards.mean()
  for name, values in expected.items():
    got = advantages.GROUP_ADVANTAGES[name](jnp.float32(rewards), lengths)
    np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-5, err_msg=name)
    equal = advantages.GROUP_ADVANTAGES[name](jnp.full((3, K), 0.7), jnp.ones((3, K), int))
    np.testing.assert_array_equal(equal, 0, err_msg=name)  # exactly: Adam would magnify rounding
  twice = (
    (K - 1) * np.asarray(advantages.leave_one_out(jnp.float32(rewards), lengths)) / K
  )  # Dr. GRPO is RLOO by a factor
  if K > 1:
    np.testing.assert_allclose(
      advantages.above_mean(jnp.float32(rewards), lengths), twice, atol=1e-5
    )


def test_overlong_answers_cost_up_to_1():
  got = advantages.overlong_penalty(jnp.array([1, 16, 18, 20, 25]), 20, 4)
  np.testing.assert_allclose(got, [0.0, 0.0, -0.5, -1.0, -1.0])
