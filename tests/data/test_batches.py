import collections
import itertools
import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError

LENGTHS = np.random.default_rng(0).integers(2, 12, 20)
TEXTS = [
  {'tokens': np.full(n, i + 1, np.int32), 'targets': np.r_[0, np.ones(n - 1)].astype(np.float32)}
  for i, n in enumerate(LENGTHS)
]
RANKED = [
  {
    'tokens': np.full((k, 5), i, np.int32),
    'lengths': np.full(k, 3, np.int32),
    'ranks': np.arange(1, k + 1, dtype=np.int32),
    'index': np.full(k, i, np.int32),
    'begins': np.ones(k, np.int32),
    'confidence': np.ones(k, np.float32),
  }
  for i, k in enumerate(np.random.default_rng(1).integers(2, 6, 15))
]
ASKED = [
  {'tokens': np.full(4, i, np.int32), 'mask': np.ones(4, bool), 'index': np.int32(i)}
  for i in range(10)
]

MAKERS = {
  'packed': lambda **k: batches.sequences(TEXTS, 4, 16, 7, **k),
  'plain': lambda **k: batches.sequences(TEXTS, 4, 16, 7, pack=False, **k),
  'rankings': lambda **k: batches.rankings(RANKED, 2, 6, 5, 7, **k),
  'prompts': lambda **k: batches.prompts(ASKED, 4, 7, **k),
  'together': lambda **k: batches.ZippedBatches(
    batches.prompts(ASKED, 4, 7, **k), None, batches.sequences(TEXTS, 4, 16, 7)
  ),
}


@pytest.mark.parametrize('name', MAKERS)
def test_resume_is_exact_everywhere(name):
  alone = MAKERS[name]()
  states, seen = [], []
  for _ in range(14):  # over two epochs
    states.append(json.dumps(alone.get_state()))
    seen.append(next(alone))
  for start in range(14):
    resumed = MAKERS[name]()
    resumed.set_state(json.loads(states[start]))
    for want in seen[start : start + 3]:
      jax.tree.map(np.testing.assert_array_equal, next(resumed), want)


def test_the_order_is_that_of_the_seed():
  orders = [next(batches.prompts(ASKED, 10, seed)).index.tolist() for seed in (7, 7, 8)]
  assert orders[0] == orders[1] != orders[2]


def segments(batch):
  for tokens, positions, ids, mask in zip(
    batch.tokens, batch.positions, batch.segment_ids, batch.loss_mask
  ):
    for segment in set(ids.tolist()) - {0}:
      inside = ids == segment
      yield tokens[inside], positions[inside], mask[inside]


@pytest.mark.parametrize('name', ['packed', 'plain'])
def test_examples_stay_whole_and_none_is_lost(name):
  seen, iterator = collections.Counter(), MAKERS[name]()
  while sum(seen.values()) < 100:
    for tokens, positions, mask in segments(next(iterator)):
      [number] = set(tokens.tolist())
      assert len(tokens) == LENGTHS[number - 1] and positions.tolist() == list(range(len(tokens)))
      assert mask[0] == 0 and mask[1:].all()
      seen[number] += 1
  # every epoch holds each once
  assert len(seen) == 20 and max(seen.values()) - min(seen.values()) <= 2


def test_a_batch_may_be_larger_than_the_data_set():
  few = batches.prompts(ASKED[:3], 8, 0)
  seen = next(few).index.tolist() + next(few).index.tolist()
  last = next(batches.prompts(ASKED[:3], 16, 0)).index[15]  # the first of the sixth epoch
  assert sorted(seen) == sorted([0, 1, 2] * 5 + [last])
  packed = next(batches.sequences(TEXTS[:2], 4, 16, 0))
  assert {int(tokens[0]) for tokens, _, _ in segments(packed)} == {1, 2}


def types(batch):
  return {name: str(array.dtype) for name, array in vars(batch).items()}


@pytest.mark.parametrize('name', ['packed', 'plain'])
def test_sequences_are_of_the_documented_types_and_shapes(name):
  batch = next(MAKERS[name]())
  assert types(batch) == {
    'tokens': 'int32',
    'positions': 'int32',
    'segment_ids': 'int32',
    'loss_mask': 'float32',
  }
  assert {array.shape for array in vars(batch).values()} == {(4, 16)}


@pytest.mark.parametrize('source', ['endless', 'once'])
def test_rankings_are_of_the_documented_types_and_shapes(source):
  if source == 'endless':
    batch = next(MAKERS['rankings']())
  else:
    batch = next(batches.rankings_once(RANKED, 2, 6, 5))
  in_three = ('tokens', 'positions', 'segment_ids')
  real = ('confidence', 'reference_logprobs')
  for name, array in vars(batch).items():
    assert array.shape == ((2, 6, 5) if name in in_three else (2, 6)), name
    assert array.dtype == ('float32' if name in real else 'int32'), name


