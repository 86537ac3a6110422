import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives import preference

VALUES = dict(beta=0.3, label_smoothing=0.1, margin=0.5, nll_coefficient=0.7, dpop_lambda=0.7)
LOSSES = preference.PREFERENCE_LOSSES
PAIRS = [name for name, loss in LOSSES.items() if loss.reduction is preference.over_pairs]


def settings(name, **changes):
  """The settings that a loss has, of VALUES."""
  values = {**VALUES, **changes}
  names = [field.name for field in dataclasses.fields(LOSSES[name].settings_class)]
  return LOSSES[name].settings_class(**{name: values[name] for name in names})


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def by_hand(name, better, worse):
  """float64; better and worse are (log π, log π_ref, length)."""
  (pw, rw, nw), (pl, rl, nl), b, e = better, worse, VALUES['beta'], VALUES['label_smoothing']
  delta = pw - rw - pl + rl

  def logistic(z):
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)

  def odds(p, n):
    return np.log(np.exp(p / n) / (1 - np.exp(p / n)))

  return {
    'dpo': lambda: logistic(b * delta),
    'robust': lambda: (
      (-(1 - e) * log_sigmoid(b * delta) + e * log_sigmoid(-b * delta)) / (1 - 2 * e)
    ),
    'ipo': lambda: ((pw - rw) / nw - (pl - rl) / nl - 1 / (2 * b)) ** 2,
    'ipo_sum': lambda: (delta - 1 / (2 * b)) ** 2,
    'hinge': lambda: np.maximum(0, 1 - b * delta),
    'length_normalised': lambda: logistic(b * ((pw - rw) / nw - (pl - rl) / nl)),
    'dpop': lambda: (
      -(1 - e) * log_sigmoid(b * (delta - 0.7 * np.maximum(0, rw - pw)))
      - e * log_sigmoid(b * (-delta - 0.7 * np.maximum(0, rl - pl)))
    ),
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


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('seed', range(3))
def test_loss_and_gradient_against_float64(name, seed):
  better, worse = responses(seed), responses(seed + 100)

  def loss(pw, pl):
    return LOSSES[name].function(
      as_response(better)._replace(logprobs=pw),
      as_response(worse)._replace(logprobs=pl),
      settings(name),
    )

  pw, pl = jnp.float32(better[0]), jnp.float32(worse[0])
  np.testing.assert_allclose(loss(pw, pl), by_hand(name, better, worse), rtol=2e-5, atol=2e-5)
  got = jax.grad(lambda pw, pl: loss(pw, pl).sum(), argnums=(0, 1))(pw, pl)
  for place, step in ((0, (1e-6, 0.0)), (1, (0.0, 1e-6))):

    def at(sign):
      return by_hand(
        name, (better[0] + sign * step[0], *better[1:]), (worse[0] + sign * step[1], *worse[1:])
      )

    np.testing.assert_allclose(got[place], (at(1) - at(-1)) / 2e-6, rtol=2e-4, atol=2e-5)


def over_prompts_by_hand(name, logprobs, reference, lengths, ranks, group):
  """The mean over the untied pairs of each prompt, summed over the prompts that have
  one: float64 loops.
  """
  total, count = 0.0, 0
  for b in range(len(group)):
    for g in set(group[b]) - {0}:

      def one(i):
        return (logprobs[b, i], reference[b, i], lengths[b, i])

      places = np.flatnonzero(group[b] == g)
      losses = [
        by_hand(name, one(i), one(j)) for i in places for j in places if ranks[b, i] < ranks[b, j]
      ]
      total, count = total + (np.mean(losses) if losses else 0.0), count + bool(losses)
  return total, count


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('seed', range(2))
def test_whole_batches_against_float64(name, seed):
  """Rankings of 2 to 9, ties, empty places, an empty row: loss and gradient; the
  order of rows and places is nothing.
  """
  rng = np.random.default_rng(seed)
  group = np.array(
    [[1] * 9 + [2] * 2 + [0], [0] * 12, [1] * 3 + [2] * 4 + [3] * 5, [1] * 8 + [0] * 4], np.int32
  )
  ranks = rng.integers(1, 5, group.shape).astype(np.int32)
  ranks[2, :3] = 2  # tied
  logprobs, reference, lengths = responses(seed, group.shape)

  def f32(x):
    return jnp.asarray(x, jnp.float32)

  def loss(x, order=lambda x: x):
    every = preference.Response(order(x), order(f32(reference)), order(f32(lengths)))
    labels = preference.Labels(order(ranks), order(group), jnp.ones(group.shape))
    return LOSSES[name].apply(every, labels, settings(name))

  got, weight = loss(f32(logprobs))
  want, count = over_prompts_by_hand(name, logprobs, reference, lengths, ranks, group)
  np.testing.assert_allclose([got, weight], [want, count], rtol=5e-5)
  gradient, slopes = jax.grad(lambda x: loss(x)[0])(f32(logprobs)), np.zeros(group.shape)
  for place in zip(*np.nonzero(group)):
    step = np.zeros(group.shape)
    step[place] = 1e-6

    def at(sign):
      return over_prompts_by_hand(name, logprobs + sign * step, reference, lengths, ranks, group)[0]

    slopes[place] = (at(1) - at(-1)) / 2e-6
  np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=5e-5)
  rows, places = rng.permutation(4), rng.permutation(12)
  np.testing.assert_allclose(
    loss(f32(logprobs), lambda x: x[rows][:, places]), [got, weight], rtol=1e-5
  )


