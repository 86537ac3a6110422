import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objectives import divergence


def test_estimators_by_hand():
  a, b = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -1.0])
  np.testing.assert_allclose(divergence.k1(a, b), [0.5, -1.0])
  np.testing.assert_allclose(divergence.k2(a, b), [0.125, 0.5])
  np.testing.assert_allclose(
    divergence.k3(a, b), [np.exp(-0.5) - 0.5, np.exp(1.0) - 2.0], rtol=1e-6
  )


def test_k1_and_k3_are_unbiased():
  logits = jax.random.normal(jax.random.key(0), (2, 8))
  policy, reference = jax.nn.log_softmax(logits)
  kl = jnp.sum(jnp.exp(policy) * (policy - reference))
  for estimate in (divergence.k1, divergence.k3):
    np.testing.assert_allclose(
      jnp.sum(jnp.exp(policy) * estimate(policy, reference)), kl, rtol=1e-5
    )


def test_gradients_of_the_terms_of_a_loss_against_enumeration():
  """Answers are drawn from π and held fixed; what a term's gradient then is on
  average, over all 8 answers, in float64: k1 and k2 have that of KL(π ‖ π_ref), k3
  that of KL(π_ref ‖ π).
  """
  logits, reference = np.random.default_rng(0).normal(size=(2, 8))

  def softmax(x):
    return np.exp(x) / np.exp(x).sum()

  p, q = softmax(logits), softmax(reference)
  log_ratio = np.log(p / q)
  forward, backward = (
    p * (log_ratio - p @ log_ratio),
    p - q,
  )  # of KL(π ‖ π_ref), of KL(π_ref ‖ π), by the logits
  for name, expected in (('k1', forward), ('k2', forward), ('k3', backward)):

    def mean(x):
      terms = divergence.KL_TERMS[name](jax.nn.log_softmax(x), jnp.log(jnp.float32(q)))
      return jnp.sum(jnp.float32(p) * terms)

    np.testing.assert_allclose(
      jax.grad(mean)(jnp.float32(logits)), expected, rtol=1e-4, atol=1e-6, err_msg=name
    )
    value = {'k1': log_ratio, 'k2': 0.5 * log_ratio**2, 'k3': np.exp(-log_ratio) + log_ratio - 1}[
      name
    ]
    terms = divergence.KL_TERMS[name](jnp.float32(np.log(p)), jnp.float32(np.log(q)))
    np.testing.assert_allclose(terms, value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_adaptive_coefficient():

  def adapt(kl):
    return float(divergence.adapt_kl_coefficient(0.1, kl, 6.0, 1000.0, 100))

  np.testing.assert_allclose(adapt(6.0), 0.1)
  np.testing.assert_allclose(adapt(6.6), 0.1 * 1.01)  # 10% above, a tenth of the horizon
  np.testing.assert_allclose(adapt(60.0), 0.1 * 1.02)  # clipped at 20%
  np.testing.assert_allclose(adapt(0.0), 0.1 * 0.98)


def test_best_of_n_against_counting():
  """Of a uniform choice among m distinct scores the best of n has a known
  distribution; m is large.
  """
  m, n = 4000, 16
  upto = (np.arange(m + 1) / m) ** n
  best = np.diff(upto)
  np.testing.assert_allclose(divergence.best_of_n_kl(n), np.sum(best * np.log(best * m)), rtol=2e-3)
  assert divergence.best_of_n_kl(1) == 0
