import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import divergence, policy_gradient


def ragged(seed, N=6, R=9):
  """logprobs, old logprobs, advantages and a mask of ragged answers, one of them empty: float64."""
  rng = np.random.default_rng(seed)
  mask = np.arange(R) < np.r_[0, 1, R, rng.integers(2, R, N - 3)][:, None]
  old = -rng.uniform(0.1, 4.0, (N, R))
  return old + 0.4 * rng.normal(size=(N, R)), old, rng.normal(size=(N, R)), mask


def by_hand(name, logprobs, old, advantages, mask, low, high):
  """The losses of each token, and their gradients with respect to its own log-
  probability, in float64 loops.
  """
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


@pytest.mark.parametrize('name', policy_gradient.POLICY_LOSSES)
@pytest.mark.parametrize('seed', range(3))
def test_losses_and_gradients_against_float64(name, seed):
  logprobs, old, advantages, mask = ragged(seed)

  def loss(x):
    return policy_gradient.POLICY_LOSSES[name](
      x, jnp.float32(old), jnp.float32(advantages), mask, 0.2, 0.28
    )

  x = jnp.float32(logprobs)
  losses, slopes = by_hand(name, logprobs, old, advantages, mask, 0.2, 0.28)
  np.testing.assert_allclose(np.where(mask, loss(x)[0], 0.0), losses, rtol=2e-5, atol=1e-6)
  got = jax.grad(lambda x: jnp.sum(jnp.where(mask, loss(x)[0], 0.0)))(x)
  np.testing.assert_allclose(got, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'name,expected',
  [
    ('token_mean', lambda rows: np.concatenate(rows).mean()),
    ('sequence_mean', lambda rows: np.mean([row.mean() for row in rows])),
    ('sequence_sum', lambda rows: np.mean([row.sum() for row in rows])),
    ('constant', lambda rows: sum(row.sum() for row in rows) / (len(rows) * 9)),
  ],
)
def test_reductions(name, expected):
  losses, _, _, mask = ragged(3)
  rows = [row[seen] for row, seen in zip(losses, mask) if seen.any()]
  total, weight = policy_gradient.REDUCTIONS[name](
    jnp.where(mask, jnp.float32(losses), jnp.nan), mask
  )
  np.testing.assert_allclose(total / weight, expected(rows), rtol=1e-5)


def reduced_by_hand(name, losses, mask):
  """A reduction of float64 losses as loops: (loss, how much each token's loss counts)."""
  rows = [n for n in range(len(mask)) if mask[n].any()]
  counts = np.zeros(mask.shape)
  for n in rows:
    for t in np.flatnonzero(mask[n]):
      counts[n, t] = {
        'token_mean': 1 / mask.sum(),
        'sequence_mean': 1 / (mask[n].sum() * len(rows)),
        'sequence_sum': 1 / len(rows),
        'constant': 1 / (len(rows) * mask.shape[1]),
      }[name]
  return float(np.sum(losses * counts)), counts