@pytest.mark.parametrize('name', [name for name in PAIRS if LOSSES[name].accepts_soft_labels])
def test_a_soft_label_is_the_mean_of_both_orders_losses(name):
  """ℓ with ε = 1 − p is p ℓ(w, l) + (1 − p) ℓ(l, w), but for what a
  loss says of the better response alone.
  """
  better, worse = as_response(responses(0)), as_response(responses(1))
  others = dict(label_smoothing=0.0, margin=0.0, nll_coefficient=0.0, dpop_lambda=0.0)
  loss, plain = LOSSES[name].function, settings(name, **others)
  p = jnp.linspace(0.5, 1.0, better.lengths.size).reshape(better.lengths.shape)
  soft = loss(better, worse, dataclasses.replace(plain, label_smoothing=1 - p))
  both = p * loss(better, worse, plain) + (1 - p) * loss(worse, better, plain)
  np.testing.assert_allclose(soft, both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', PAIRS)
def test_extremes_are_finite(name):
  """A response of probability one, an impossible one, and both the same."""
  better, worse = (
    preference.Response(jnp.array(x), jnp.array(y), jnp.array([1.0, 2.0, 3.0]))
    for x, y in (
      ([0.0, -500.0, -1.0], [-9.0, -1.0, -1.0]),
      ([-500.0, 0.0, -1.0], [-1.0, -9.0, -1.0]),
    )
  )
  loss, slope = jax.value_and_grad(
    lambda x: LOSSES[name].function(better._replace(logprobs=x), worse, settings(name)).sum()
  )(better.logprobs)
  assert np.isfinite(loss) and np.isfinite(slope).all()


@pytest.mark.parametrize(
  'name', sorted(name for name in PAIRS if LOSSES[name].needs_reference and name != 'dpop')
)
def test_the_references_normaliser_changes_nothing(name):
  """A constant added to log π_ref of both responses of one length, as the partition
  function would be.
  """
  better, worse = as_response(responses(0)), as_response(responses(1))
  better, worse = (
    better._replace(lengths=jnp.full(better.lengths.shape, 7.0)),
    worse._replace(lengths=jnp.full(worse.lengths.shape, 7.0)),
  )
  moved = [x._replace(reference_logprobs=x.reference_logprobs + 3.5) for x in (better, worse)]

  def of(better, worse):
    return jax.grad(
      lambda x: LOSSES[name].function(better._replace(logprobs=x), worse, settings(name)).sum()
    )(better.logprobs)

  np.testing.assert_allclose(of(better, worse), of(*moved), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_kto_against_float64(seed):
  rng = np.random.default_rng(seed)
  logprobs, reference, lengths = responses(seed, (5, 4))
  desirable, seen, others = (
    rng.random((2, 5, 4)) < 0.5,
    rng.random((5, 4)) < 0.7,
    rng.normal(0.3, 1.0, (5, 4)),
  )
  z = max(0.0, others[seen].mean())
  h = logprobs - reference
  want = np.where(
    desirable[0],
    1 / (1 + np.exp(VALUES['beta'] * (h - z))),
    1 / (1 + np.exp(VALUES['beta'] * (z - h))),
  )
  slope = VALUES['beta'] * want * (1 - want) * np.where(desirable[0], -1, 1)

  def loss(x):
    anchor = preference.kto_anchor(jnp.float32(others), seen)
    return preference.kto(
      as_response((logprobs, reference, lengths))._replace(logprobs=x),
      desirable[0],
      anchor,
      settings('kto'),
    )

  np.testing.assert_allclose(loss(jnp.float32(logprobs)), want, rtol=1e-4)
  np.testing.assert_allclose(
    jax.grad(lambda x: loss(x).sum())(jnp.float32(logprobs)), slope, rtol=1e-3, atol=1e-6
  )


def test_kto_by_hand():
  response = preference.Response(
    jnp.array([-1.0, -4.0]), jnp.array([-3.0, -3.0]), jnp.array([2.0, 2.0])
  )

  def loss(x):
    return preference.kto(
      response._replace(logprobs=x), jnp.array([True, False]), jnp.float32(0.5), settings('kto')
    )

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  np.testing.assert_allclose(
    loss(response.logprobs), [1 - sigmoid(0.3 * 1.5), 1 - sigmoid(0.3 * 1.5)], rtol=1e-6
  )
  slope = 0.3 * sigmoid(0.45) * sigmoid(-0.45)
  np.testing.assert_allclose(
    jax.grad(lambda x: loss(x).sum())(response.logprobs), [-slope, slope], rtol=1e-6
  )


def test_kto_anchor_is_never_negative_and_bears_no_gradient():
  ratios, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
  assert preference.kto_anchor(ratios, mask) == 2.0 and preference.kto_anchor(-ratios, mask) == 0.0
  assert preference.kto_anchor(ratios, jnp.zeros(3, bool)) == 0.0
  assert not np.asarray(jax.grad(lambda x: preference.kto_anchor(x, mask[:2]))(ratios[:2])).any()


def test_ipo_stops_at_its_margin_and_dpo_goes_on():
  """Two responses, always the same one better: IPO's margin becomes 1/(2β), DPO's
  grows for ever.
  """

  def margins(name, steps, rate):
    defaults = LOSSES[name].settings_class(beta=0.1)

    def loss(logits):
      logprobs = jax.nn.log_softmax(logits)

      def one(i):
        return preference.Response(logprobs[i], jnp.log(0.5), jnp.float32(1.0))

      return LOSSES[name].function(one(0), one(1), defaults)

    slope = jax.jit(jax.grad(loss))
    logits, found = jnp.zeros(2), []
    for _ in range(steps):
      logits = logits - rate * slope(logits)
      found.append(float(logits[0] - logits[1]))
    return found

  assert abs(margins('ipo', 300, 0.1)[-1] / 5.0 - 1) < 0.05
  dpo = margins('dpo', 2000, 0.125)
  assert dpo[1999] > 3 * dpo[199] > 0


def test_which_loss_needs_what():
  """As the papers have it; stages decide by nothing else."""

  def names(wanted):
    return {name for name, loss in LOSSES.items() if wanted(loss)}

  assert names(lambda loss: not loss.needs_reference) == {'cpo', 'simpo', 'orpo'}
  assert names(lambda loss: loss.single_responses) == {'kto'}
  soft = {'dpo', 'length_normalised', 'dpop', 'cpo', 'simpo'}
  assert names(lambda loss: loss.accepts_soft_labels) == soft


def test_doubt_and_flipped_labels_add_up():
  """Right with p = 0.8 and then flipped with ε = 0.1: wrong with 0.8 · 0.1 + 0.2 · 0.9."""
  every = as_response(responses(0))
  labels = preference.Labels(
    jnp.tile(jnp.array([[1, 2, 3]]), (4, 1)), jnp.ones((4, 3), int), jnp.full((4, 3), 0.8)
  )
  doubtful = LOSSES['dpo'].apply(every, labels, preference.DPOSettings(0.3, 0.1))
  sure = labels._replace(confidence=jnp.ones((4, 3)))
  smoothed = LOSSES['dpo'].apply(every, sure, preference.DPOSettings(0.3, 0.26))
  np.testing.assert_allclose(doubtful, smoothed, rtol=1e-5)


def test_kto_over_a_batch_counts_the_best_and_the_worst():
  """Of three responses the middle one counts for nothing."""
  every = as_response(responses(0, (1, 3)))
  ones = jnp.ones((1, 3))
  labels = preference.Labels(jnp.array([[2, 1, 3]]), jnp.ones((1, 3), int), ones, jnp.float32(0.5))
  total, count = LOSSES['kto'].apply(every, labels, settings('kto'))
  each = preference.kto(every, jnp.array([[False, True, False]]), jnp.float32(0.5), settings('kto'))
  assert count == 2
  np.testing.assert_allclose(total, each[0, 1] + each[0, 2], rtol=1e-6)
