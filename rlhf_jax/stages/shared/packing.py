"""Packs prompts with responses into rows of one width, so that padding costs little.

N rows of P + R places hold responses of very different lengths. Several of them share one
packed row, as segments that do not see each other, and the packed rows are computed a few
at a time: in chunks, of which only those in use are computed. Which rows go where is
decided inside the compiled step, from the lengths: nothing is compiled anew, and nothing
is read back to the host.

Shape letters beside those of types.py: C packed rows in a chunk, S slots of a packed row,
each of which holds a prompt with its response or nothing; W = P + R, the width.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import Array, Sequences

SLOTS = 8  # S; more rows than that share no packed row, however short they are


class Packing(flax.struct.PyTreeNode):
  """Where N rows lie in packed rows.

  Attributes:
    rows: [chunks, C, S] int32, the number of the row in each slot; N = an empty slot.
    starts: [chunks, C, S] int32, the column of its first token.
    count: [] int32, the chunks that hold anything; they come first.
  """

  rows: Array
  starts: Array
  count: Array


class PackedRows(flax.struct.PyTreeNode):
  """A chunk of packed rows, with what leads back to its responses.

  Attributes:
    sequences: [C, W].
    places: [C * S, R] int32, for each response token the place in the flattened [C * W] of
      the token before it, which predicts it. Behind a response they lead anywhere.
  """

  sequences: Sequences
  places: Array

  def at_responses(self, values: Array) -> Array:
    """Takes values [C, W] at the places before response tokens, [C * S, R]."""
    return values.reshape(-1)[self.places]


def check_rows(packed_rows: int, microbatches: int, shards: int, where: str) -> None:
  """Checks a section's `packed_rows`, where 0 = nothing is packed.

  Args:
    packed_rows: C.
    microbatches: of the same section.
    shards: the number of devices over which a batch is divided.
    where: the section's name, for messages.

  Raises:
    UserError: packed rows do not divide over the devices, or stand beside micro-batches.
  """
  if packed_rows % shards:
    raise UserError(
      f'{where}.packed_rows: expected a multiple of the {shards} devices that share a batch, got '
      f'{packed_rows}'
    )
  if packed_rows and microbatches > 1:
    raise UserError(
      f'{where}.microbatches: expected 1 with packed_rows, which bounds the memory in its place; '
      f'got {microbatches}'
    )


def map_responses(
  function: Callable[[Any], Any],
  sequences: Sequences,
  response_length: int,
  definitions: Any,
  options: Any,
) -> Any:
  """Computes a function of all responses of a step, packed or in as many parts as the update.

  Args:
    function: Sequences or PackedRows → a tree of arrays, a row for each response.
    sequences: [N, P + R].
    response_length: R.
    definitions: the stage's, of which layout and model are used.
    options: the stage's, with `packed_rows` and `parts`.

  Returns:
    The tree of arrays [N, …].
  """
  if not options.packed_rows:
    return steps.map_in_parts(function, sequences, options.parts)
  text_step = definitions.model.config.text_step
  return map_packed(
    function, sequences, response_length, options.packed_rows, definitions.layout, text_step
  )


def pack_minibatch(
  assessed: Any, definitions: Any, options: Any, beside: tuple[Any, ...] = ()
) -> tuple[Any, dict[str, Array]]:
  """Packs a minibatch for its update, if the section asks for it.

  Args:
    assessed: the minibatch, as in `parts_of`.
    definitions: the stage's, of which layout and model are used.
    options: the stage's, with `packed_rows`.
    beside: what a part of the batch has beside its responses, all None if it is packed.

  Returns:
    (the batch or its parts: `assessed`, or a tuple of it and `beside` if there is any; the
    metrics of packing).
  """

  def join(part: Any) -> Any:
    return (part, *beside) if beside else part

  if not options.packed_rows:
    return join(assessed), {}
  text_step = definitions.model.config.text_step
  parts, metrics = parts_of(assessed, options.packed_rows, definitions.layout, text_step)

  def read(number: Array) -> Any:
    return join(parts.read(number))

  return steps.Parts(read, parts.count), metrics


def pack(lengths: Array, width: int, chunk_rows: int) -> Packing:
  """Packs rows by first-fit decreasing: the longest first, each where it fits first.

  Args:
    lengths: [N] int32, tokens of each row, at most `width`.
    width: W, places of a packed row.
    chunk_rows: C.

  Returns:
    The packing; with N rows of full width there are N packed rows.

  >>> packing = pack(jnp.array([2, 6, 3, 1]), width=6, chunk_rows=1)
  >>> print(packing.count, packing.rows[:2, 0, :4].tolist())
  2 [[1, 4, 4, 4], [2, 0, 3, 4]]
  """
  N = lengths.shape[0]
  chunks = -(-N // chunk_rows)
  bins = chunks * chunk_rows

  def place(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], Any]:
    filled, held = carry  # [bins] int32 each: tokens, rows
    fits = (filled + lengths[row] <= width) & (held < SLOTS)
    chosen = jnp.argmax(fits)  # the first that fits; an empty one always does
    spot = (chosen, held[chosen], filled[chosen])
    filled = filled.at[chosen].add(lengths[row])
    return (filled, held.at[chosen].add(1)), spot

  order = jnp.argsort(-lengths)  # stable, so that equal lengths keep their order
  empty = jnp.zeros(bins, jnp.int32)
  (_, held), (chosen, slots, starts) = jax.lax.scan(place, (empty, empty), order)
  rows = jnp.full((bins, SLOTS), N, jnp.int32).at[chosen, slots].set(order.astype(jnp.int32))
  columns = jnp.zeros((bins, SLOTS), jnp.int32).at[chosen, slots].set(starts)
  used = jnp.sum(held > 0, dtype=jnp.int32)
  shape = (chunks, chunk_rows, SLOTS)
  return Packing(rows.reshape(shape), columns.reshape(shape), -(-used // chunk_rows))


def pack_sequences(sequences: Sequences, chunk_rows: int, text_step: int = 1) -> Packing:
  """Packs prompts with responses, each of which is one run of tokens amid padding.

  Args:
    sequences: [N, W].
    chunk_rows: C.
    text_step: every text begins at a multiple of so many columns, see
      `ModelConfig.text_step`.
  """
  W = sequences.tokens.shape[1]
  lengths = jnp.sum(sequences.segment_ids > 0, axis=1, dtype=jnp.int32)
  lengths = -(-lengths // text_step) * text_step
  return pack(jnp.minimum(lengths, W), W, chunk_rows)


def read_chunk(
  sequences: Sequences, packing: Packing, number: Array, response_length: int, layout: Layout
) -> PackedRows:
  """Makes one chunk of packed rows.

  Args:
    sequences: [N, P + R], prompts left-padded, responses right-padded.
    packing: of these rows.
    number: [] int32, which chunk.
    response_length: R.
    layout: the mesh, over which the packed rows are sharded.
  """
  rows, starts = packing.rows[number], packing.starts[number]  # [C, S]
  C, S = rows.shape
  W = sequences.tokens.shape[1]
  taken = take_rows(sequences, rows)  # [C, S, W]
  # A token's column; outside the row, where `set` drops it, for padding.
  columns = jnp.where(taken.segment_ids > 0, starts[..., None] + taken.positions, W)
  packed_row = jnp.arange(C)[:, None, None]
  slots = jnp.arange(1, S + 1)[None, :, None]

  def lay(values: Array) -> Array:
    values = jnp.broadcast_to(values, taken.tokens.shape)
    laid = jnp.zeros((C, W), values.dtype).at[packed_row, columns].set(values, mode='drop')
    return layout.constrain(laid, ('batch', 'length'))

  packed = Sequences(
    tokens=lay(taken.tokens),
    positions=lay(taken.positions),
    segment_ids=lay(slots),
    loss_mask=lay(taken.loss_mask),
  )
  prompt_length = W - response_length
  prompts = jnp.sum(taken.segment_ids[..., :prompt_length] > 0, axis=2)  # [C, S]
  before_first = starts + prompts - 1  # the last token of the prompt
  before = before_first[..., None] + jnp.arange(response_length)  # [C, S, R]
  places = jnp.arange(C)[:, None, None] * W + jnp.clip(before, 0, W - 1)
  return PackedRows(packed, places.reshape(C * S, response_length))


def take_rows(tree: Any, rows: Array) -> Any:
  """Takes rows of a tree of arrays [N, …]; zeros (False) where the number is N."""

  def take(x: Array) -> Array:
    return x.at[rows].get(mode='fill', fill_value=0)

  return jax.tree.map(take, tree)


def parts_of(
  batch: Any, chunk_rows: int, layout: Layout, text_step: int = 1
) -> tuple[steps.Parts, dict[str, Array]]:
  """Cuts a batch into chunks, for the accumulation of its gradient.

  Args:
    batch: a dataclass of arrays [N, …] with `sequences` [N, P + R] and `mask` [N, R].
    chunk_rows: C.
    layout: the mesh.
    text_step: as in `pack_sequences`.

  Returns:
    The parts, each the batch with `sequences` as PackedRows and all other arrays
    [C * S, …], where empty slots have an empty mask; and packed/padding_share, [] float32,
    the share of the computed places that are padding.
  """
  packing = pack_sequences(batch.sequences, chunk_rows, text_step)
  response_length = batch.mask.shape[1]

  def read(number: Array) -> Any:
    packed = read_chunk(batch.sequences, packing, number, response_length, layout)
    rows = packing.rows[number].reshape(-1)
    others = take_rows(batch.replace(sequences=None), rows)
    return others.replace(sequences=packed)

  places = packing.count * chunk_rows * batch.sequences.tokens.shape[1]
  tokens = jnp.sum(batch.sequences.segment_ids > 0, dtype=jnp.float32)
  share = 1.0 - tokens / places
  return steps.Parts(read=read, count=packing.count), {'packed/padding_share': share}


def map_packed(
  function: Callable[[PackedRows], Any],
  sequences: Sequences,
  response_length: int,
  chunk_rows: int,
  layout: Layout,
  text_step: int = 1,
) -> Any:
  """Computes a function of prompts with responses, chunk by chunk.

  Args:
    function: PackedRows → a tree of arrays [C * S, …].
    sequences: [N, P + R].
    response_length: R.
    chunk_rows: C.
    layout: the mesh.
    text_step: as in `pack_sequences`.

  Returns:
    The tree of arrays [N, …], rows in the order of `sequences`.
  """
  N = sequences.tokens.shape[0]
  packing = pack_sequences(sequences, chunk_rows, text_step)

  def compute(number: Array) -> Any:
    return function(read_chunk(sequences, packing, number, response_length, layout))

  def add(number: Array, results: Any) -> Any:
    rows = packing.rows[number].reshape(-1)

    def put(whole: Array, part: Array) -> Array:
      return whole.at[rows].set(part, mode='drop')  # empty slots have the number N

    return jax.tree.map(put, results, compute(number))

  shapes = jax.eval_shape(compute, jnp.int32(0))
  zeros = jax.tree.map(lambda x: jnp.zeros((N, *x.shape[1:]), x.dtype), shapes)
  return jax.lax.fori_loop(0, packing.count, add, zeros)