@pytest.mark.parametrize('name', policy_gradient.POLICY_LOSSES)
@pytest.mark.parametrize('reduce', policy_gradient.REDUCTIONS)
def test_reduced_losses_and_gradients_against_float64(name, reduce):
  """What a step minimises: a term of the KL beside the policy's loss, importance
  weights, garbage outside the mask.
  """
  logprobs, old, advantages, mask = ragged(5)
  rng = np.random.default_rng(6)
  weights, reference = rng.uniform(0.1, 2.0, mask.shape), old + 0.3 * rng.normal(size=mask.shape)

  def dirty(x):
    return jnp.where(mask, jnp.float32(x), 7.0)

  def loss(x):
    losses, _, _ = policy_gradient.POLICY_LOSSES[name](
      x, dirty(old), dirty(advantages), mask, 0.2, 0.28
    )
    total, weight = policy_gradient.REDUCTIONS[reduce](
      losses * dirty(weights) + 0.1 * divergence.KL_TERMS['k3'](x, dirty(reference)), mask
    )
    return total / weight

  def exact(logprobs):
    losses, slopes = by_hand(name, logprobs, old, advantages, mask, 0.2, 0.28)
    k3 = np.exp(reference - logprobs) + logprobs - reference - 1
    return *reduced_by_hand(reduce, weights * losses + 0.1 * np.where(mask, k3, 0), mask), slopes

  want, counts, slopes = exact(logprobs)
  want_slope = np.where(
    mask, (weights * slopes + 0.1 * (1 - np.exp(reference - logprobs))) * counts, 0
  )
  if name == 'gspo':  # a token moves all losses of its answer
    for place in zip(*np.nonzero(mask)):
      step = np.zeros(mask.shape)
      step[place] = 1e-6
      want_slope[place] = (exact(logprobs + step)[0] - exact(logprobs - step)[0]) / 2e-6
  got, slope = jax.value_and_grad(loss)(dirty(logprobs))
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(slope, want_slope, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize('name', policy_gradient.POLICY_LOSSES)
@pytest.mark.parametrize('reduce', policy_gradient.REDUCTIONS)
def test_a_batch_without_any_answer_is_0_and_teaches_nothing(name, reduce):
  logprobs, old, advantages, mask = ragged(0)

  def total(x):
    losses, _, _ = policy_gradient.POLICY_LOSSES[name](
      x, jnp.float32(old), jnp.float32(advantages), mask & False, 0.2, 0.2
    )
    return policy_gradient.REDUCTIONS[reduce](losses, mask & False)

  assert total(jnp.float32(logprobs)) == (0, 0)
  np.testing.assert_array_equal(jax.grad(lambda x: total(x)[0])(jnp.float32(logprobs)), 0)


@pytest.mark.parametrize('seed', range(3))
def test_value_loss_and_gradient_against_float64(seed):
  rng = np.random.default_rng(seed)
  values, old, returns = rng.normal(size=(3, 6, 9))
  near = np.clip(values, old - 0.3, old + 0.3)
  free, held = (values - returns) ** 2, (near - returns) ** 2
  inside = np.abs(values - old) < 0.3
  slopes = np.where(held > free, (near - returns) * inside, values - returns)

  def f(x):
    return policy_gradient.clipped_value(x, jnp.float32(old), jnp.float32(returns), 0.3)

  np.testing.assert_allclose(
    f(jnp.float32(values))[0], 0.5 * np.maximum(free, held), rtol=1e-5, atol=1e-6
  )
  got = jax.grad(lambda x: f(x)[0].sum())(jnp.float32(values))
  np.testing.assert_allclose(
    np.where(held == free, 0, got), np.where(held == free, 0, slopes), rtol=1e-4, atol=1e-5
  )
  both = jax.grad(lambda x: f(x)[0].sum())(
    jnp.float32(old)
  )  # nothing has moved: the plain gradient
  np.testing.assert_allclose(both, old - returns, rtol=1e-4, atol=1e-5)


def test_an_older_samplers_answers_give_the_policys_gradient():
  """Enumerated: E_sampler[w A ∇ log π] = E_π[A ∇ log π] where no weight reaches the
  limit, and less where one does.
  """
  rng = np.random.default_rng(0)
  logits, older, rewards = rng.normal(size=(3, 1, 8))

  def softmax(x):
    return np.exp(x) / np.exp(x).sum()

  p, b, every = softmax(logits), jnp.float32(np.log(softmax(older))), jnp.ones((1, 8), bool)

  def mean_gradient(limit):
    old = jnp.float32(np.log(p))

    def loss(x):
      losses, _, _ = policy_gradient.reinforce(
        jax.nn.log_softmax(x), old, jnp.float32(rewards), every, 0.2, 0.2
      )
      ratios = policy_gradient.sampling_ratios(old, b, every)
      return jnp.sum(jnp.exp(b) * policy_gradient.truncate_weights(ratios, limit) * losses)

    return jax.grad(loss)(jnp.float32(logits))

  exact = -p * (rewards - np.sum(p * rewards))
  np.testing.assert_allclose(mean_gradient(1e6), exact, rtol=1e-4, atol=1e-6)
  assert np.abs(mean_gradient(0.5) - exact).max() > 1e-2


def test_importance_weights_by_hand():
  old = jnp.zeros((1, 3))
  sampler = jnp.log(jnp.array([[0.5, 0.1, 9.0]]))
  mask = jnp.array([[True, True, False]])
  ratios = policy_gradient.sampling_ratios(old, sampler, mask)
  np.testing.assert_allclose(ratios, [[2.0, 10.0, 1.0]], rtol=1e-6)
  np.testing.assert_allclose(policy_gradient.truncate_weights(ratios, 3.0), [[2.0, 3.0, 1.0]])
  np.testing.assert_allclose(policy_gradient.mask_weights(ratios, 3.0), [[2.0, 0.0, 1.0]])
  whole = policy_gradient.sampling_ratios(old, sampler, mask, 'sequence')
  np.testing.assert_allclose(whole, [[20.0, 20.0, 1.0]], rtol=1e-5)
  share = policy_gradient.effective_share(ratios, mask)
  np.testing.assert_allclose(share, 12**2 / (2 * (2**2 + 10**2)), rtol=1e-5)


def test_policy_loss_by_hand():
  ratios = jnp.array([[1.0, 1.5, 0.5, 1.5, 0.5]])
  advantages = jnp.array([[2.0, 1.0, 1.0, -1.0, -1.0]])
  every = jnp.ones((1, 5), bool)
  losses, got, held = policy_gradient.clipped(
    jnp.log(ratios), jnp.zeros((1, 5)), advantages, every, 0.2, 0.2
  )
  np.testing.assert_allclose(got, ratios, rtol=1e-6)
  np.testing.assert_allclose(losses, [[-2.0, -1.2, -0.5, 1.5, 0.8]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[False, True, False, False, True]])
  slope = jax.grad(
    lambda x: policy_gradient.clipped(x, jnp.zeros((1, 5)), advantages, every, 0.2, 0.2)[0].sum()
  )
  np.testing.assert_allclose(slope(jnp.log(ratios)), [[-2.0, 0.0, -0.5, 1.5, 0.0]], rtol=1e-6)


def test_value_loss_by_hand():
  values, old, returns = (
    jnp.array([[1.0, 1.0, 0.1]]),
    jnp.array([[0.0, 0.0, 0.0]]),
    jnp.array([[2.0, 0.0, 1.0]]),
  )
  losses, held = policy_gradient.clipped_value(values, old, returns, 0.2)
  np.testing.assert_allclose(losses, [[0.5 * 1.8**2, 0.5 * 1.0, 0.5 * 0.81]], rtol=1e-6)
  np.testing.assert_array_equal(held, [[True, False, False]])
