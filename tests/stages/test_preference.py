import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import records, tinyworld
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads
from rlhf_jax.objectives.preference import PREFERENCE_LOSSES
from rlhf_jax.report import kept_responses
from rlhf_jax.stages import preference, reward
from rlhf_jax.stages.shared import ranked_logprobs, training
from rlhf_jax.types import Rankings

B, K, T = 8, 4, 14


def rankings(seed=0):
  """Rows of two prompts, of three and of four responses, with ties and empty places."""
  rng = np.random.default_rng(seed)
  group = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]] * (B // 4), np.int32)
  asked = rng.integers(2, 64, (B, 3, 5)).astype(np.int32)  # prompts of 1 to 5 tokens
  asked_length = rng.integers(1, 6, (B, 3))
  begins = np.take_along_axis(asked_length, group, 1) * (group > 0)
  lengths = (begins + rng.integers(1, T - 5, (B, K))) * (group > 0)
  tokens = rng.integers(2, 64, (B, K, T)).astype(np.int32)
  places = np.arange(T)
  prompt = np.pad(asked, ((0, 0), (0, 0), (0, T - 5)))[np.arange(B)[:, None], group]
  tokens = np.where(places < begins[..., None], prompt, tokens)
  inside = places < lengths[..., None]
  return Rankings(
    tokens=np.where(inside, tokens, 0),
    positions=np.where(inside, places, 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=group,
    ranks=rng.integers(1, 4, (B, K)).astype(np.int32),
    index=np.where(group > 0, 0, -1).astype(np.int32),
    begins=begins.astype(np.int32),
    confidence=np.ones((B, K), np.float32),
    reference_logprobs=rng.normal(-20, 3, (B, K)).astype(np.float32),
  )


def make_options(loss='dpo', microbatches=1, reference='sft', **settings):
  made = PREFERENCE_LOSSES[loss].settings_class(**{'beta': 0.3, **settings})
  return preference.Options(
    loss=loss, microbatches=microbatches, reference=reference, settings=made
  )


@functools.cache
def compiled(mesh, parts, **changes):
  definitions = testing.make_definitions(testing.make_layout(mesh))
  options = make_options(microbatches=parts, **changes)
  return definitions, training.compile_train_step(preference.train_step, definitions, options)


def train(batch, mesh='one device', parts=1, count=1, **changes):
  definitions, step = compiled(mesh, parts, **changes)
  state = testing.make_state(definitions)
  history = []
  for _ in range(count):
    state, metrics = step(state, definitions.layout.place(batch))
    history.append(jax.device_get(metrics))
  return jax.device_get(state.params), history


@pytest.fixture(scope='module')
def first():
  return train(rankings())


def test_logprobs_of_responses_by_hand():
  batch = rankings()
  model = testing.make_model()
  params = testing.make_params(model)
  sums, lengths = ranked_logprobs.response_logprobs(model, params, batch)
  for b, k in ((0, 0), (1, 2), (2, 3), (1, 3)):
    begin = int(batch.begins[b, k])
    end = int(batch.segment_ids[b, k].sum())
    text = batch.tokens[b, k, None, : max(end, 1)]
    positions = np.arange(text.shape[1])[None]
    hidden, _ = model.apply(params, text, positions, np.ones(text.shape, np.int32))
    logits = heads.next_token_logits(model, params, hidden)
    logprobs = np.asarray(jax.nn.log_softmax(logits))[0]
    want = sum(logprobs[t - 1, text[0, t]] for t in range(begin, end)) if end else 0.0
    np.testing.assert_allclose(sums[b, k], want, rtol=1e-5, atol=1e-5)
    assert lengths[b, k] == max(end - begin, 1)


def test_dpo_begins_at_log_2_and_learns_the_order():
  batch = rankings()
  model = testing.make_model()
  own = ranked_logprobs.response_logprobs(model, testing.make_params(model), batch)
  _, history = train(batch.replace(reference_logprobs=np.asarray(own.sums)), count=25)
  begin = history[0]
  end = history[-1]
  # the accuracy at margins of 0 is up to rounding
  got = [begin['loss'], begin['margin']]
  np.testing.assert_allclose(got, [np.log(2), 0], atol=2e-5)
  assert end['loss'] < 0.1 and end['accuracy'] == 1 and end['margin'] > 1


def every_loss():
  """All losses of rankings, of which the others than DPO and SimPO are slow tests."""
  for loss in PREFERENCE_LOSSES:
    if loss != 'kto':
      is_quick = loss in ('dpo', 'simpo')
      yield pytest.param(loss, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize('loss', every_loss())
def test_every_loss_falls(loss):
  _, history = train(rankings(), loss=loss, count=12)
  assert history[-1]['loss'] < history[0]['loss'] - 1e-3
  assert history[-1]['accuracy'] > history[0]['accuracy']


@pytest.mark.parametrize('mesh', ['data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(first, mesh):
  testing.assert_trees_close(train(rankings(), mesh), first, mesh)


def test_microbatches_padding_and_order_change_nothing(first):
  batch = rankings()
  rng = np.random.default_rng(1)
  rows = rng.permutation(B)
  places = rng.permutation(K)

  def widen(x):
    return x if x.ndim == 2 else np.pad(x, ((0, 0), (0, 0), (0, 7)))

  changed = {
    'order of rows': jax.tree.map(lambda x: x[rows], batch),
    'order of places': jax.tree.map(lambda x: x[:, places], batch),
    'more padding': jax.tree.map(widen, batch),
  }
  testing.assert_trees_close(train(batch, parts=4), first, 'micro-batches')
  for name, other in changed.items():
    testing.assert_trees_close(train(other), first, name)


def test_doubtful_labels_count_as_smoothing():
  batch = rankings()
  sure, _ = train(batch, label_smoothing=0.2)
  doubtful, _ = train(batch.replace(confidence=np.full((B, K), 0.8, np.float32)))
  testing.assert_trees_close(doubtful, sure, 'confidence', 1e-4)


def test_two_responses_are_one_pair_whatever_the_loss_of_rankings():
  pairs = jax.tree.map(lambda x: x[[0, 3, 4, 7]], rankings())
  of_orders = train(pairs, loss='plackett_luce')[0]
  testing.assert_trees_close(of_orders, train(pairs)[0], 'Plackett–Luce of two')


def test_kto_pairs_prompts_with_responses_to_others():
  batch = rankings()
  other = jax.device_get(preference.mismatched(batch))

  def rows(x):
    return x.reshape(B * K, -1)

  for n in range(B * K):
    m = (n + K) % (B * K)  # the next row
    begin = rows(batch.begins)[n, 0]
    end = rows(batch.segment_ids)[m].sum()
    response = rows(batch.tokens)[m, rows(batch.begins)[m, 0] : end]
    present = rows(batch.group)[[n, m]].all()
    want = np.r_[rows(batch.tokens)[n, :begin], response][:T] if present else []
    assert rows(other.segment_ids)[n].sum() == len(want)
    np.testing.assert_array_equal(rows(other.tokens)[n, : len(want)], want)


def test_kto_learns():
  definitions, step = compiled('one device', 1, loss='kto', beta=1.0)
  model = definitions.model
  state = testing.make_state(definitions)
  reference = testing.make_params(model)
  batch = definitions.layout.place(rankings())
  of_reference = ranked_logprobs.response_logprobs(model, reference, batch)
  batch = batch.replace(reference_logprobs=of_reference.sums)
  anchor = jax.jit(
    functools.partial(
      preference.estimate_anchor,
      definitions=definitions,
      reference_model=model,
      options=make_options('kto'),
    )
  )
  history = []
  for _ in range(12):
    z = anchor(state.params, reference, batch)
    assert z.shape == () and z >= 0
    state, metrics = step(state, batch, z)
    history.append(jax.device_get(metrics))
  assert abs(history[0]['loss'] - 0.5) < 1e-5
  assert history[-1]['loss'] < 0.2 and history[-1]['accuracy'] > 0.9
  # z is the mean of log π − log π_ref over the other responses, and never negative.
  other = preference.mismatched(batch)
  sums = jax.jit(functools.partial(ranked_logprobs.response_logprobs, model))
  difference = sums(state.params, other).sums - sums(reference, other).sums
  mean = np.mean(difference[other.segment_ids.any(-1)])
  assert abs(mean) > 0.01
  z, opposite = anchor(state.params, reference, batch), anchor(reference, state.params, batch)
  np.testing.assert_allclose((z, opposite), (max(mean, 0), max(-mean, 0)), rtol=1e-3)


def test_a_live_reference_reads_every_batch():
  layout = testing.make_layout()
  model = testing.make_model(layout)
  params = testing.make_params(model, layout)
  options = preference.Options(reference_logprobs='live')
  logprobs = preference.build_logprobs(model, layout, options)
  reference = preference.Reference(model, params, logprobs)
  batch = rankings()
  expected = ranked_logprobs.response_logprobs(model, params, layout.place(batch)).sums
  live = preference._prepare(batch, layout, reference, options).reference_logprobs
  testing.assert_trees_close(live, expected, 'live')
  assert np.abs(expected).max() > 1
  stored = preference._prepare(batch, layout, reference, preference.Options())
  np.testing.assert_array_equal(stored.reference_logprobs, batch.reference_logprobs)


def test_kto_of_single_responses_is_that_of_pairs():
  model = testing.make_model()
  params = testing.make_params(model)
  options = make_options('kto')
  pairs = rankings().replace(
    group=np.tile([1, 1, 2, 2], (B, 1)).astype(np.int32), ranks=np.tile([1, 2, 3, 1], (B, 1))
  )
  alone = pairs.replace(group=np.tile([1, 2, 3, 4], (B, 1)).astype(np.int32))
  anchor = np.float32(0.1)

  def total(params, batch):
    return preference.loss(params, batch, anchor, model, options).total

  gradient = jax.jit(jax.value_and_grad(total))
  testing.assert_trees_close(gradient(params, alone), gradient(params, pairs), 'single')
  value = preference.loss(params, alone, anchor, model, options)
  assert value.weight == 4 * B and value.means['logprob/best'][1] == 2 * B
  assert value.means['accuracy'] == (0, 0)


def build(made, module=preference):
  return module.build(made, made.read_options(module.STAGE))


def test_single_responses_are_for_kto_only(context, tmp_path):
  rows = [
    dict(
      id=str(n),
      messages=[dict(role='user', content='Why?')],
      response=f'Because {n}.',
      desirable=n % 2 == 0,
    )
    for n in range(9)
  ]
  for split in ('train', 'validation'):
    records.write_records(tmp_path / f'{split}.jsonl', rows)
  read = records.read_records(tmp_path / 'train.jsonl', 'ranking')
  assert [row.ranks for row in read] == [[1], [2]] * 4 + [[1]]
  data = [f'dpo.data.path=("{tmp_path}/{{split}}.jsonl",)', 'dpo.reference=random']
  message = 'config.dpo.loss: dpo compares responses, but some prompts have one only'
  with pytest.raises(UserError, match=message):
    build(context('dpo', *data, experiment='dpo'))
  stage = build(context('dpo', *data, 'dpo.loss=kto', experiment='dpo'))
  state = stage.init()
  losses = []
  for _ in range(3):
    state, metrics = stage.step(state, next(iter(stage.batches)))
    losses.append(float(metrics['loss']))
  assert losses[0] == pytest.approx(0.5, abs=1e-5) and losses[-1] < losses[0]
  values, _ = stage.evaluate(state)
  assert np.isfinite(list(values.values())).all()
  kept = kept_responses.read(tmp_path)
  assert [row.prompt for row in kept] == ['Why?'] * 4 and kept[0].prompt_id == '0'
  assert all(row.kl is not None and row.kl != 0 for row in kept)  # three updates from the reference
  made = context('reward', 'reward.data.source=jsonl', data[0].replace('dpo', 'reward'))
  message = 'config.reward.data: a reward model learns from responses that are compared'
  with pytest.raises(UserError, match=message):
    build(made, reward)


def test_rankings_that_are_all_ties_are_refused():
  tied = {'ranks': np.array([2, 2])}
  for ordered in ({'ranks': np.array([2, 1])}, {'ranks': np.array([1])}):
    preference.check_order([tied, ordered], 'config.dpo.data: train')
  with pytest.raises(UserError, match='config.dpo.data: train: all responses are ties'):
    preference.check_order([tied, tied], 'config.dpo.data: train')


@pytest.mark.parametrize(
  'options,message',
  [
    (
      preference.Options(loss='dop'),
      "config.dpo.loss: expected one of dpo, robust, .*, got 'dop'",
    ),
    (make_options(beta=0.0), 'config.dpo.beta: expected .*above 0'),
    (make_options(label_smoothing=0.5), 'label_smoothing: expected'),
    (make_options(reference=''), 'config.dpo.reference: dpo needs one; without: cpo, simpo'),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(UserError, match=message):
    preference.check_options(options, 'config.dpo')


def test_reference_logprobs_of_another_model_or_other_data_are_refused(tmp_path):
  def example(n):
    return {
      'tokens': np.full((2, 3), n, np.int32),
      'begins': np.ones(2, np.int32),
      'lengths': np.full(2, 3, np.int32),
      'ranks': np.array([1, 2]),
    }

  path = tmp_path / 'reference.npz'
  batch = rankings().replace(group=np.array([[1, 1, 2, 2]], np.int32))
  values = np.array([[-1.0, -2.0, -3.0, -4.0]])
  preference.add_reference([example(3), example(4)], path, 'a', lambda _: [(batch, values)])
  again = [example(3), example(4)]
  preference.add_reference(again, path, 'a', None)  # nothing is computed
  read = [row['reference_logprobs'].tolist() for row in again]
  assert read == [[-1.0, -2.0], [-3.0, -4.0]]
  message = 'reference.npz: computed with another reference; delete it'
  with pytest.raises(UserError, match=message):
    preference.add_reference(again, path, 'b', None)
  with pytest.raises(UserError, match='computed for other data or with another tokenizer'):
    preference.add_reference([example(3), example(5)], path, 'a', None)


def test_a_stage_of_another_reference_or_tokenizer_does_not_begin(context, tmp_path):
  rows = [
    dict(
      messages=[dict(role='user', content='Why is the sky blue?')],
      chosen=f'Because of the light {n}.',
      rejected='Who cares?',
    )
    for n in range(5)
  ]
  for split in ('train', 'validation'):
    records.write_records(tmp_path / f'{split}.jsonl', rows)

  def make(*overrides):
    data = f'dpo.data.path=("{tmp_path}/{{split}}.jsonl",)'
    return context('dpo', data, 'dpo.reference=random', *overrides, experiment='dpo')

  build(make())
  stored = tmp_path / 'dpo/reference-train.npz'
  before = stored.stat().st_mtime_ns
  build(make())  # the same: what is stored is read
  assert stored.stat().st_mtime_ns == before
  with pytest.raises(UserError, match='reference-train.npz: computed with another reference'):
    build(make('seed=7'))
  texts = (row.text for row in tinyworld.records('document', 'train', count=80))
  core = vocabulary.train_tokenizer(texts, 384)
  other = Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')
  message = 'reference-train.npz: computed for other data or with another tokenizer'
  with pytest.raises(UserError, match=message):
    build(dataclasses.replace(make(), tokenizer=other))
