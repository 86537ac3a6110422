"""Packed updates: the same numbers as padded ones, at the cost of the real tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.objectives.preference import PREFERENCE_LOSSES
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import policy_gradient, ppo, preference
from rlhf_jax.stages.shared import off_policy, packing, ranked_logprobs, training
from rlhf_jax.types import Rankings, Sequences

N, P, R = 16, 6, 14
SAMPLING = SamplingOptions(max_new_tokens=R, temperature=0.7)
MESHES = [pytest.param('one device', marks=pytest.mark.slow), 'data 2, fsdp 2, tensor 2']


def ragged_rollout(seed=0):
  """Prompts and responses of very different lengths, with scores."""
  prompts = testing.make_prompts(N, P, seed)
  samples = testing.make_samples(N, R, seed + 1)
  lengths = np.minimum(R, np.random.default_rng(seed).geometric(4 / R, N))
  mask = np.arange(R) < lengths[:, None]
  samples = samples.replace(
    mask=mask,
    tokens=np.where(mask, samples.tokens, testing.PAD_ID),
    logprobs=np.where(mask, samples.logprobs, 0).astype(np.float32),
    ended=lengths < R,
  )
  scores = np.random.default_rng(seed).normal(size=N).astype(np.float32)
  return prompts, samples, scores


def documents(rows=12, length=9):
  rng = np.random.default_rng(7)
  inside = np.arange(length) < rng.integers(3, length + 1, (rows, 1))
  return Sequences(
    tokens=np.where(inside, rng.integers(2, 64, inside.shape), 0).astype(np.int32),
    positions=np.where(inside, np.arange(length), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    loss_mask=(inside & (np.arange(length) > 0)).astype(np.float32),
  )


@functools.cache
def update_ppo(mesh, packed_rows):
  definitions = testing.make_ppo_definitions(testing.make_layout(mesh), 3e-3)
  options = ppo.Options(
    epochs=2,
    minibatches=2,
    score_place='after_eos',
    sampling=SAMPLING,
    packed_rows=packed_rows,
    pretraining_coefficient=0.5,
  )
  step = training.compile_train_step(ppo.train_step, definitions, options)
  reference = testing.make_params(definitions.model, definitions.layout, seed=5)
  state = testing.make_ppo_state(definitions, options)
  scored = testing.score_samples(*definitions.layout.place((*ragged_rollout(), documents())))
  state, metrics = step(state, scored, reference)
  return jax.device_get(((state.params, state.value_params), metrics))


@functools.cache
def update_group(mesh, packed_rows):
  definitions = testing.make_rollout_definitions(testing.make_layout(mesh), 3e-3)
  options = policy_gradient.Options(
    batch_size=N // 4,
    num_samples=4,
    minibatches=1,
    reduce='sequence_mean',
    kl_place='loss',
    kl_estimator='k2',
    sampling=SAMPLING,
    packed_rows=packed_rows,
  )
  step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  reference = testing.make_params(definitions.model, definitions.layout, seed=5)
  state = testing.make_state(definitions)
  state = off_policy.SamplerState(**vars(state), sampler_trained={})
  prompts, samples, scores = ragged_rollout()
  groups = jax.tree.map(lambda x: x[: N // 4], prompts)
  scored = testing.score_samples(*definitions.layout.place((groups, samples, scores)))
  state, metrics = step(state, scored, reference)
  return jax.device_get((state.params, metrics))


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('update', [update_ppo, update_group])
def test_a_packed_update_is_the_padded_one(update, mesh):
  params, metrics = update(mesh, 4)
  want_params, want_metrics = update('one device', 0)
  share = metrics.pop('packed/padding_share')
  metrics.pop('packed/shared_share', None)
  # A step of Adam turns rounding of tiny gradients into more than rounding.
  testing.assert_trees_close(params, want_params, mesh, 3e-5)
  testing.assert_trees_close(metrics, want_metrics, mesh, 3e-5)
  assert 0 < share < 0.4


def test_rows_are_packed_densely_and_each_once():
  rng = np.random.default_rng(0)
  lengths = np.minimum(64, 16 + rng.geometric(1 / 12, 256)).astype(np.int32)
  packed = jax.jit(functools.partial(packing.pack, width=64, chunk_rows=4))(lengths[:, None])
  rows, starts = np.asarray(packed.rows), np.asarray(packed.starts)
  held = rows < 256
  assert sorted(rows[held]) == list(range(256))
  spans = np.zeros((*rows.shape[:2], 64), int)
  for place in np.argwhere(held):
    first = starts[tuple(place)]
    spans[place[0], place[1], first : first + lengths[rows[tuple(place)]]] += 1
  assert spans.max() == 1  # no two rows share a place
  used = spans[: int(packed.count)]
  assert not spans[int(packed.count) :].any() and used.mean() > 0.9


def test_the_work_is_that_of_the_real_tokens():
  """Half as many tokens are half as many chunks, of one program."""
  pack = jax.jit(functools.partial(packing.pack, width=32, chunk_rows=2))
  counts = [int(pack(jnp.full((32, 1), n, jnp.int32)).count) for n in (32, 16, 8)]
  assert counts == [16, 8, 4]
  assert pack._cache_size() == 1


def test_rows_of_a_unit_share_a_chunk():
  lengths = np.random.default_rng(0).integers(0, 33, (16, 4)).astype(np.int32)
  lengths[5] = 32  # all at full width
  packed = jax.jit(functools.partial(packing.pack, width=32, chunk_rows=4))(lengths)
  rows = np.asarray(packed.rows)
  held = rows < 64
  assert sorted(rows[held]) == list(np.flatnonzero(lengths))
  for chunk in range(int(packed.count)):
    mine = rows[chunk][held[chunk]]
    units = np.unique(mine // 4)
    assert sorted(mine) == [n for n in np.flatnonzero(lengths) if n // 4 in units]
    filled = np.zeros(4)
    np.add.at(filled, np.nonzero(held[chunk])[0], lengths.ravel()[mine])
    assert filled.max() <= 32
  assert not held[int(packed.count) :].any()


def ragged_rankings():
  """Rankings of two to four responses, in rows of four places, of very different lengths."""
  rng = np.random.default_rng(3)
  group = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], np.int32)
  begins = rng.integers(1, P, (4, 4)) * (group > 0)
  lengths = (begins + np.minimum(R, rng.geometric(4 / R, (4, 4)))) * (group > 0)
  inside = np.arange(P + R) < lengths[..., None]
  return Rankings(
    tokens=np.where(inside, rng.integers(2, 64, inside.shape), 0).astype(np.int32),
    positions=np.where(inside, np.arange(P + R), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=group,
    ranks=rng.integers(1, 4, (4, 4)).astype(np.int32),
    index=np.where(group > 0, 0, -1).astype(np.int32),
    begins=begins.astype(np.int32),
    confidence=rng.choice([1, 0.8], (4, 4)).astype(np.float32),
    reference_logprobs=rng.normal(-20, 3, (4, 4)).astype(np.float32),
  )


def every_preference_loss(params, batch, model):
  """The sum of all losses of rankings, each with a weight of its own, and the value of each."""
  computed = ranked_logprobs.response_logprobs(model, params, batch)
  total, means = 0.0, {}
  for number, (name, entry) in enumerate(PREFERENCE_LOSSES.items()):
    options = preference.Options(loss=name, settings=entry.settings_class(beta=0.3))
    value = preference.loss_of_logprobs(computed, batch, jnp.float32(0.1), options)
    total += value.total / (1 + number)
    means |= {name: (value.total, value.weight), f'{name}/margin': value.means['margin']}
  return steps.Loss(total, value.weight, means | value.means, value.counts)


def rankings_gradient(packed_rows):
  model, layout = testing.make_model(), testing.make_layout()

  @jax.jit
  def gradient(params, batch):
    parts, metrics = ranked_logprobs.pack_rankings(batch, model, layout, packed_rows)

    def loss(params, batch, key):
      return every_preference_loss(params, batch, model)

    gradients, more = steps.compute_gradients(loss, params, parts, jax.random.key(0))
    norm = optax.tree.norm(gradients)
    gradients = jax.tree.map(lambda x: x / norm, gradients)
    means = ranked_logprobs.map_logprobs(model, layout, packed_rows, params, batch)
    return (gradients, norm, more, means), metrics

  return gradient(testing.make_params(model), ragged_rankings())


def test_packed_rankings_have_the_gradients_of_padded_ones():
  """For every loss of the family, with soft labels, empty places and several chunks."""
  (got, metrics), (want, _) = rankings_gradient(4), rankings_gradient(0)
  testing.assert_trees_close(got, want, 'packed', 2e-6)
  assert 0 < metrics['packed/padding_share'] < 0.4


@pytest.mark.parametrize(
  'rows,microbatches,message',
  [
    (5, 1, 'packed_rows: expected a multiple of the 2 devices'),
    (4, 2, 'microbatches: expected 1 with packed_rows'),
    (2, 1, 'packed_rows: expected 0 or at least 4'),
  ],
)
def test_packed_rows_that_do_not_fit(rows, microbatches, message):
  with pytest.raises(UserError, match=message):
    packing.check_rows(rows, microbatches, 2, 'config.ppo', together=4)
