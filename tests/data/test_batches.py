import collections
import json

import jax
import numpy as np
import pytest

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError

LENGTHS = np.random.default_rng(0).integers(2, 12, 20)
TEXTS = [{'tokens': np.full(n, i + 1, np.int32), 'targets': np.r_[0, np.ones(n - 1)].astype(np.float32)}
         for i, n in enumerate(LENGTHS)]
RANKED = [{'tokens': np.full((k, 5), i, np.int32), 'lengths': np.full(k, 3, np.int32),
           'ranks': np.arange(1, k + 1, dtype=np.int32), 'index': np.full(k, i, np.int32),
           'begins': np.ones(k, np.int32), 'confidence': np.ones(k, np.float32)}
          for i, k in enumerate(np.random.default_rng(1).integers(2, 6, 15))]
ASKED = [{'tokens': np.full(4, i, np.int32), 'mask': np.ones(4, bool), 'index': np.int32(i)} for i in range(10)]

MAKERS = {
    'packed': lambda **k: batches.sequences(TEXTS, 4, 16, 7, **k),
    'plain': lambda **k: batches.sequences(TEXTS, 4, 16, 7, pack=False, **k),
    'rankings': lambda **k: batches.rankings(RANKED, 2, 6, 5, 7, **k),
    'prompts': lambda **k: batches.prompts(ASKED, 4, 7, **k),
    'together': lambda **k: batches.ZippedBatches(batches.prompts(ASKED, 4, 7, **k), None, batches.sequences(TEXTS, 4, 16, 7)),
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
    for want in seen[start:start + 3]:
      jax.tree.map(np.testing.assert_array_equal, next(resumed), want)


def segments(batch):
  for tokens, positions, ids, mask in zip(batch.tokens, batch.positions, batch.segment_ids, batch.loss_mask):
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
  assert len(seen) == 20 and max(seen.values()) - min(seen.values()) <= 2  # every epoch holds each once


def test_a_batch_may_be_larger_than_the_data_set():
  few = batches.prompts(ASKED[:3], 8, 0)
  assert sorted(next(few).index.tolist() + next(few).index.tolist()) == sorted([0, 1, 2] * 5 + [next(
      iter(batches.prompts(ASKED[:3], 16, 0))).index[15]])
  assert {int(tokens[0]) for tokens, _, _ in segments(next(batches.sequences(TEXTS[:2], 4, 16, 0)))} == {1, 2}


def test_batches_are_of_the_said_types():
  batch = next(MAKERS['packed']())
  assert {name: (str(getattr(batch, name).dtype), getattr(batch, name).shape) for name in (
      'tokens', 'positions', 'segment_ids', 'loss_mask')} == dict(
          tokens=('int32', (4, 16)), positions=('int32', (4, 16)), segment_ids=('int32', (4, 16)),
          loss_mask=('float32', (4, 16)))
  batch = next(MAKERS['rankings']())
  real = {'confidence', 'reference_logprobs'}
  assert {name for name, x in vars(batch).items() if x.dtype == 'float32'} == real and batch.ranks.shape == (2, 6)
  assert {str(x.dtype) for name, x in vars(batch).items() if name not in real} == {'int32'}
  batch = next(MAKERS['prompts']())
  assert (str(batch.tokens.dtype), str(batch.mask.dtype), str(batch.index.dtype)) == ('int32', 'bool', 'int32')


def test_epochs_are_shuffled_differently():
  iterator = batches.prompts(ASKED, 10, 0)
  first, second = next(iterator).index.tolist(), next(iterator).index.tolist()
  assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize('source', ['endless', 'once'])
def test_rankings_are_never_split(source):
  iterator = MAKERS['rankings']() if source == 'endless' else batches.rankings_once(RANKED, 2, 6, 5)
  seen = collections.Counter()
  for batch in ([next(iterator) for _ in range(12)] if source == 'endless' else iterator):
    assert batch.tokens.shape == (2, 6, 5)
    for group, index, ranks, inside in zip(batch.group, batch.index, batch.ranks, batch.segment_ids):
      for g in set(group.tolist()) - {0}:
        [number] = set(index[group == g].tolist())
        assert ranks[group == g].tolist() == RANKED[number]['ranks'].tolist()
        assert inside[group == g].sum(-1).tolist() == [3] * len(RANKED[number]['ranks'])
        seen[number] += 1
      assert (inside[group == 0] == 0).all() and (index[group == 0] == -1).all()
  assert source == 'endless' or seen == dict.fromkeys(range(15), 1)


def test_once_gives_everything_once_in_order():
  texts = [tokens[0] for batch in batches.sequences_once(TEXTS, 8, 16) for tokens, _, _ in segments(batch)]
  assert texts == list(range(1, 21))
  asked = list(batches.prompts_once(ASKED, 4))
  assert [batch.index.tolist() for batch in asked] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
  assert all(batch.mask.any(axis=1).all() for batch in asked)


@pytest.mark.parametrize('make,message', [
    (lambda: batches.sequences([], 4, 16, 0), 'nothing to make batches of'),
    (lambda: batches.sequences(TEXTS, 0, 16, 0), 'batch_size: expected 1 or more, got 0'),
    (lambda: batches.sequences(TEXTS, 4, 16, -1), 'seed: expected 0 or more, got -1'),
    (lambda: batches.rankings(RANKED, 2, 3, 5, 0), 'responses_per_row: record .* responses, a row has 3 places'),
])
def test_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()
