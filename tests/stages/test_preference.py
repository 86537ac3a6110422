import dataclasses
import functools

import jax
import ml_collections
import numpy as np
import pytest

from rlhf_jax.data import records, tinyworld
from rlhf_jax.data.tinyworld import vocabulary
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import preference, reward
from rlhf_jax.types import Rankings

B, K, T = 8, 4, 14


def rankings(seed=0):
  """Rows of two prompts, of three and of four responses, with ties and empty places; prompts of 1 to 5 tokens."""
  rng = np.random.default_rng(seed)
  group = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]] * (B // 4), np.int32)
  asked = rng.integers(2, 64, (B, 3, 5)).astype(np.int32)
  asked_length = rng.integers(1, 6, (B, 3))
  begins = np.take_along_axis(asked_length, group, 1) * (group > 0)
  lengths = (begins + rng.integers(1, T - 5, (B, K))) * (group > 0)
  tokens = rng.integers(2, 64, (B, K, T)).astype(np.int32)
  places = np.arange(T)
  prompt = np.pad(asked, ((0, 0), (0, 0), (0, T - 5)))[np.arange(B)[:, None], group]
  tokens = np.where(places < begins[..., None], prompt, tokens)
  inside = places < lengths[..., None]
  return Rankings(
      tokens=np.where(inside, tokens, 0), positions=np.where(inside, places, 0).astype(np.int32),
      segment_ids=inside.astype(np.int32), group=group, ranks=rng.integers(1, 4, (B, K)).astype(np.int32),
      index=np.where(group > 0, 0, -1).astype(np.int32), begins=begins.astype(np.int32),
      confidence=np.ones((B, K), np.float32), reference_logprobs=rng.normal(-20, 3, (B, K)).astype(np.float32))


def settings(**changes):
  section = ml_collections.ConfigDict({**preference.DEFAULTS, 'beta': 0.3, **changes})
  section.optimizer.update(learning_rate=1e-2, schedule='constant', warmup_steps=0, eps=1e-5)  # not all noise
  return section


@functools.cache
def build(tiny, mesh, parts, **changes):
  on, section = tiny.layout(mesh), settings(**changes)
  model, optimizer = tiny.model(on), steps.make_optimizer(section.optimizer, 10)
  init = lambda: steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  return on, init, steps.build(preference.build_loss(model, section), optimizer, on, parts)


def train(tiny, batch, mesh='one device', parts=1, count=1, **changes):
  on, init, step = build(tiny, mesh, parts, **changes)
  state, found = init(), []
  for _ in range(count):
    state, metrics = step(state, on.place(batch))
    found.append(jax.device_get(metrics))
  return jax.device_get(state.params), found


@pytest.fixture(scope='module')
def first(tiny):
  return train(tiny, rankings())


def test_logprobs_of_responses_by_hand(tiny):
  on, batch = tiny.layout(), rankings()
  model = tiny.model(on)
  params = tiny.params(model, on)
  sums, lengths = preference.response_logprobs(model, params, on.place(batch))
  for b, k in ((0, 0), (1, 2), (2, 3), (1, 3)):
    begin, end = int(batch.begins[b, k]), int(batch.segment_ids[b, k].sum())
    text = batch.tokens[b, k, None, :max(end, 1)]
    hidden, _ = model.apply(params, text, np.arange(text.shape[1])[None], np.ones(text.shape, np.int32))
    logprobs = np.asarray(jax.nn.log_softmax(heads.next_token_logits(model, params, hidden)))[0]
    want = sum(logprobs[t - 1, text[0, t]] for t in range(begin, end)) if end else 0.0
    np.testing.assert_allclose(sums[b, k], want, rtol=1e-5, atol=1e-5)
    assert lengths[b, k] == max(end - begin, 1)


def test_dpo_begins_at_log_2_and_learns_the_order(tiny):
  on, batch = tiny.layout(), rankings()
  model = tiny.model(on)
  own, _ = preference.response_logprobs(model, tiny.params(model, on), on.place(batch))
  _, found = train(tiny, batch.replace(reference_logprobs=np.asarray(own)), count=25)
  np.testing.assert_allclose([found[0]['loss'], found[0]['margin'], found[0]['accuracy']], [np.log(2), 0, 0.5], atol=2e-5)
  assert found[-1]['loss'] < 0.1 and found[-1]['accuracy'] == 1 and found[-1]['margin'] > 1


@pytest.mark.parametrize('loss', [loss for loss in preference.LOSSES if loss != 'kto'])
def test_every_loss_falls(tiny, loss):
  _, found = train(tiny, rankings(), loss=loss, count=12)
  assert found[-1]['loss'] < found[0]['loss'] - 1e-3 and found[-1]['accuracy'] > found[0]['accuracy']


@pytest.mark.parametrize('mesh', ['data 2, context 4', 'data 2, fsdp 2, tensor 2'])
def test_same_numbers_on_every_mesh(tiny, first, mesh):
  tiny.close(train(tiny, rankings(), mesh), first, mesh)


def test_microbatches_padding_and_order_change_nothing(tiny, first):
  batch, rng = rankings(), np.random.default_rng(1)
  tiny.close(train(tiny, batch, parts=4), first, 'micro-batches')
  rows, places = rng.permutation(B), rng.permutation(K)
  tiny.close(train(tiny, jax.tree.map(lambda x: x[rows], batch)), first, 'order of rows')
  tiny.close(train(tiny, jax.tree.map(lambda x: x[:, places], batch)), first, 'order of places')
  wide = jax.tree.map(lambda x: x if x.ndim == 2 else np.pad(x, ((0, 0), (0, 0), (0, 7))), batch)
  tiny.close(train(tiny, wide), first, 'more padding')


def test_doubtful_labels_count_as_smoothing(tiny):
  batch = rankings()
  sure, _ = train(tiny, batch, label_smoothing=0.2)
  doubtful, _ = train(tiny, batch.replace(confidence=np.full((B, K), 0.8, np.float32)))
  tiny.close(doubtful, sure, 'confidence', 1e-4)


def test_two_responses_are_one_pair_whatever_the_loss_of_rankings(tiny):
  batch = rankings()
  pairs = jax.tree.map(lambda x: x[[0, 3, 4, 7]], batch)
  tiny.close(train(tiny, pairs, loss='plackett_luce')[0], train(tiny, pairs)[0], 'Plackett–Luce of two')


def test_kto_pairs_prompts_with_responses_to_others():
  batch = rankings()
  other = jax.device_get(preference.mismatched(batch))
  flat = lambda x: x.reshape(B * K, -1)
  for n in range(B * K):
    m = (n + K) % (B * K)  # the next row
    begin, there = flat(batch.begins)[n, 0], flat(batch.group)[[n, m]].all()
    response = flat(batch.tokens)[m, flat(batch.begins)[m, 0]:flat(batch.segment_ids)[m].sum()]
    want = np.r_[flat(batch.tokens)[n, :begin], response][:T] if there else []
    assert flat(other.segment_ids)[n].sum() == len(want)
    np.testing.assert_array_equal(flat(other.tokens)[n, :len(want)], want)


def test_kto_learns(tiny):
  on, section = tiny.layout(), settings(loss='kto', beta=1.0)
  model, optimizer = tiny.model(on), steps.make_optimizer(section.optimizer, 10)
  state = steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  reference = tiny.params(model, on)
  batch = on.place(rankings())
  batch = batch.replace(reference_logprobs=preference.response_logprobs(model, reference, batch)[0])
  step = steps.build(preference.build_loss(model, section), optimizer, on, 1)
  anchor, found = jax.jit(preference.build_anchor(model, model)), []
  for _ in range(12):
    z = anchor(state.params, reference, batch)
    assert z.shape == () and z >= 0
    state, metrics = step(state, batch, z)
    found.append(jax.device_get(metrics))
  assert abs(found[0]['loss'] - 0.5) < 1e-5 and found[-1]['loss'] < 0.2 and found[-1]['accuracy'] > 0.9


def test_kto_of_single_responses_is_that_of_pairs(tiny):
  on, section = tiny.layout(), settings(loss='kto')
  model = tiny.model(on)
  params, loss = tiny.params(model, on), preference.build_loss(model, section)
  pairs = rankings().replace(group=np.tile([1, 1, 2, 2], (B, 1)).astype(np.int32), ranks=np.tile([1, 2, 3, 1], (B, 1)))
  alone = pairs.replace(group=np.tile([1, 2, 3, 4], (B, 1)).astype(np.int32))
  of = lambda batch: jax.value_and_grad(lambda params: loss(params, batch, None, 0.1).total)(params)
  tiny.close(of(alone), of(pairs), 'single')
  found = loss(params, alone, None, 0.1)
  assert found.weight == 4 * B and found.means['logprob/best'][1] == 2 * B and found.means['accuracy'] == (0, 0)


def test_single_responses_are_for_kto_only(context, tmp_path):
  rows = [dict(id=str(n), messages=[dict(role='user', content='Why?')], response=f'Because {n}.', desirable=n % 2 == 0)
          for n in range(9)]
  for split in ('train', 'validation'):
    records.write_records(tmp_path / f'{split}.jsonl', rows)
  assert [row.ranks for row in records.read_records(tmp_path / 'train.jsonl', 'ranking')] == [[1], [2]] * 4 + [[1]]
  data = [f'dpo.data.path=("{tmp_path}/{{split}}.jsonl",)', 'dpo.reference=random']
  with pytest.raises(UserError, match='config.dpo.loss: dpo compares responses, but some prompts have one only'):
    preference.build(context('dpo', *data, experiment='dpo'))
  stage = preference.build(context('dpo', *data, 'dpo.loss=kto', experiment='dpo'))
  state, found = stage.init(), []
  for _ in range(3):
    state, metrics = stage.step(state, next(iter(stage.batches)))
    found.append(float(metrics['loss']))
  assert found[0] == pytest.approx(0.5, abs=1e-5) and found[-1] < found[0]
  values, _ = stage.evaluate(state)
  assert np.isfinite(list(values.values())).all()
  with pytest.raises(UserError, match='config.reward.data: a reward model learns from responses that are compared'):
    reward.build(context('reward', 'reward.data.source=jsonl', data[0].replace('dpo', 'reward')))


@pytest.mark.parametrize('changes,message', [
    (dict(loss='dop'), "config.dpo.loss: expected one of dpo, robust, .*, got 'dop'"),
    (dict(beta=0.0), 'config.dpo: expected beta above 0'),
    (dict(label_smoothing=0.5), 'smoothing in'),
    (dict(reference=''), 'config.dpo.reference: dpo needs one; without: cpo, simpo, orpo')])
def test_wrong_settings(changes, message):
  with pytest.raises(UserError, match=message):
    preference.check(settings(**changes), 'config.dpo')


def test_reference_logprobs_of_another_model_or_other_data_are_refused(tmp_path):
  example = lambda n: {'tokens': np.full((2, 3), n, np.int32), 'begins': np.ones(2, np.int32),
                       'lengths': np.full(2, 3, np.int32), 'ranks': np.array([1, 2])}
  examples, path = [example(3), example(4)], tmp_path / 'reference.npz'
  batch = rankings().replace(group=np.array([[1, 1, 2, 2]], np.int32))
  preference.add_reference(examples, path, 'a', lambda _: [(batch, np.array([[-1.0, -2.0, -3.0, -4.0]]))])
  again = [example(3), example(4)]
  preference.add_reference(again, path, 'a', None)  # nothing is computed
  assert [e['reference_logprobs'].tolist() for e in again] == [[-1.0, -2.0], [-3.0, -4.0]]
  with pytest.raises(UserError, match='reference.npz: computed with another reference; delete it'):
    preference.add_reference(again, path, 'b', None)
  with pytest.raises(UserError, match='computed for other data or with another tokenizer'):
    preference.add_reference([example(3), example(5)], path, 'a', None)


def test_a_stage_of_another_reference_or_tokenizer_does_not_begin(context, tmp_path):
  rows = [dict(messages=[dict(role='user', content='Why is the sky blue?')], chosen=f'Because of the light {n}.',
               rejected='Who cares?') for n in range(5)]
  for split in ('train', 'validation'):
    records.write_records(tmp_path / f'{split}.jsonl', rows)
  make = lambda *overrides: context('dpo', f'dpo.data.path=("{tmp_path}/{{split}}.jsonl",)', 'dpo.reference=random',
                                    *overrides, experiment='dpo')
  preference.build(make())
  before = (tmp_path / 'dpo/reference-train.npz').stat().st_mtime_ns
  preference.build(make())  # the same: what is stored is read
  assert (tmp_path / 'dpo/reference-train.npz').stat().st_mtime_ns == before
  with pytest.raises(UserError, match='reference-train.npz: computed with another reference'):
    preference.build(make('seed=7'))
  texts = (row.text for row in tinyworld.records('document', 'train', count=80))
  other = Tokenizer(vocabulary.train_tokenizer(texts, 384), vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')
  with pytest.raises(UserError, match='reference-train.npz: computed for other data or with another tokenizer'):
    preference.build(dataclasses.replace(make(), tokenizer=other))
