"""Packs prompts with responses into rows of one width, so that padding costs little.

N rows of W places hold texts of very different lengths: prompts with their responses.
Several of them share one packed row, as segments that do not see each other, and the
packed rows are computed a few at a time: in chunks, of which only those in use are
computed. Which rows go where is decided inside the compiled step, from the lengths:
nothing is compiled anew, and nothing is read back to the host.

A loss that compares responses (DPO and its family) needs all responses to a prompt in
one chunk: rows are packed in units, none of which is divided over chunks.

Shape letters beside those of types.py: C packed rows in a chunk, S slots of a packed row,
each of which holds a prompt with its response or nothing; W the width, P + R in a
rollout; U units of n rows, N = U * n.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import Array, Params, Sequences

SLOTS = 8  # S; more rows than that share no packed row, however short they are
# Shares of a chunk's places at which logits are computed: the least that holds all
# places before response tokens. Each is compiled.
HEAD_SHARES = (0.5, 0.75, 1.0)


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
    sequences: [C, W]; the numbers of segments are those of the slots, from 1.
    begins: [C * S] int32, the place of each response's first token in the flattened
      [C * W].
    ends: [C * S] int32, the place behind its last one.
    response_length: R.
    groups: G, rows of which are on devices of their own.
  """

  sequences: Sequences
  begins: Array
  ends: Array
  response_length: int = flax.struct.field(pytree_node=False)
  groups: int = flax.struct.field(pytree_node=False)

  @property
  def mask(self) -> Array:
    """Which tokens of the responses there are, [C * S, R] bool."""
    return jnp.arange(self.response_length) < (self.ends - self.begins)[:, None]

  def at_responses(self, values: Array) -> Array:
    """Takes values [C, W] at the places before response tokens, [C * S, R].

    The state at a token predicts the next one. What stands behind a response is anything.
    """
    places = self.begins[:, None] - 1 + jnp.arange(self.response_length)
    return values.reshape(-1)[jnp.clip(places, 0, values.size - 1)]

  def at_ends(self, values: Array) -> Array:
    """Takes values [C, W, …] at the last token of each slot, [C * S, …]."""
    flat = values.reshape(-1, *values.shape[2:])
    return flat[jnp.clip(self.ends - 1, 0, len(flat) - 1)]

  def sum_responses(self, values: Array) -> Array:
    """Sums values [C, W] at the places before response tokens, over each response: [C * S].

    As `at_responses` does, but without gathering, whose gradient scatters.
    """
    C, W = values.shape
    learned = self.sequences.loss_mask[:, 1:] > 0  # [C, W - 1]
    slot = jnp.arange(1, self.begins.size // C + 1)[:, None]  # [S, 1]
    inside = learned[:, None] & (self.sequences.segment_ids[:, None, 1:] == slot)  # [C, S, W - 1]
    return jnp.sum(jnp.where(inside, values[:, None, :-1], 0.0), axis=2).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Chunks:
  """Rows of a compiled step, and where they lie in packed rows.

  Attributes:
    sequences: [N, W], each row one run of tokens amid padding.
    packing: of these rows.
    response_length: R.
    layout: the mesh, over which the packed rows are sharded.
  """

  sequences: Sequences
  packing: Packing
  response_length: int
  layout: Layout

  @property
  def limit(self) -> int:
    """The largest number of chunks, if all rows have their full width."""
    return len(self.packing.rows)

  def read(self, number: Array) -> PackedRows:
    """Makes chunk `number`, [] int32."""
    rows, starts = self.packing.rows[number], self.packing.starts[number]  # [C, S]
    C, S = rows.shape
    W = self.sequences.tokens.shape[1]
    taken = take_rows(self.sequences, rows)  # [C, S, W]
    is_token = taken.segment_ids > 0
    # A token's column; outside the row, where `set` drops it, for padding.
    columns = jnp.where(is_token, starts[..., None] + taken.positions, W)
    packed_row = jnp.arange(C)[:, None, None]
    slots = jnp.arange(1, S + 1)[None, :, None]

    def lay(values: Array) -> Array:
      values = jnp.broadcast_to(values, taken.tokens.shape)
      laid = jnp.zeros((C, W), values.dtype).at[packed_row, columns].set(values, mode='drop')
      return self.layout.constrain(laid, ('batch', 'length'))

    packed = Sequences(
      tokens=lay(taken.tokens),
      positions=lay(taken.positions),
      segment_ids=lay(slots),
      loss_mask=lay(taken.loss_mask),
    )
    first = jnp.arange(C)[:, None] * W + starts  # [C, S], places in the flattened rows
    ends = first + jnp.sum(is_token, axis=2)
    lengths = jnp.sum(is_token & (taken.loss_mask > 0), axis=2)  # of the responses
    begins = ends - lengths
    return PackedRows(
      packed,
      begins.reshape(-1),
      ends.reshape(-1),
      self.response_length,
      self.layout.batch_shards,
    )

  def take(self, tree: Any, number: Array) -> Any:
    """Takes the rows of chunk `number` from arrays [N, …]: [C * S, …], 0 in empty slots."""
    return take_rows(tree, self.packing.rows[number].reshape(-1))

  def metrics(self) -> dict[str, Array]:
    """Returns packed/padding_share, [] float32: of the computed places, those of padding."""
    _, C, _ = self.packing.rows.shape
    places = self.packing.count * C * self.sequences.tokens.shape[1]
    tokens = jnp.sum(self.sequences.segment_ids > 0, dtype=jnp.float32)
    return {'packed/padding_share': 1.0 - tokens / places}


def check_rows(
  packed_rows: int, microbatches: int, shards: int, where: str, together: int = 1
) -> None:
  """Checks a section's `packed_rows`, where 0 = nothing is packed.

  Args:
    packed_rows: C.
    microbatches: of the same section.
    shards: the number of devices over which a batch is divided.
    where: the section's name, for messages.
    together: n, the responses that must be in one chunk.

  Raises:
    UserError: packed rows do not divide over the devices, do not hold what belongs together,
      or stand beside micro-batches.
  """
  if 0 < packed_rows < together:
    raise UserError(
      f'{where}.packed_rows: expected 0 or at least {together}, as so many responses are compared '
      f'and may all be of the greatest length; got {packed_rows}'
    )
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


def divide(rows: int, parts: int, packed_rows: int) -> tuple[int, int]:
  """Says how rows are computed one after the other, for plans.

  Args:
    rows: N, as they are while padded.
    parts: in which they are computed if they are not packed.
    packed_rows: C; 0 = not packed.

  Returns:
    (the number of parts, rows of each). Packed, these are the most that there can be, as
    a plan knows no lengths: all rows have their full width.
  """
  if not packed_rows:
    return parts, rows // parts
  return -(-rows // packed_rows), packed_rows


def open_chunks(
  sequences: Sequences,
  response_length: int,
  chunk_rows: int,
  model: Model,
  layout: Layout,
  together: int = 1,
) -> Chunks:
  """Packs prompts with responses, each of which is one run of tokens amid padding.

  Args:
    sequences: [N, W]; rows without a token stay out.
    response_length: R.
    chunk_rows: C, at least `together`.
    model: what reads them; says at which columns a text may begin.
    layout: the mesh.
    together: n, rows beside each other that are not divided over chunks.
  """
  W = sequences.tokens.shape[1]
  step = model.config.text_step
  lengths = jnp.sum(sequences.segment_ids > 0, axis=1, dtype=jnp.int32)
  lengths = jnp.minimum(-(-lengths // step) * step, W)
  packing = pack(lengths.reshape(-1, together), W, chunk_rows)
  return Chunks(sequences, packing, response_length, layout)


def packed_logprobs(
  model: Model, params: Params, hidden: Array, rows: PackedRows, temperature: float = 1.0
) -> tuple[Array, Array]:
  """Computes log-probabilities and entropies at the places before response tokens.

  Only at these are there logits, which cost more than a layer where the vocabulary is large:
  they are brought together, within the rows of a device, and taken back.

  Args:
    model: the definition.
    params: its parameters.
    hidden: [C, W, D], its states at the packed rows.
    rows: the packed rows.
    temperature: the sampling temperature.

  Returns:
    (logprobs, entropies), [C, W] float32 both, as `at_responses` takes them; 0 elsewhere.
  """
  tokens, G = rows.sequences.tokens, rows.groups
  C, W = tokens.shape

  def group(x: Array) -> Array:
    return x.reshape(G, C // G * W, *x.shape[2:])

  learned = jnp.roll(rows.sequences.loss_mask, -1, axis=1) > 0  # [C, W]
  learned = group(learned & (jnp.arange(W) < W - 1))
  order = jnp.argsort(~learned, axis=1)  # [G, C / G * W], stable: learned places come first
  states, targets = group(hidden), group(jnp.roll(tokens, -1, axis=1))

  def compute(length: int) -> tuple[Array, Array]:
    places = order[:, : C // G * length]

    def take(x: Array) -> Array:
      return x[jnp.arange(G)[:, None], places].reshape(C, length, *x.shape[2:])

    def put_back(x: Array) -> Array:
      whole = jnp.zeros(learned.shape, x.dtype)
      whole = whole.at[jnp.arange(G)[:, None], places].set(x.reshape(G, -1))
      return jnp.where(learned, whole, 0.0).reshape(C, W)

    results = heads.token_logprobs(model, params, take(states), take(targets), temperature)
    return put_back(results[0]), put_back(results[1])

  lengths = [math.ceil(share * W) for share in HEAD_SHARES]
  held = C // G * jnp.asarray(lengths[:-1])
  number = jnp.sum(jnp.max(jnp.sum(learned, axis=1)) > held)
  return jax.lax.switch(number, [functools.partial(compute, length) for length in lengths])


def map_chunks(function: Callable[[PackedRows], Any], chunks: Chunks) -> Any:
  """Computes a function of packed rows, chunk by chunk.

  Args:
    function: PackedRows → a tree of arrays [C * S, …].
    chunks: of N rows.

  Returns:
    The tree of arrays [N, …], rows in the order of the sequences; 0 for empty ones.
  """
  N = chunks.sequences.tokens.shape[0]

  def compute(number: Array) -> Any:
    return function(chunks.read(number))

  def add(number: Array, results: Any) -> Any:
    rows = chunks.packing.rows[number].reshape(-1)

    def put(whole: Array, part: Array) -> Array:
      return whole.at[rows].set(part, mode='drop')  # empty slots have the number N

    return jax.tree.map(put, results, compute(number))

  shapes = jax.eval_shape(compute, jnp.int32(0))
  zeros = jax.tree.map(lambda x: jnp.zeros((N, *x.shape[1:]), x.dtype), shapes)
  return steps.repeat(add, zeros, chunks.packing.count, chunks.limit)


def map_responses(
  function: Callable[[Any], Any],
  sequences: Sequences,
  response_length: int,
  model: Model,
  layout: Layout,
  options: Any,
) -> Any:
  """Computes a function of all responses of a step, packed or in as many parts as the update.

  Args:
    function: Sequences or PackedRows → a tree of arrays, a row for each response.
    sequences: [N, P + R].
    response_length: R.
    model: as in `open_chunks`.
    layout: the mesh.
    options: the stage's, with `packed_rows` and `parts`.

  Returns:
    The tree of arrays [N, …].
  """
  if not options.packed_rows:
    return steps.map_in_parts(function, sequences, options.parts)
  chunks = open_chunks(sequences, response_length, options.packed_rows, model, layout)
  return map_chunks(function, chunks)


def pack_minibatch(
  assessed: Any, definitions: Any, options: Any, beside: Any = None
) -> tuple[Any, dict[str, Array]]:
  """Packs a minibatch for its update, if the section asks for it.

  Args:
    assessed: the minibatch: a dataclass of arrays [N, …] with `sequences` [N, P + R] and
      `mask` [N, R].
    definitions: the stage's, of which layout and model are used.
    options: the stage's, with `packed_rows`.
    beside: other rows of the batch, a tree of arrays [n, …], such as documents; None =
      there are none. They are computed C at a time too, but not packed.

  Returns:
    (the batch or its parts, each a pair of `assessed` and `beside`; the metrics of
    packing). If packed, a part has either of both: `assessed` with `sequences` as
    PackedRows and all other arrays [C * S, …], where empty slots have an empty mask; or
    C rows of `beside`, 0 behind the last one.
  """
  if not options.packed_rows:
    return (assessed, beside), {}
  chunks = open_chunks(
    assessed.sequences,
    assessed.mask.shape[1],  # R
    options.packed_rows,
    definitions.model,
    definitions.layout,
  )

  def read(number: Array) -> Any:
    others = chunks.take(assessed.replace(sequences=None), number)
    return others.replace(sequences=chunks.read(number)), None

  parts = steps.Parts(
    read,
    chunks.packing.count,
    chunks.limit,
    None if beside is None else divide_rows(beside, options.packed_rows, definitions.layout),
  )
  return parts, chunks.metrics()


def divide_rows(tree: Any, size: int, layout: Layout) -> steps.Parts:
  """Divides rows that are not packed into parts.

  Args:
    tree: of arrays [n, …].
    size: C, rows of a part.
    layout: the mesh, over which the rows of a part are sharded.

  Returns:
    Parts (None, a tree of arrays [C, …]); 0 behind the last row.
  """
  rows = jax.tree.leaves(tree)[0].shape[0]  # n
  count = -(-rows // size)

  def constrain(x: Array) -> Array:
    return layout.constrain(x, ('batch', 'length')[: x.ndim])

  def read(number: Array) -> Any:
    # Every count-th row, so that each device reads rows of its own.
    taken = take_rows(tree, number + count * jnp.arange(size))
    return None, jax.tree.map(constrain, taken)

  return steps.Parts(read, jnp.int32(count), count)


def pack(lengths: Array, width: int, chunk_rows: int) -> Packing:
  """Packs rows by first-fit decreasing: the longest first, each where it fits first.

  So are the units, by their sums, and the rows of each.

  Args:
    lengths: [U, n] int32, tokens of each row, at most `width`; 0 = no row. The n rows of
      a unit go to one chunk.
    width: W, places of a packed row.
    chunk_rows: C, at least n, so that any unit fits an empty chunk.

  Returns:
    The packing; with n = 1 and N rows of full width there are N packed rows.

  >>> packing = pack(jnp.array([[2], [6], [3], [1]]), width=6, chunk_rows=1)
  >>> print(packing.count, packing.rows[:2, 0, :4].tolist())
  2 [[1, 4, 4, 4], [2, 0, 3, 4]]
  """
  U, n = lengths.shape
  N = U * n
  C = chunk_rows
  chunks = -(-U // (C // n))

  def place_row(state: tuple[Array, Array, Array], length: Array) -> tuple[Any, Any]:
    filled, held, fitted = state  # of one chunk: [C] tokens, [C] rows, []: all so far did fit
    fits = (filled + length <= width) & (held < SLOTS)
    chosen = jnp.argmax(fits)  # the first
    spot = (chosen, held[chosen], filled[chosen])
    filled = filled.at[chosen].add(length)
    held = held.at[chosen].add(length > 0)
    return (filled, held, fitted & (fits[chosen] | (length == 0))), spot

  def try_chunk(filled: Array, held: Array, row_lengths: Array) -> Any:
    return jax.lax.scan(place_row, (filled, held, jnp.bool_(True)), row_lengths)

  def place_unit(carry: tuple[Array, Array], unit: Array) -> tuple[tuple[Array, Array], Any]:
    filled, held = carry  # [chunks, C] int32 each
    tried, spots = jax.vmap(try_chunk, (0, 0, None))(filled, held, descending[unit])
    new_filled, new_held, fitted = tried
    chunk = jnp.argmax(fitted)  # the first; an empty one always does
    bins, slots, starts = jax.tree.map(lambda x: x[chunk], spots)  # [n] each
    filled = filled.at[chunk].set(new_filled[chunk])
    held = held.at[chunk].set(new_held[chunk])
    return (filled, held), (chunk * C + bins, slots, starts)

  # Stable, so that equal rows and units keep their order.
  inner = jnp.argsort(-lengths, axis=1)  # [U, n]
  descending = jnp.take_along_axis(lengths, inner, axis=1)
  order = jnp.argsort(-jnp.sum(lengths, axis=1))
  empty = jnp.zeros((chunks, C), jnp.int32)
  (_, held), (bins, slots, starts) = jax.lax.scan(place_unit, (empty, empty), order)
  numbers = order[:, None] * n + inner[order]  # [U, n], as bins, slots and starts
  bins = jnp.where(descending[order] > 0, bins, chunks * C)  # outside, where `set` drops them
  flat = (chunks * C, SLOTS)
  rows = jnp.full(flat, N, jnp.int32).at[bins, slots].set(numbers.astype(jnp.int32), mode='drop')
  columns = jnp.zeros(flat, jnp.int32).at[bins, slots].set(starts, mode='drop')
  used = jnp.sum(jnp.any(held > 0, axis=1), dtype=jnp.int32)
  shape = (chunks, C, SLOTS)
  return Packing(rows.reshape(shape), columns.reshape(shape), jnp.maximum(used, 1))


def take_rows(tree: Any, rows: Array) -> Any:
  """Takes rows of a tree of arrays [N, …]; zeros (False) where the number is N."""

  def take(x: Array) -> Array:
    return x.at[rows].get(mode='fill', fill_value=0)

  return jax.tree.map(take, tree)
