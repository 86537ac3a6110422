import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import preference, ranking

C = types.SimpleNamespace(beta=0.3, label_smoothing=0.1, margin=0.5, nll_coefficient=0.7)


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def by_hand(name, w, l):
  """float64; w and l are (log π, log π_ref, length)."""
  (pw, rw, nw), (pl, rl, nl), b, e = w, l, C.beta, C.label_smoothing
  delta = pw - rw - pl + rl
  logistic = lambda z: -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
  odds = lambda p, n: np.log(np.exp(p / n) / (1 - np.exp(p / n)))
  return {
      'dpo': lambda: logistic(b * delta),
      'robust': lambda: (-(1 - e) * log_sigmoid(b * delta) + e * log_sigmoid(-b * delta)) / (1 - 2 * e),
      'ipo': lambda: ((pw - rw) / nw - (pl - rl) / nl - 1 / (2 * b)) ** 2,
      'ipo_sum': lambda: (delta - 1 / (2 * b)) ** 2,
      'hinge': lambda: np.maximum(0, 1 - b * delta),
      'length_normalised': lambda: logistic(b * ((pw - rw) / nw - (pl - rl) / nl)),
      'dpop': lambda: logistic(b * (delta - 0.7 * np.maximum(0, rw - pw))),
      'cpo': lambda: logistic(b * (pw - pl)) - 0.7 * pw / nw,
      'simpo': lambda: logistic(b * (pw / nw - pl / nl) - 0.5),
      'orpo': lambda: -pw / nw - b * log_sigmoid(odds(pw, nw) - odds(pl, nl)),
  }[name]()


def responses(seed, shape=(4, 3)):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, 30, shape).astype(float)
  logprobs = -lengths * rng.uniform(0.05, 4.0, shape)
  return logprobs, logprobs + rng.normal(size=shape) * np.sqrt(lengths), lengths


def as_response(values):
  return preference.Response(*(jnp.asarray(x, jnp.float32) for x in values))


@pytest.mark.parametrize('name', preference.PAIRS)
@pytest.mark.parametrize('seed', range(3))
def test_loss_and_gradient_against_float64(name, seed):
  w, l = responses(seed), responses(seed + 100)
  loss = lambda pw, pl: preference.PAIRS[name](
      as_response(w)._replace(logprobs=pw), as_response(l)._replace(logprobs=pl), C)
  pw, pl = jnp.float32(w[0]), jnp.float32(l[0])
  np.testing.assert_allclose(loss(pw, pl), by_hand(name, w, l), rtol=2e-5, atol=2e-5)
  got = jax.grad(lambda pw, pl: loss(pw, pl).sum(), argnums=(0, 1))(pw, pl)
  for place, step in ((0, (1e-6, 0.0)), (1, (0.0, 1e-6))):
    at = lambda sign: by_hand(name, (w[0] + sign * step[0], *w[1:]), (l[0] + sign * step[1], *l[1:]))
    np.testing.assert_allclose(got[place], (at(1) - at(-1)) / 2e-6, rtol=2e-4, atol=2e-5)


def over_prompts_by_hand(name, logprobs, reference, lengths, ranks, group):
  """The mean over the untied pairs of each prompt, summed over the prompts that have one: float64 loops."""
  total, count = 0.0, 0
  for b in range(len(group)):
    for g in set(group[b]) - {0}:
      one = lambda i: (logprobs[b, i], reference[b, i], lengths[b, i])
      places = np.flatnonzero(group[b] == g)
      losses = [by_hand(name, one(i), one(j)) for i in places for j in places if ranks[b, i] < ranks[b, j]]
      total, count = total + (np.mean(losses) if losses else 0.0), count + bool(losses)
  return total, count


@pytest.mark.parametrize('name', preference.PAIRS)
@pytest.mark.parametrize('seed', range(2))
def test_whole_batches_against_float64(name, seed):
  """Rankings of 2 to 9, ties, empty places, an empty row: loss and gradient; the order of rows and places is nothing."""
  rng = np.random.default_rng(seed)
  group = np.array([[1] * 9 + [2] * 2 + [0], [0] * 12, [1] * 3 + [2] * 4 + [3] * 5, [1] * 8 + [0] * 4], np.int32)
  ranks = rng.integers(1, 5, group.shape).astype(np.int32)
  ranks[2, :3] = 2  # tied
  logprobs, reference, lengths = responses(seed, group.shape)
  f32 = lambda x: jnp.asarray(x, jnp.float32)

  def loss(x, order=lambda x: x):
    every = preference.Response(order(x), order(f32(reference)), order(f32(lengths)))
    better, worse = (jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), every) for axis in (2, 1))
    return ranking.over_pairs(preference.PAIRS[name](better, worse, C), order(ranks), order(group))

  got, weight = loss(f32(logprobs))
  want, count = over_prompts_by_hand(name, logprobs, reference, lengths, ranks, group)
  np.testing.assert_allclose([got, weight], [want, count], rtol=5e-5)
  gradient, slopes = jax.grad(lambda x: loss(x)[0])(f32(logprobs)), np.zeros(group.shape)
  for place in zip(*np.nonzero(group)):
    step = np.zeros(group.shape)
    step[place] = 1e-6
    at = lambda sign: over_prompts_by_hand(name, logprobs + sign * step, reference, lengths, ranks, group)[0]
    slopes[place] = (at(1) - at(-1)) / 2e-6
  np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=5e-5)
  rows, places = rng.permutation(4), rng.permutation(12)
  np.testing.assert_allclose(loss(f32(logprobs), lambda x: x[rows][:, places]), [got, weight], rtol=1e-5)