def test_prompts_are_of_the_documented_types():
  batch = next(MAKERS['prompts']())
  assert types(batch) == {'tokens': 'int32', 'mask': 'bool', 'index': 'int32'}


def test_epochs_are_shuffled_differently():
  iterator = batches.prompts(ASKED, 10, 0)
  first = next(iterator).index.tolist()
  second = next(iterator).index.tolist()
  assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize('source', ['endless', 'once'])
def test_rankings_are_never_split(source):
  if source == 'endless':
    iterator = itertools.islice(MAKERS['rankings'](), 12)
  else:
    iterator = batches.rankings_once(RANKED, 2, 6, 5)
  seen = collections.Counter()
  for batch in iterator:
    assert batch.tokens.shape == (2, 6, 5)
    for group, index, ranks, inside in zip(
      batch.group, batch.index, batch.ranks, batch.segment_ids
    ):
      for g in set(group.tolist()) - {0}:
        [number] = set(index[group == g].tolist())
        assert ranks[group == g].tolist() == RANKED[number]['ranks'].tolist()
        assert inside[group == g].sum(-1).tolist() == [3] * len(RANKED[number]['ranks'])
        seen[number] += 1
      assert (inside[group == 0] == 0).all() and (index[group == 0] == -1).all()
  assert source == 'endless' or seen == dict.fromkeys(range(15), 1)


@pytest.mark.parametrize('source', ['endless', 'once'])
def test_logprobs_of_the_reference_stay_with_their_responses(source):
  examples = []
  for example in RANKED:
    logprobs = example['index'] + example['ranks'] / 8
    examples.append({**example, 'reference_logprobs': logprobs.astype(np.float32)})
  if source == 'endless':
    iterator = itertools.islice(batches.rankings(examples, 2, 6, 5, 7), 3)
  else:
    iterator = batches.rankings_once(examples, 2, 6, 5)
  for batch in iterator:
    expected = np.where(batch.group > 0, batch.index + batch.ranks / 8, 0)
    np.testing.assert_array_equal(batch.reference_logprobs, expected)


def test_once_gives_everything_once_in_order():
  texts = [
    tokens[0] for batch in batches.sequences_once(TEXTS, 8, 16) for tokens, _, _ in segments(batch)
  ]
  assert texts == list(range(1, 21))
  asked = list(batches.prompts_once(ASKED, 4))
  assert [batch.index.tolist() for batch in asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
  assert all(batch.mask.any(axis=1).all() for batch in asked)


def test_the_last_batch_of_once_is_filled():
  *_, last = batches.sequences_once(TEXTS, 8, 16)
  assert last.tokens.shape == (8, 16)
  assert last.segment_ids[:4].any(axis=1).all()
  assert not last.segment_ids[4:].any() and not last.loss_mask[4:].any()
  *_, last = batches.rankings_once(RANKED[:1], 3, 6, 5)
  assert last.tokens.shape == (3, 6, 5)
  assert not last.group[1:].any() and (last.index[1:] == -1).all()


def test_the_states_of_zipped_batches_are_of_as_many_iterators():
  zipped = batches.ZippedBatches(batches.prompts(ASKED, 4, 7), None)
  state = zipped.get_state()
  assert [part is None for part in state['parts']] == [False, True]
  with pytest.raises(ValueError):
    zipped.set_state({'parts': state['parts'][:1]})


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: batches.sequences([], 4, 16, 0), 'expected at least one example'),
    (lambda: batches.sequences(TEXTS, 0, 16, 0), 'batch_size: expected 1 or more, got 0'),
    (lambda: batches.sequences(TEXTS, 4, 16, -1), 'seed: expected 0 or more, got -1'),
    (
      lambda: batches.rankings(RANKED, 2, 3, 5, 0),
      'responses_per_row: record .* responses, a row has 3 places',
    ),
    (
      lambda: next(batches.rankings_once(RANKED, 2, 3, 5)),
      'responses_per_row: record .* responses, a row has 3 places',
    ),
    (lambda: batches.prompts(ASKED, 4, -1), 'seed: expected 0 or more, got -1'),
  ],
)
def test_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_rankings_of_another_length_are_refused():
  with pytest.raises(ValueError, match='expected responses of 6 tokens, got 5'):
    batches.rankings(RANKED, 2, 6, 6, 0)
