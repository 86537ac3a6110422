"""Examples → batches of fixed shape: shuffle, pack, batch; by grain.

Endless iterators reshuffle at every epoch, from the seed alone. Their `get_state()` is plain JSON, and `set_state` goes
on exactly there, in the middle of an epoch or of a packed row. Every process of a run walks the same batches, and
runtime/mesh.py hands each device its rows: so their order, packing included, depends on no number of hosts, and a run may
go on with another.
"""

import itertools

import grain
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Prompts, Rankings, Sequences


def sequences(examples, batch_size: int, length: int, seed: int, pack: bool = True):
  """Endless iterator of Sequences [batch_size, length].

  Args:
    examples: of encode.documents or encode.demonstrations.
    pack: several examples in a row, as segments that do not see each other.
  """
  data = _shuffled(examples, batch_size, seed)
  if pack:
    data = _packed(data, {'tokens': length, 'targets': length}, batch_size)
    return iter(data.batch(batch_size).map(_sequences))
  return iter(data.map(lambda example: _row(example, length)).batch(batch_size).map(_sequences))


def sequences_once(examples, batch_size: int, length: int):
  """Every example once, in order, one a row; the last batch is filled with empty rows."""
  empty = {'tokens': np.zeros(0, np.int32), 'targets': np.zeros(0, np.float32)}
  for part in _parts([_row(example, length) for example in examples], batch_size, _row(empty, length)):
    yield _sequences(part)


def rankings(examples, batch_size: int, places: int, length: int, seed: int):
  """Endless iterator of Rankings [batch_size, places, length]; whole rankings share a row.

  Args:
    examples: of encode.rankings, for that length.

  Raises:
    UserError: a ranking has more responses than a row has places.
  """
  data = _shuffled(examples, batch_size, seed)
  _check_places(examples, places)
  data = _packed(data, {name: places for name in examples[0]}, batch_size)
  return iter(data.batch(batch_size).map(lambda batch: _rankings({**batch, 'group': batch['tokens_segment_ids']})))


def rankings_once(examples, batch_size: int, places: int, length: int):
  """Every ranking once, in order; the last batch is filled with empty places (group 0, index -1)."""
  _check_places(examples, places)
  rows, used = [[]], 0
  for example in examples:
    if used + len(example['ranks']) > places:
      rows, used = rows + [[]], 0
    rows[-1].append(example)
    used += len(example['ranks'])

  def whole(row):
    count = sum(len(example['ranks']) for example in row)
    fill = lambda name: np.concatenate([example[name] for example in row] + [
        np.zeros((places - count, *examples[0][name].shape[1:]), examples[0][name].dtype)])
    group = np.concatenate([np.full(len(example['ranks']), number) for number, example in enumerate(row, 1)]
                           + [np.zeros(places - count)]).astype(np.int32)
    return {'group': group, **{name: fill(name) for name in examples[0]}}

  for part in _parts([whole(row) for row in rows], batch_size, whole([])):
    yield _rankings(part)


def prompts(examples, batch_size: int, seed: int):
  """Endless iterator of Prompts [batch_size, P]."""
  return iter(_shuffled(examples, batch_size, seed).batch(batch_size).map(lambda batch: Prompts(**batch)))


def prompts_once(examples, batch_size: int):
  """Every prompt once, in order; the last batch is filled with rows of index -1 (and one visible token)."""
  tokens = np.zeros_like(examples[0]['tokens'])
  mask = np.arange(len(tokens)) == len(tokens) - 1
  for part in _parts(examples, batch_size, {'tokens': tokens, 'mask': mask, 'index': np.int32(-1)}):
    yield Prompts(**part)


class Together:
  """Several iterators as one: next() gives a tuple, the state is a list. None in the place of an iterator gives None."""

  def __init__(self, *iterators):
    self._iterators = iterators

  def __iter__(self):
    return self

  def __next__(self):
    return tuple(None if iterator is None else next(iterator) for iterator in self._iterators)

  def get_state(self):
    return {'parts': [None if iterator is None else iterator.get_state() for iterator in self._iterators]}

  def set_state(self, state):
    for iterator, part in zip(self._iterators, state['parts'], strict=True):
      if iterator is not None:
        iterator.set_state(part)


def _shuffled(examples, batch_size, seed):
  if batch_size < 1:
    raise UserError(f'batch_size: expected 1 or more, got {batch_size}')
  if not examples:
    raise UserError('data: nothing to make batches of')
  if seed < 0:
    raise UserError(f'seed: expected 0 or more, got {seed}')
  data = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
  return data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # all is in memory


def _packed(data, lengths, rows):
  """First-fit packing along the first axis; adds *_segment_ids and *_positions."""
  return grain.experimental.FirstFitPackIterDataset(data, length_struct=lengths, num_packing_bins=2 * rows)


def _row(example, length):
  count = len(example['tokens'])
  pad = lambda x: np.pad(x, (0, length - count))
  return {'tokens': pad(example['tokens']), 'targets': pad(example['targets']),
          'tokens_segment_ids': pad(np.ones(count, np.int32)), 'tokens_positions': pad(np.arange(count, dtype=np.int32))}


def _sequences(batch):
  return Sequences(tokens=batch['tokens'], positions=batch['tokens_positions'].astype(np.int32),
                   segment_ids=batch['tokens_segment_ids'].astype(np.int32), loss_mask=batch['targets'])


def _rankings(batch):
  tokens, group = batch['tokens'], batch['group'].astype(np.int32)
  inside = np.arange(tokens.shape[-1]) < batch['lengths'][..., None]
  positions = np.where(inside, np.arange(tokens.shape[-1]), 0).astype(np.int32)
  return Rankings(tokens=tokens, positions=positions, segment_ids=inside.astype(np.int32), group=group,
                  ranks=batch['ranks'], index=np.where(group > 0, batch['index'], -1), begins=batch['begins'],
                  confidence=batch['confidence'],
                  reference_logprobs=batch.get('reference_logprobs', np.zeros(group.shape, np.float32)))


def _check_places(examples, places):
  for example in examples:
    if len(example['ranks']) > places:
      raise UserError(f'responses_per_row: record {int(example["index"][0])} (from 0) ranks {len(example["ranks"])} '
                      f'responses, a row has {places} places')


def _parts(rows, size, empty):
  """Lists of rows as stacked arrays of exactly `size` rows."""
  for begin in range(0, len(rows), size):
    part = rows[begin:begin + size]
    part = part + list(itertools.repeat(empty, size - len(part)))
    yield {name: np.stack([row[name] for row in part]) for name in empty}
