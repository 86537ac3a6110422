"""Packed updates: the same numbers as padded ones, at the cost of the real tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import model_config, transformer
from rlhf_jax.objectives.preference import PREFERENCE_LOSSES
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import policy_gradient, ppo, preference, reward
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


@pytest.fixture
def double_precision(monkeypatch):
  """All that is float32 is float64, in the models and in what is computed from them."""
  make_params = testing.make_params

  def make_double_params(*arguments, **options):
    return jax.tree.map(lambda x: x.astype(np.float64), make_params(*arguments, **options))

  config = dataclasses.replace(testing.MODEL_CONFIG, dtype='float64')
  monkeypatch.setattr(testing, 'MODEL_CONFIG', config)
  monkeypatch.setattr(testing, 'make_params', make_double_params)
  monkeypatch.setattr(model_config, 'DTYPES', (*model_config.DTYPES, 'float64'))
  monkeypatch.setattr(jnp, 'float32', jnp.float64)
  with jax.enable_x64(True):
    yield


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
  assert 0 < share < (0.4 if update is update_ppo else 0.7)  # wide rows hold prompts once
  # A step of Adam turns rounding of tiny gradients into more than rounding.
  testing.assert_trees_close(params, want_params, mesh, 3e-5)
  testing.assert_trees_close(metrics, want_metrics, mesh, 3e-5)


def test_groups_that_fill_several_chunks():
  """The policy is then read before the update too, and each chunk is a part of it."""
  params, metrics = update_group('one device', 2)
  want_params, want = update_group('one device', 0)
  assert metrics.pop('packed/padding_share') < 0.5 and 0.2 < metrics.pop('packed/shared_share')
  testing.assert_trees_close(params, want_params, 'packed', 3e-5)
  testing.assert_trees_close(metrics, want, 'packed', 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize('update', [update_ppo, update_group])
def test_what_differs_is_rounding(update, double_precision):
  """In float64 a whole step is the same to its rounding, with the updates of Adam."""
  params, metrics = update.__wrapped__('one device', 4)  # not what was computed in float32
  metrics = {name: value for name, value in metrics.items() if not name.startswith('packed/')}
  testing.assert_trees_close((params, metrics), update.__wrapped__('one device', 0), '', 1e-13)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float64')}


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


def answer_one_prompt(batch):
  """The same rankings, in which all responses of one answer the prompt of its first."""
  tokens, begins = batch.tokens.copy(), batch.begins.copy()
  inside = np.zeros(tokens.shape, bool)
  for row, place in np.argwhere(batch.group > 0):
    first = np.flatnonzero(batch.group[row] == batch.group[row, place])[0]
    begin, length = batch.begins[row, place], batch.segment_ids[row, place].sum()
    text = [
      *batch.tokens[row, first, : batch.begins[row, first]],
      *batch.tokens[row, place, begin:length],
    ]
    tokens[row, place] = np.pad(text, (0, P + R - len(text)))
    begins[row, place] = batch.begins[row, first]
    inside[row, place, : len(text)] = True
  return batch.replace(
    tokens=tokens,
    begins=begins,
    segment_ids=inside.astype(np.int32),
    positions=np.where(inside, np.arange(P + R), 0).astype(np.int32),
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


def rankings_gradient(packed_rows, batch):
  model, layout = testing.make_model(), testing.make_layout()

  @jax.jit
  def gradient(params, batch):
    parts, metrics = ranked_logprobs.pack_rankings(batch, model, layout, packed_rows)

    def loss(params, batch, key):
      return every_preference_loss(params, batch, model)

    gradients, more = steps.compute_gradients(loss, params, parts, jax.random.key(0))
    logprobs = ranked_logprobs.map_logprobs(model, layout, packed_rows, params, batch)
    return gradients, (more, logprobs), metrics

  return jax.device_get(gradient(testing.make_params(model), batch))


def assert_packed_rankings_agree(tolerance):
  """For every loss of the family, with soft labels, empty places and several chunks."""
  ragged = ragged_rankings()
  for batch, shared in ((ragged, 0.0), (answer_one_prompt(ragged), 0.1)):
    got, others, metrics = rankings_gradient(4, batch)
    want, others_wanted, _ = rankings_gradient(0, batch)
    error = optax.tree.norm(jax.tree.map(np.subtract, got, want)) / optax.tree.norm(want)
    assert error < tolerance
    testing.assert_trees_close(others, others_wanted, 'packed', tolerance)
    assert metrics['packed/shared_share'] >= shared
    assert metrics['packed/padding_share'] < 0.8  # of one chunk, which could hold more


def test_packed_rankings_have_the_gradients_of_padded_ones():
  assert_packed_rankings_agree(1e-6)


@pytest.mark.slow
def test_what_differs_of_the_gradients_is_rounding(double_precision):
  assert_packed_rankings_agree(1e-13)


REWARD_CHANGES = [
  {'likelihood_head': True},
  {'heads': 4, 'kv_heads': 2, 'windows': (4, 0)},
  {'windows': (3,), 'learned_positions': True, 'max_length': 96},
]


@pytest.mark.parametrize('changes', REWARD_CHANGES)
def test_a_reward_model_learns_the_same_from_packed_rankings(changes):
  config = dataclasses.replace(testing.MODEL_CONFIG, head=True, **changes)
  model, layout = transformer.build_model(config), testing.make_layout()
  params = testing.make_params(model)
  coefficient = 0.0
  if model.config.likelihood_head:
    params['score']['likelihood'] = jnp.array([0.3, 0.2])
    coefficient = 0.4
  options = reward.Options(
    likelihood=model.config.likelihood_head, language_model_coefficient=coefficient
  )

  @functools.partial(jax.jit, static_argnums=1)
  def gradient(batch, packed_rows):
    parts, metrics = ranked_logprobs.pack_rankings(batch, model, layout, packed_rows)

    def loss(params, batch, key):
      return reward.loss(params, batch, model, options)

    gradients, more = steps.compute_gradients(loss, params, parts, jax.random.key(0))
    score = reward.build_batch_score(model, layout, packed_rows)
    scores = jnp.where(batch.group > 0, score(params, batch), 0.0)
    return gradients, more | {'scores': scores}, metrics

  batch = answer_one_prompt(ragged_rankings())
  got, more, metrics = gradient(batch, 4)
  want, want_more, _ = gradient(batch, 0)
  error = optax.tree.norm(jax.tree.map(jnp.subtract, got, want))
  assert error <= 1e-6 * optax.tree.norm(want)
  testing.assert_trees_close(more, want_more, 'packed', 2e-6)
  assert metrics['packed/shared_share'] > 0.1


def test_only_equal_prompts_are_shared():
  """Texts that agree for a while and then differ are not, nor are prompts of other lengths."""
  tokens = np.array([[5, 6, 7, 8], [5, 6, 7, 9], [5, 7, 7, 8], [5, 6, 7, 9]])
  answered = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
  rows = Sequences(tokens, np.arange(4) + 0 * tokens, np.ones((4, 4), int), answered)
  sharing = packing.share_prompts(rows, 4, [testing.make_model()], testing.make_layout())
  assert sharing.prompts.tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize(
  'changes',
  [
    {'numerics': 'exact'},
    {'attention': 'splash'},
    {'learned_positions': True, 'max_length': P + R},
  ],
)
def test_models_that_cannot_share_prompts(changes):
  model = transformer.build_model(dataclasses.replace(testing.MODEL_CONFIG, **changes))
  sharing = packing.plan_sharing(np.zeros(8, int), P + R, 4, [model], testing.make_layout(), R)
  assert sharing is None


def test_groups_need_no_more_rows_than_are_planned():
  """Whole groups of the longest responses, among shorter ones, in as many rows as they fill."""
  K, longest, count = 6, 14, 5
  rng = np.random.default_rng(0)
  asked = np.repeat(rng.integers(1, P + 1, count), K)
  said = np.where(rng.random(count * K) < 0.7, longest, rng.integers(1, longest, count * K))
  lengths = jnp.asarray(asked + said, jnp.int32)[:, None]
  prompts = jnp.asarray(np.repeat(np.arange(count), K), jnp.int32)
  model, layout = testing.make_model(), testing.make_layout()
  sharing = packing.plan_sharing(prompts, P + R, K, [model], layout, longest, complete=True)
  chunks = packing.most_chunks(count * K, 1, 2, P + R, sharing)
  packed = packing.pack(
    lengths, sharing.width, 2, prompts[:, None], jnp.asarray(asked)[:, None] - 1, chunks
  )
  rows = np.asarray(packed.rows)
  assert sorted(rows[rows < count * K]) == list(range(count * K))
  filled = np.zeros((chunks, 2, sharing.width), int)
  for chunk, row, slot in np.argwhere(rows < count * K):
    number = rows[chunk, row, slot]
    start = packed.starts[chunk, row, slot]
    filled[chunk, row, start : start + said[number] + 1] += 1
    prefix = packed.prefixes[chunk, row, slot]
    filled[chunk, row, prefix : prefix + asked[number] - 1] = 1
    assert start + said[number] + 1 <= sharing.width and prefix + asked[number] - 1 <= start
  assert filled.max() == 1 and filled.sum() == packed.places


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
