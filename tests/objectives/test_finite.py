"""Values and gradients are finite whatever stands at masked places, and if ratios overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import (
  advantages,
  divergence,
  language_model,
  masked,
  policy_gradient,
  preference,
  ranking,
)

N, R = 4, 6
MASK = np.arange(R) < np.array([6, 3, 1, 0])[:, None]  # [N, R]
GROUP = np.array([[1, 1, 0, 0], [2, 2, 2, 0]])
RANKS = np.array([[1, 2, 1, 2], [2, 1, 3, 1]])
GARBAGE = (1e4, -1e4, np.inf, -np.inf, np.nan)
FAR = 1e4  # nats: the exponential of a log-ratio of so many overflows


def token_formulas():
  """Yields name → function of float arrays [N, R], masked by MASK, that returns a number."""
  for loss_name, loss in policy_gradient.POLICY_LOSSES.items():
    for name, reduce in policy_gradient.REDUCTIONS.items():
      if 'clipped' != loss_name and 'sequence_mean' != name:
        continue  # what a loss and a reduction do is independent

      def policy(logprobs, old, advantage, loss=loss, reduce=reduce):
        total, weight = reduce(loss(logprobs, old, advantage, MASK, 0.2, 0.3).losses, MASK)
        return total / weight

      yield f'{loss_name} {name}', policy, 3
  for name, term in divergence.KL_TERMS.items():

    def kl(logprobs, reference, term=term):
      inputs = masked.keep(logprobs, MASK), masked.keep(reference, MASK)
      return masked.total(term(*inputs), MASK)

    yield name, kl, 2

  def value(values, old, returns):
    kept = [masked.keep(x, MASK) for x in (values, old, returns)]
    return masked.total(policy_gradient.clipped_value(*kept, 0.2)[0], MASK)

  def gae(rewards, values):
    return sum(x.sum() for x in advantages.gae(rewards, values, MASK, 0.9, 0.8))

  def weights(old, sampler, level='token'):
    ratios = policy_gradient.sampling_ratios(old, sampler, MASK, level)
    limited = policy_gradient.truncate_weights(ratios, 2.0)
    return jnp.sum(limited) + policy_gradient.effective_share(limited, MASK)

  def sequence_weights(old, sampler):
    return weights(old, sampler, 'sequence')

  def whiten(x):
    return jnp.sum(masked.whiten(x, MASK) ** 3)

  def nll(logprobs):
    return language_model.nll(logprobs, MASK.astype(np.float32))[0]

  yield 'clipped_value', value, 3
  yield 'gae', gae, 2
  yield 'importance weights', weights, 2
  yield 'importance weights of sequences', sequence_weights, 2
  yield 'whiten', whiten, 1
  yield 'nll', nll, 1
  yield 'mean', lambda x: masked.mean(x, MASK), 1


def group_formulas():
  """Yields name → function of float arrays [B, K], of which places of group 0 are empty."""
  for name, entry in ranking.REWARD_LOSSES.items():

    def reward(scores, entry=entry):
      confidence = (np.full(GROUP.shape, 0.8, np.float32),) if entry.accepts_soft_labels else ()
      return entry.function(scores, RANKS, GROUP, *confidence)[0]

    yield name, reward, 1
  for name, entry in preference.PREFERENCE_LOSSES.items():

    def prefer(logprobs, reference, entry=entry):
      responses = preference.Response(logprobs, reference, np.full(GROUP.shape, 3.0, np.float32))
      confidence = np.ones(GROUP.shape, np.float32)
      labels = preference.Labels(RANKS, GROUP, confidence, jnp.float32(0.1))
      return entry.apply(responses, labels, entry.settings_class())[0]

    yield name, prefer, 2
  yield 'kto_anchor', lambda ratios: preference.kto_anchor(ratios, GROUP > 0), 1


TOKENS = {name: (function, count) for name, function, count in token_formulas()}
GROUPS = {name: (function, count) for name, function, count in group_formulas()}


def check(function, count, mask):
  """Compares garbage at masked places with zeros there; then lets ratios overflow."""
  rng = np.random.default_rng(0)
  clean = [-rng.random(mask.shape).astype(np.float32) * mask for _ in range(count)]
  both = jax.jit(jax.value_and_grad(function, argnums=tuple(range(count))))
  expected = both(*clean)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
  for garbage in GARBAGE:
    for place in range(count):  # in one array alone, as 1e4 − 1e4 would be harmless
      dirty = list(clean)
      dirty[place] = np.where(mask, clean[place], np.float32(garbage))
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), both(*dirty), expected)
  for sign in (1, -1):
    far = [np.where(mask, sign * FAR, 0).astype(np.float32), *clean[1:]]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(both(*far))), sign


@pytest.mark.parametrize('name', TOKENS)
def test_tokens(name):
  check(*TOKENS[name], MASK)


@pytest.mark.parametrize('name', GROUPS)
def test_groups(name):
  check(*GROUPS[name], GROUP > 0)
