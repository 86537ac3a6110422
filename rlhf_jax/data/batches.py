"""Batches of fixed shape: examples are shuffled, packed and stacked, by grain.

The endless iterators reshuffle at every epoch; the order depends on the seed
alone. `get_state()` returns plain JSON, and `set_state` continues exactly there,
also in the middle of an epoch or of a packed row.

Every process of a run iterates over the same batches, and runtime/mesh.py gives
each device its rows. So order and packing do not depend on the number of hosts,
and a run can be resumed on another number of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any, Generic, TypeVar

import grain
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Prompts, Rankings, Sequences

Example = Mapping[str, np.ndarray]  # as data/encode.py makes it
Arrays = dict[str, Any]  # stacked examples: name → np.ndarray [B, …]
Batch = TypeVar('Batch')


class BatchIterator(Iterator[Batch], Generic[Batch]):
  """Endless iterator of batches that can be saved and resumed.

  Attributes:
    dataset: an endless grain dataset of stacked examples.
    to_batch: makes a batch of these arrays.
    num_examples: how many examples an epoch has.
  """

  def __init__(
    self, dataset: grain.IterDataset, to_batch: Callable[[Arrays], Batch], num_examples: int
  ):
    self.dataset = dataset
    self.to_batch = to_batch
    self.num_examples = num_examples
    self._iterator = iter(dataset)  # grain's iterator, whose state is a position

  def __next__(self) -> Batch:
    return self.to_batch(next(self._iterator))

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator stands, as plain JSON."""
    return self._iterator.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from the position of an iterator over the same examples with the same settings.

    Args:
      state: the value that its `get_state` returned.
    """
    self._iterator.set_state(state)

  def epoch(self) -> float:
    """Returns how often the examples have been read, those of a batch read ahead too."""
    return _find_next_index(self.get_state()) / self.num_examples


def _find_next_index(state: Any) -> int:
  """Returns the number of examples read, which grain keeps in the innermost state."""
  if not isinstance(state, Mapping):
    return 0
  # Packing and batching wrap the state of the source, some of them several levels deep.
  own = state.get('next_index', 0)
  return max([own, *map(_find_next_index, state.values())])


class ZippedBatches(Iterator[tuple]):
  """Several resumable iterators as one: each step gives a tuple of one batch from each.

  Attributes:
    iterators: the iterators; for a None among them the tuple has None.
  """

  def __init__(self, *iterators: Any):
    self.iterators = iterators

  def __next__(self) -> tuple:
    return tuple(_next_or_none(iterator) for iterator in self.iterators)

  def get_state(self) -> dict[str, Any]:
    """Returns the states of all iterators, as plain JSON."""
    parts = []
    for iterator in self.iterators:
      parts.append(None if iterator is None else iterator.get_state())
    return {'parts': parts}

  def epoch(self) -> float:
    """Returns how often the examples of the first iterator have been read."""
    return self.iterators[0].epoch()

  def set_state(self, state: dict[str, Any]) -> None:
    """Sets the states of all iterators.

    Args:
      state: what `get_state` returned.
    """
    for iterator, part in zip(self.iterators, state['parts'], strict=True):
      if iterator is not None:
        iterator.set_state(part)


def sequences(
  examples: Sequence[Example],
  batch_size: int,
  length: int,
  seed: int,
  pack: bool = True,
) -> BatchIterator[Sequences]:
  """Batches documents or demonstrations without end.

  Args:
    examples: from encode.documents or encode.demonstrations, none longer than `length`.
    batch_size: rows of a batch, B.
    length: tokens of a row, T.
    seed: of the shuffling.
    pack: whether several examples share a row, as segments that do not attend to each other.

  Returns:
    An iterator of Sequences [B, T].

  Raises:
    UserError: there are no examples, or a number is out of range.
  """
  dataset = _shuffled(examples, batch_size, seed)
  if pack:
    dataset = _packed(dataset, {'tokens': length, 'targets': length}, batch_size)
  else:
    dataset = dataset.map(functools.partial(_padded, length=length))
  return BatchIterator(dataset.batch(batch_size), _to_sequences, len(examples))


def sequences_once(
  examples: Sequence[Example],
  batch_size: int,
  length: int,
) -> Iterator[Sequences]:
  """Yields batches with every example once, in order, one example in each row.

  Args:
    examples: from encode.documents or encode.demonstrations.
    batch_size: rows of a batch, B.
    length: tokens of a row, T.

  Yields:
    Sequences [B, T]; the last batch is filled up with empty rows.
  """
  # An example without tokens, which makes a row of padding only: segment 0, no targets.
  nothing = {'tokens': np.zeros(0, np.int32), 'targets': np.zeros(0, np.float32)}
  rows = [_padded(example, length) for example in examples]
  for arrays in _stacked(rows, batch_size, _padded(nothing, length)):
    yield _to_sequences(arrays)


def rankings(
  examples: Sequence[Example],
  batch_size: int,
  responses_per_row: int,
  length: int,
  seed: int,
) -> BatchIterator[Rankings]:
  """Batches rankings without end; a row holds one or more whole rankings.

  Args:
    examples: from encode.rankings, encoded with a `max_length` of `length`.
    batch_size: rows of a batch, B.
    responses_per_row: places for responses in a row, K.
    length: tokens of a response with its prompt, T.
    seed: of the shuffling.

  Returns:
    An iterator of Rankings [B, K, T].

  Raises:
    UserError: a ranking has more responses than a row has places, there are no examples, or a
      number is out of range.
  """
  dataset = _shuffled(examples, batch_size, seed)
  _check_rankings(examples, responses_per_row, length)
  # Responses, not tokens, are what is packed: the first axis of each array.
  lengths = {name: responses_per_row for name in examples[0]}
  dataset = _packed(dataset, lengths, batch_size)
  return BatchIterator(dataset.batch(batch_size), _packed_to_rankings, len(examples))


def rankings_once(
  examples: Sequence[Example],
  batch_size: int,
  responses_per_row: int,
  length: int,
) -> Iterator[Rankings]:
  """Yields batches with every ranking once, in order; a row holds one or more whole rankings.

  Args:
    examples: from encode.rankings, encoded with a `max_length` of `length`.
    batch_size: rows of a batch, B.
    responses_per_row: places for responses in a row, K.
    length: tokens of a response with its prompt, T.

  Yields:
    Rankings [B, K, T]; the last batch is filled up with empty places (group 0, index -1).

  Raises:
    UserError: a ranking has more responses than a row has places.
  """
  _check_rankings(examples, responses_per_row, length)
  rows = []
  for sharing in _fill_in_order(examples, responses_per_row):
    rows.append(_ranking_row(sharing, responses_per_row, examples[0]))
  empty = _ranking_row([], responses_per_row, examples[0])
  for arrays in _stacked(rows, batch_size, empty):
    yield _to_rankings(arrays)


def prompts(
  examples: Sequence[Example],
  batch_size: int,
  seed: int,
) -> BatchIterator[Prompts]:
  """Batches prompts without end.

  Args:
    examples: from encode.prompts.
    batch_size: prompts of a batch, B.
    seed: of the shuffling.

  Returns:
    An iterator of Prompts [B, P].

  Raises:
    UserError: there are no examples, or a number is out of range.
  """
  dataset = _shuffled(examples, batch_size, seed)
  return BatchIterator(dataset.batch(batch_size), _to_prompts, len(examples))


def prompts_once(examples: Sequence[Example], batch_size: int) -> Iterator[Prompts]:
  """Yields batches with every prompt once, in order.

  Args:
    examples: from encode.prompts or encode.left_padded.
    batch_size: prompts of a batch, B.

  Yields:
    Prompts [B, P]; the last batch is filled up with rows of index -1.
  """
  tokens = np.zeros_like(examples[0]['tokens'])  # [P]
  # One visible token, as attention over no tokens at all would give NaN.
  mask = np.arange(len(tokens)) == len(tokens) - 1
  empty = {'tokens': tokens, 'mask': mask, 'index': np.int32(-1)}
  for arrays in _stacked(examples, batch_size, empty):
    yield _to_prompts(arrays)


def _next_or_none(iterator: Any) -> Any:
  """Returns the next batch, or None if there is no iterator."""
  return None if iterator is None else next(iterator)


def _shuffled(examples: Sequence[Example], batch_size: int, seed: int) -> grain.IterDataset:
  """Returns the examples as an endless dataset that is shuffled anew at each epoch."""
  if batch_size < 1:
    raise UserError(f'batch_size: expected 1 or more, got {batch_size}')
  if not examples:
    raise UserError('data: expected at least one example, got none')
  if seed < 0:
    raise UserError(f'seed: expected 0 or more, got {seed}')
  # Shuffling before repeating: every epoch has each example once, and an order of its own.
  dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
  # Everything is in memory already, so reading ahead in threads would only cost.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return dataset.to_iter_dataset(options)


def _packed(
  dataset: grain.IterDataset,
  lengths: dict[str, int],
  batch_size: int,
) -> grain.IterDataset:
  """Packs examples along their first axis, each into the first row that has room for it.

  Args:
    dataset: the examples.
    lengths: name of an array → length of its first axis after packing.
    batch_size: rows of a later batch; twice as many rows are being filled at a time.

  Returns:
    A dataset of rows, which have `NAME_segment_ids` and `NAME_positions` beside each array.
  """
  return grain.experimental.FirstFitPackIterDataset(
    dataset,
    length_struct=lengths,
    num_packing_bins=2 * batch_size,  # more rows would waste less, but change the order more
  )


def _padded(example: Example, length: int) -> Arrays:
  """Pads one sequence to a row; the names are those of a packed row."""
  count = len(example['tokens'])
  row = {
    'tokens': example['tokens'],
    'targets': example['targets'],
    'tokens_segment_ids': np.ones(count, np.int32),
    'tokens_positions': np.arange(count, dtype=np.int32),
  }
  return {name: np.pad(array, (0, length - count)) for name, array in row.items()}


def _to_sequences(arrays: Arrays) -> Sequences:
  """Makes Sequences [B, T] of stacked rows."""
  return Sequences(
    tokens=arrays['tokens'],
    positions=arrays['tokens_positions'].astype(np.int32),
    segment_ids=arrays['tokens_segment_ids'].astype(np.int32),
    loss_mask=arrays['targets'],
  )


def _packed_to_rankings(arrays: Arrays) -> Rankings:
  """Makes Rankings of packed rows; a segment holds the responses to one prompt."""
  return _to_rankings({**arrays, 'group': arrays['tokens_segment_ids']})


def _to_rankings(arrays: Arrays) -> Rankings:
  """Makes Rankings [B, K, T] of stacked rows and their groups [B, K]."""
  tokens = arrays['tokens']  # [B, K, T]
  group = arrays['group'].astype(np.int32)  # [B, K]
  places = np.arange(tokens.shape[-1])  # [T]
  inside = places < arrays['lengths'][..., None]  # [B, K, T]
  no_logprobs = np.zeros(group.shape, np.float32)
  fields: Arrays = {
    'tokens': tokens,
    'positions': np.where(inside, places, 0).astype(np.int32),
    'segment_ids': inside.astype(np.int32),
    'group': group,
    'ranks': arrays['ranks'],
    'index': np.where(group > 0, arrays['index'], -1),
    'begins': arrays['begins'],
    'confidence': arrays['confidence'],
    # A stage may have computed these before, so that it need not keep the
    # reference in memory.
    'reference_logprobs': arrays.get('reference_logprobs', no_logprobs),
  }
  return Rankings(**fields)


def _to_prompts(arrays: Arrays) -> Prompts:
  """Makes Prompts [B, P] of stacked examples."""
  return Prompts(**arrays)


def _check_rankings(examples: Sequence[Example], responses_per_row: int, length: int) -> None:
  """Refuses rankings that do not fit a row."""
  for example in examples:
    if example['tokens'].shape[-1] != length:
      width = example['tokens'].shape[-1]
      raise ValueError(f'rankings: expected responses of {length} tokens, got {width}')
    count = len(example['ranks'])
    if count > responses_per_row:
      number = int(example['index'][0])
      raise UserError(
        f'responses_per_row: record {number} (from 0) ranks {count} responses, '
        f'a row has {responses_per_row} places'
      )


def _fill_in_order(examples: Sequence[Example], responses_per_row: int) -> list[list[Example]]:
  """Divides rankings into rows without changing their order."""
  rows: list[list[Example]] = [[]]
  used = 0  # places of the last row
  for example in examples:
    count = len(example['ranks'])
    if used + count > responses_per_row:
      rows.append([])
      used = 0
    rows[-1].append(example)
    used += count
  return rows


def _ranking_row(
  examples: Sequence[Example],
  responses_per_row: int,
  like: Example,
) -> Arrays:
  """Concatenates the rankings of one row, and fills it up with empty places.

  Args:
    examples: rankings that fit one row together; may be empty.
    responses_per_row: places of the row, K.
    like: an example with the names, shapes and dtypes that all examples have.

  Returns:
    The arrays of an example, [K, …], and 'group' [K] int32, from 1; 0 = an empty place.
  """
  counts = [len(example['ranks']) for example in examples]
  num_empty = responses_per_row - sum(counts)
  group = np.zeros(responses_per_row, np.int32)  # [K]
  numbers = np.arange(1, len(examples) + 1)
  group[: sum(counts)] = np.repeat(numbers, np.array(counts, int))
  row = {'group': group}
  for name, array in like.items():
    empty = np.zeros((num_empty, *array.shape[1:]), array.dtype)
    row[name] = np.concatenate([*(example[name] for example in examples), empty])
  return row


def _stacked(rows: Sequence[Mapping[str, Any]], size: int, empty: Arrays) -> Iterator[Arrays]:
  """Yields stacks of exactly `size` rows; the last one is filled up with empty rows."""
  for begin in range(0, len(rows), size):
    part = list(rows[begin : begin + size])
    # A last batch of another shape would need a compilation of its own.
    part += [empty] * (size - len(part))
    yield {name: np.stack([row[name] for row in part]) for name in empty}