@pytest.mark.parametrize('name', ['dpo', 'length_normalised', 'dpop', 'cpo', 'simpo'])
def test_a_soft_label_is_the_mean_of_both_orders_losses(name):
  """ℓ with ε = 1 − p is p ℓ(w, l) + (1 − p) ℓ(l, w), but for what a loss says of the better response alone."""
  w, l = as_response(responses(0)), as_response(responses(1))
  plain = preference.Settings(0.3, 0.0, 0.0, 0.0)
  p = jnp.linspace(0.5, 1.0, w.lengths.size).reshape(w.lengths.shape)
  soft = preference.PAIRS[name](w, l, plain._replace(label_smoothing=1 - p))
  both = p * preference.PAIRS[name](w, l, plain) + (1 - p) * preference.PAIRS[name](l, w, plain)
  np.testing.assert_allclose(soft, both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', preference.PAIRS)
def test_extremes_are_finite(name):
  """A response of probability one, an impossible one, and both the same."""
  w, l = (preference.Response(jnp.array(x), jnp.array(y), jnp.array([1.0, 2.0, 3.0]))
          for x, y in (([0.0, -500.0, -1.0], [-9.0, -1.0, -1.0]), ([-500.0, 0.0, -1.0], [-1.0, -9.0, -1.0])))
  loss, slope = jax.value_and_grad(lambda x: preference.PAIRS[name](w._replace(logprobs=x), l, C).sum())(w.logprobs)
  assert np.isfinite(loss) and np.isfinite(slope).all()


@pytest.mark.parametrize('name', sorted(set(preference.PAIRS) - set(preference.WITHOUT_REFERENCE) - {'dpop'}))
def test_the_references_normaliser_changes_nothing(name):
  """A constant added to log π_ref of both responses of one length, as the partition function would be."""
  w, l = as_response(responses(0)), as_response(responses(1))
  w, l = w._replace(lengths=jnp.full(w.lengths.shape, 7.0)), l._replace(lengths=jnp.full(l.lengths.shape, 7.0))
  moved = [x._replace(reference_logprobs=x.reference_logprobs + 3.5) for x in (w, l)]
  of = lambda w, l: jax.grad(lambda x: preference.PAIRS[name](w._replace(logprobs=x), l, C).sum())(w.logprobs)
  np.testing.assert_allclose(of(w, l), of(*moved), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_kto_against_float64(seed):
  rng = np.random.default_rng(seed)
  logprobs, reference, lengths = responses(seed, (5, 4))
  desirable, seen, others = rng.random((2, 5, 4)) < 0.5, rng.random((5, 4)) < 0.7, rng.normal(0.3, 1.0, (5, 4))
  z = max(0.0, others[seen].mean())
  h = logprobs - reference
  want = np.where(desirable[0], 1 / (1 + np.exp(C.beta * (h - z))), 1 / (1 + np.exp(C.beta * (z - h))))
  slope = C.beta * want * (1 - want) * np.where(desirable[0], -1, 1)
  def loss(x):
    anchor = preference.kto_anchor(jnp.float32(others), seen)
    return preference.kto(as_response((logprobs, reference, lengths))._replace(logprobs=x), desirable[0], anchor, C)
  np.testing.assert_allclose(loss(jnp.float32(logprobs)), want, rtol=1e-4)
  np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(jnp.float32(logprobs)), slope, rtol=1e-3, atol=1e-6)


def test_kto_by_hand():
  response = preference.Response(jnp.array([-1.0, -4.0]), jnp.array([-3.0, -3.0]), jnp.array([2.0, 2.0]))
  loss = lambda x: preference.kto(response._replace(logprobs=x), jnp.array([True, False]), jnp.float32(0.5), C)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(loss(response.logprobs), [1 - sigmoid(0.3 * 1.5), 1 - sigmoid(0.3 * 1.5)], rtol=1e-6)
  slope = 0.3 * sigmoid(0.45) * sigmoid(-0.45)
  np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(response.logprobs), [-slope, slope], rtol=1e-6)


def test_kto_anchor_is_never_negative_and_bears_no_gradient():
  ratios, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
  assert preference.kto_anchor(ratios, mask) == 2.0 and preference.kto_anchor(-ratios, mask) == 0.0
  assert preference.kto_anchor(ratios, jnp.zeros(3, bool)) == 0.0
  assert not np.asarray(jax.grad(lambda x: preference.kto_anchor(x, mask[:2]))(ratios[:2])).any()


def test_ipo_stops_at_its_margin_and_dpo_goes_on():
  """Two responses, always the same one better: IPO's margin becomes 1/(2β), DPO's grows for ever."""
  def margins(name, steps, rate):
    c = types.SimpleNamespace(beta=0.1, label_smoothing=0.0, margin=0.0, nll_coefficient=0.0)
    def loss(logits):
      logprobs = jax.nn.log_softmax(logits)
      one = lambda i: preference.Response(logprobs[i], jnp.log(0.5), jnp.float32(1.0))
      return preference.PAIRS[name](one(0), one(1), c)
    slope = jax.jit(jax.grad(loss))
    logits, found = jnp.zeros(2), []
    for _ in range(steps):
      logits = logits - rate * slope(logits)
      found.append(float(logits[0] - logits[1]))
    return found
  assert abs(margins('ipo', 300, 0.1)[-1] / 5.0 - 1) < 0.05
  dpo = margins('dpo', 2000, 0.125)
  assert dpo[1999] > 3 * dpo[199] > 0
