"""Packs prompts with responses into rows of one width, so that padding costs little.

N rows of W places hold texts of very different lengths: prompts with their responses.
Several of them share one packed row, as segments that do not see each other, and the
packed rows are computed a few at a time: in chunks, of which only those in use are
computed. Which rows go where is decided inside the compiled step, from the lengths:
nothing is compiled anew, and nothing is read back to the host.

A loss that compares responses (DPO and its family) needs all responses to a prompt in
one chunk: rows are packed in units, none of which is divided over chunks.

Responses to one prompt can share it (Wang and Hegde 2024, arXiv:2410.20305). A packed row
then holds the prompt without its last token once, as a segment of its own, its prefix; and
for each response a segment that continues it: the prompt's last token, whose state predicts
the response's first one, and the response. The prefix stands again in each packed row that
has responses to the prompt. The numbers are the same, as a token sees what it sees in a row
of its own, at the same positions.

Shape letters beside those of types.py: C packed rows in a chunk, S slots of a packed row,
each of which holds a prompt with its response or nothing; T the width of a padded row,
P + R in a rollout; W that of a packed one, T where no prompt is shared; U units of n rows,
N = U * n.
"""

from collections.abc import Callable, Collection
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import Array, Params, Sequences

SLOTS = 8  # S; more rows than that share no packed row, however short they are
# Shares of a chunk's places at which logits are computed: the least that holds all
# places before response tokens. Each is compiled.
HEAD_SHARES = (0.5, 0.75, 1.0)
ROUNDING = 1e-6  # of a share of a row's places
# The longest responses that a packed row has places for, beside their prompt. The more there are,
# the more attention goes to what is masked.
SHARED_RESPONSES = 4


@dataclasses.dataclass(frozen=True)
class Sharing:
  """Which rows share their prompts.

  Attributes:
    prompts: [N] int32, a number for each row's prompt; rows share it where it is equal.
    width: W, places of a packed row.
    head_share: the share of a packed row that responses fill if all are full.
    packed_rows: the most that can be needed; None = as many as if nothing were shared.
  """

  prompts: Array
  width: int
  head_share: float
  packed_rows: int | None = None


class Packing(flax.struct.PyTreeNode):
  """Where N rows lie in packed rows.

  Attributes:
    rows: [chunks, C, S] int32, the number of the row in each slot; N = an empty slot.
    starts: [chunks, C, S] int32, the column of its first token behind the prefix.
    prefixes: [chunks, C, S] int32, the column of its prefix.
    count: [] int32, the chunks that hold anything; they come first.
    places: [] int32, those that hold a token.
  """

  rows: Array
  starts: Array
  prefixes: Array
  count: Array
  places: Array


class PackedRows(flax.struct.PyTreeNode):
  """A chunk of packed rows, with what leads back to its responses.

  Attributes:
    sequences: [C, W]; the numbers of segments are those of the slots, from 1. Prefixes
      have greater ones.
    prefix_ids: [C, W] int32, the segments that those of the tokens continue, 0 = none; None
      where no prompt is shared.
    lengths: [C * S] int32, tokens of each slot's prompt and response.
    begins: [C * S] int32, the place of each response's first token in the flattened
      [C * W].
    ends: [C * S] int32, the place behind its last one.
    response_length: R.
    groups: G, rows of which are on devices of their own.
    head_shares: the shares of the places of which one has logits, see `packed_logprobs`.
  """

  sequences: Sequences
  prefix_ids: Array | None
  lengths: Array
  begins: Array
  ends: Array
  response_length: int = flax.struct.field(pytree_node=False)
  groups: int = flax.struct.field(pytree_node=False)
  head_shares: tuple[float, ...] = flax.struct.field(pytree_node=False)

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

  @property
  def last_columns(self) -> Array:
    """The columns of the last token of each slot, [C, S] int32."""
    C, W = self.sequences.tokens.shape
    places = self.ends.reshape(C, -1) - 1 - W * jnp.arange(C)[:, None]
    return jnp.maximum(places, 0)

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
    sharing: which prompts are shared; None = none.
  """

  sequences: Sequences
  packing: Packing
  response_length: int
  layout: Layout
  sharing: Sharing | None = None

  @property
  def limit(self) -> int:
    """The largest number of chunks, if all rows have their full width."""
    return len(self.packing.rows)

  @property
  def width(self) -> int:
    """W, places of a packed row."""
    return self.sharing.width if self.sharing else self.sequences.tokens.shape[1]

  def read(self, number: Array) -> PackedRows:
    """Makes chunk `number`, [] int32."""
    rows, starts = self.packing.rows[number], self.packing.starts[number]  # [C, S]
    C, S = rows.shape
    W = self.width
    taken = take_rows(self.sequences, rows)  # [C, S, T]
    is_token = taken.segment_ids > 0
    lengths = jnp.sum(is_token, axis=2)  # [C, S]
    slots = jnp.arange(1, S + 1)[None, :, None]
    columns = starts[..., None] + taken.positions
    segments, prefix_ids = jnp.broadcast_to(slots, columns.shape), None
    if self.sharing:
      prefixes = self.packing.prefixes[number][..., None]  # [C, S, 1]
      before = prefix_lengths(taken)[..., None]
      is_prefix = taken.positions < before
      # Each response lays the prefix, all the same tokens at the same places.
      columns = jnp.where(is_prefix, prefixes + taken.positions, columns - before)
      ids = S + 1 + prefixes
      segments = jnp.where(is_prefix, ids, slots)
      prefix_ids = jnp.where(is_prefix, 0, ids)
      lengths = lengths - before[..., 0]
    # Outside the row, where `set` drops it, for padding.
    columns = jnp.where(is_token, columns, W)
    packed_row = jnp.arange(C)[:, None, None]

    def lay(values: Array) -> Array:
      laid = jnp.zeros((C, W), values.dtype).at[packed_row, columns].set(values, mode='drop')
      return self.layout.constrain(laid, ('batch', 'length'))

    packed = Sequences(
      tokens=lay(taken.tokens),
      positions=lay(taken.positions),
      segment_ids=lay(segments),
      loss_mask=lay(taken.loss_mask),
    )
    first = jnp.arange(C)[:, None] * W + starts  # [C, S], places in the flattened rows
    ends = first + lengths
    begins = ends - jnp.sum(is_token & (taken.loss_mask > 0), axis=2)
    return PackedRows(
      packed,
      None if prefix_ids is None else lay(prefix_ids),
      jnp.sum(is_token, axis=2).reshape(-1),
      begins.reshape(-1),
      ends.reshape(-1),
      self.response_length,
      self.layout.batch_shards,
      head_shares(self.sharing),
    )

  def put_back(self, tree: Any) -> Any:
    """Brings arrays [C * S, …] of the only chunk into the order of the rows: [N, …]."""
    assert self.limit == 1
    rows = self.packing.rows.reshape(-1)
    N = self.sequences.tokens.shape[0]

    def put(x: Array) -> Array:
      # Empty slots have the number N.
      return jnp.zeros((N, *x.shape[1:]), x.dtype).at[rows].set(x, mode='drop')

    return jax.tree.map(put, tree)

  def take(self, tree: Any, number: Array) -> Any:
    """Takes the rows of chunk `number` from arrays [N, …]: [C * S, …], 0 in empty slots."""
    return take_rows(tree, self.packing.rows[number].reshape(-1))

  def metrics(self) -> dict[str, Array]:
    """Returns packed/padding_share, [] float32: of the computed places, those of padding.

    Where prompts are shared, also packed/shared_share: of the tokens of the rows, those that
    are not computed, as others stand for them.
    """
    _, C, _ = self.packing.rows.shape
    computed = self.packing.count * C * self.width
    tokens = jnp.sum(self.sequences.segment_ids > 0, dtype=jnp.float32)
    if not self.sharing:
      return {'packed/padding_share': 1.0 - tokens / computed}
    return {
      'packed/padding_share': 1.0 - self.packing.places / computed,
      'packed/shared_share': 1.0 - self.packing.places / jnp.maximum(tokens, 1.0),
    }


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


def divide(
  rows: int, parts: int, packed_rows: int, length: int, sharing: Sharing | None = None
) -> tuple[int, int, int]:
  """Says how rows are computed one after the other, for plans.

  Args:
    rows: N, as they are while padded.
    parts: in which they are computed if they are not packed.
    packed_rows: C; 0 = not packed.
    length: T.
    sharing: which prompts are shared if they are packed, see `plan_sharing`.

  Returns:
    (the number of parts, rows of each, places of a row). Packed, these are the most that
    there can be, as a plan knows no lengths: all rows have their full width.
  """
  if not packed_rows:
    return parts, rows // parts, length
  if not sharing:
    return -(-rows // packed_rows), packed_rows, length
  return most_chunks(rows, 1, packed_rows, length, sharing), packed_rows, sharing.width


def most_chunks(units: int, together: int, chunk_rows: int, length: int, sharing: Sharing) -> int:
  """Returns the most chunks that U units of n rows need; the rest is as in `open_chunks`."""
  # So many units fit at least: each row as long as can be, with a prompt of its own.
  fitting = chunk_rows * (sharing.width // length) // together
  chunks = -(-units // fitting)
  if sharing.packed_rows is None:
    return chunks
  return min(chunks, -(-sharing.packed_rows // chunk_rows))


def open_chunks(
  sequences: Sequences,
  response_length: int,
  chunk_rows: int,
  model: Model,
  layout: Layout,
  together: int = 1,
  sharing: Sharing | None = None,
) -> Chunks:
  """Packs prompts with responses, each of which is one run of tokens amid padding.

  Args:
    sequences: [N, T]; rows without a token stay out.
    response_length: R.
    chunk_rows: C, at least `together`.
    model: what reads them; says at which columns a text may begin.
    layout: the mesh.
    together: n, rows beside each other that are not divided over chunks.
    sharing: which prompts are shared, see `share_prompts`; None = none.
  """
  T = sequences.tokens.shape[1]
  step = model.config.text_step
  lengths = jnp.sum(sequences.segment_ids > 0, axis=1, dtype=jnp.int32)
  if sharing:
    packing = pack_shared(sequences, lengths, T, chunk_rows, together, sharing)
  else:
    lengths = jnp.minimum(-(-lengths // step) * step, T)
    packing = pack(lengths.reshape(-1, together), T, chunk_rows)
  return Chunks(sequences, packing, response_length, layout, sharing)


def share_prompts(
  sequences: Sequences,
  beside: int,
  models: Collection[Model],
  layout: Layout,
  response_length: int = 0,
) -> Sharing | None:
  """Finds the rows that have the same prompt, token by token, as others beside them.

  Args:
    sequences: [N, T].
    beside: K, rows beside each other that are compared, N = U * K.
    models: all that read them.
    layout: the mesh.
    response_length: R, where all K rows always have the same prompt; 0 = it is not known.

  Returns:
    The prompts; None where K is 1 or a model cannot share any.
  """
  is_prompt = (sequences.segment_ids > 0) & (sequences.loss_mask == 0)  # [N, T]
  prompts = jnp.where(is_prompt, sequences.tokens, -1)
  prompts = prompts.reshape(-1, beside, prompts.shape[1])  # [U, K, T]
  same = jnp.all(prompts[:, :, None] == prompts[:, None], axis=3)  # [U, K, K]
  first = jnp.argmax(same, axis=2)  # the first row with this prompt
  numbers = jnp.arange(len(first))[:, None] * beside + first
  return plan_sharing(
    numbers.reshape(-1),
    prompts.shape[2],
    beside,
    models,
    layout,
    response_length,
    complete=response_length > 0,
  )


def plan_sharing(
  prompts: Any,
  length: int,
  beside: int,
  models: Collection[Model],
  layout: Layout,
  response_length: int = 0,
  complete: bool = False,
) -> Sharing | None:
  """Chooses the width of packed rows in which rows share their prompts.

  Args:
    prompts: [N] int32, see Sharing.
    length: T.
    beside: K, rows that may have the same prompt.
    models: as in `share_prompts`, and so the others.
    layout: the mesh.
    response_length: R; 0 = it is not known.
    complete: whether each prompt is always that of exactly K rows.
  """
  width, head_share = shared_width(length, response_length, beside)
  if beside == 1 or not all(_can_share(model, layout, width) for model in models):
    return None
  packed_rows = None
  if complete:
    packed_rows = len(prompts) // beside * -(-beside // SHARED_RESPONSES)
  return Sharing(prompts, width, head_share, packed_rows)


def _can_share(model: Model, layout: Layout, width: int) -> bool:
  """Tells whether a model can read rows of so many places in which prompts are shared."""
  config = model.config
  fits = not config.learned_positions or width <= config.max_length
  return fits and attention.sees_prefixes(config, layout.platform)


def shared_width(length: int, response_length: int, beside: int) -> tuple[int, float]:
  """Returns W, and the share of it that the longest responses fill.

  Args:
    length: T.
    response_length: R; 0 = not known: half of T is assumed.
    beside: K, rows that may have the same prompt.
  """
  R = response_length or length // 2
  responses = min(beside, SHARED_RESPONSES)
  width = length + (responses - 1) * (R + 1)
  return width, responses * R / width


def head_shares(sharing: Sharing | None) -> tuple[float, ...]:
  """Returns the shares of a chunk's places of which one has logits, see HEAD_SHARES."""
  if sharing is None:
    return HEAD_SHARES
  least, _, most = HEAD_SHARES
  return tuple(sorted({least, sharing.head_share, most}))


def prefix_lengths(sequences: Sequences) -> Array:
  """Returns the tokens of each prompt but the last, [..., T] → [...] int32."""
  is_prompt = (sequences.segment_ids > 0) & (sequences.loss_mask == 0)
  return jnp.maximum(jnp.sum(is_prompt, axis=-1, dtype=jnp.int32) - 1, 0)


def run_trunk(model: Model, params: Params, rows: PackedRows, places: Array | None = None) -> Array:
  """Runs a model without its head over packed rows.

  Args:
    model: the definition.
    params: its parameters.
    rows: the packed rows.
    places: [C, Q] int32, the columns whose states are wanted; None = all.

  Returns:
    The states, [C, W, D] or [C, Q, D].
  """
  packed = rows.sequences
  hidden, _ = model.apply(
    params,
    packed.tokens,
    packed.positions,
    packed.segment_ids,
    prefix_ids=rows.prefix_ids,
    places=places,
  )
  return hidden


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

  lengths = [math.ceil(share * W - ROUNDING) for share in rows.head_shares]
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
  sharing: Sharing | None = None,
) -> Any:
  """Computes a function of all responses of a step, packed or in as many parts as the update.

  Args:
    function: Sequences or PackedRows → a tree of arrays, a row for each response.
    sequences: [N, P + R].
    response_length: R.
    model: as in `open_chunks`.
    layout: the mesh.
    options: the stage's, with `packed_rows` and `parts`.
    sharing: which prompts are shared, if packed; None = none.

  Returns:
    The tree of arrays [N, …].
  """
  if not options.packed_rows:
    return steps.map_in_parts(function, sequences, options.parts)
  chunks = open_chunks(
    sequences, response_length, options.packed_rows, model, layout, sharing=sharing
  )
  return map_chunks(function, chunks)


def pack_minibatch(
  assessed: Any,
  definitions: Any,
  options: Any,
  beside: Any = None,
  sharing: Sharing | None = None,
) -> tuple[Any, dict[str, Array]]:
  """Packs a minibatch for its update, if the section asks for it.

  Args:
    assessed: the minibatch: a dataclass of arrays [N, …] with `sequences` [N, P + R] and
      `mask` [N, R].
    definitions: the stage's, of which layout and model are used.
    options: the stage's, with `packed_rows`.
    beside: other rows of the batch, a tree of arrays [n, …], such as documents; None =
      there are none. They are computed C at a time too, but not packed.
    sharing: which prompts are shared, if packed; None = none.

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
    sharing=sharing,
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


def pack_shared(
  sequences: Sequences,
  lengths: Array,
  length: int,
  chunk_rows: int,
  together: int,
  sharing: Sharing,
) -> Packing:
  """Packs rows that share prompts; lengths are [N] int32, the rest is as in `open_chunks`."""
  # Numbered anew, as a minibatch has some of the prompts of a step.
  _, prompts = jnp.unique(sharing.prompts, return_inverse=True, size=len(lengths))
  return pack(
    lengths.reshape(-1, together),
    sharing.width,
    chunk_rows,
    prompts.reshape(-1, together),
    prefix_lengths(sequences).reshape(-1, together),
    most_chunks(len(lengths) // together, together, chunk_rows, length, sharing),
  )


class _Bins(NamedTuple):
  """What packed rows hold so far, [C] int32 each."""

  filled: Array  # tokens
  held: Array  # rows
  prompt: Array  # the number of the prompt that came last
  prefix: Array  # the column of its prefix


def pack(
  lengths: Array,
  width: int,
  chunk_rows: int,
  prompts: Array | None = None,
  prefixes: Array | None = None,
  chunks: int | None = None,
) -> Packing:
  """Packs rows by first-fit decreasing: the longest first, each where it fits first.

  So are the units, by their sums, and the rows of each. Rows that share a prompt come one
  after the other, each where it adds the fewest tokens: to packed rows that have its prefix.

  Args:
    lengths: [U, n] int32, tokens of each row, at most `width`; 0 = no row. The n rows of
      a unit go to one chunk.
    width: W, places of a packed row.
    chunk_rows: C, at least n, so that any unit fits an empty chunk.
    prompts: [U, n] int32, numbers below N of the rows' prompts, equal ones in one unit or in
      units of one row; None = no prompt is shared.
    prefixes: [U, n] int32, tokens of each row that rows with its prompt share.
    chunks: so many at most; None = as many as rows of full width need.

  Returns:
    The packing; with n = 1 and N rows of full width there are N packed rows.

  >>> packing = pack(jnp.array([[2], [6], [3], [1]]), width=6, chunk_rows=1)
  >>> print(packing.count, packing.rows[:2, 0, :4].tolist())
  2 [[1, 4, 4, 4], [2, 0, 3, 4]]
  """
  U, n = lengths.shape
  N = U * n
  C = chunk_rows
  if chunks is None:
    chunks = -(-U // (C // n))
  if prompts is None or prefixes is None:
    prompts, prefixes = jnp.arange(N).reshape(U, n), jnp.zeros_like(lengths)

  def place_row(state: tuple[_Bins, Array], row: tuple[Array, ...]) -> tuple[Any, Any]:
    bins, fitted = state  # of one chunk; [], whether all so far did fit
    length, prompt, prefix = row
    has_prefix = bins.prompt == prompt  # rows of a prompt come one after the other
    added = length - jnp.where(has_prefix, prefix, 0)  # [C]
    fits = (bins.filled + added <= width) & (bins.held < SLOTS)
    chosen = jnp.argmin(jnp.where(fits, added, width + 1))  # the first with the fewest
    begin = bins.filled[chosen]
    column = jnp.where(has_prefix[chosen], bins.prefix[chosen], begin)
    start = begin + jnp.where(has_prefix[chosen], 0, prefix)
    spot = (chosen, bins.held[chosen], start, column)
    bins = _Bins(
      bins.filled.at[chosen].add(added[chosen]),
      bins.held.at[chosen].add(length > 0),
      bins.prompt.at[chosen].set(prompt),
      bins.prefix.at[chosen].set(column),
    )
    return (bins, fitted & (fits[chosen] | (length == 0))), spot

  def try_chunk(bins: _Bins, rows: tuple[Array, ...]) -> Any:
    return jax.lax.scan(place_row, (bins, jnp.bool_(True)), rows)

  def place_unit(bins: _Bins, unit: Array) -> tuple[_Bins, Any]:
    rows = (descending[unit], numbers[unit], shared[unit])
    (new_bins, fitted), spots = jax.vmap(try_chunk, (0, None))(bins, rows)
    # The first where it fits, as an empty one always does. A single row goes where its prompt
    # is, which may be behind the first.
    added = jnp.sum(new_bins.filled - bins.filled, axis=1) if n == 1 else 0
    chunk = jnp.argmin(jnp.where(fitted, added, width + 1))
    number, *places = jax.tree.map(lambda x: x[chunk], spots)  # [n] each
    bins = jax.tree.map(lambda old, new: old.at[chunk].set(new[chunk]), bins, new_bins)
    return bins, (chunk * C + number, *places)

  # Stable, so that equal rows and units keep their order.
  together = _total_by(lengths, prompts, N)  # of each row's prompt
  inner = jnp.lexsort((-lengths, prompts, -together), axis=1)  # [U, n]
  descending, numbers, shared = (
    jnp.take_along_axis(x, inner, axis=1) for x in (lengths, prompts, prefixes)
  )
  sums = jnp.sum(lengths, axis=1)
  order = jnp.lexsort((-sums, prompts[:, 0], -_total_by(sums, prompts[:, 0], N)))
  empty = jnp.zeros((chunks, C), jnp.int32)
  bins, spots = jax.lax.scan(place_unit, _Bins(empty, empty, empty - 1, empty), order)
  packed_rows, slots, starts, columns = spots  # [U, n] each
  row_numbers = order[:, None] * n + inner[order]
  flat = (chunks * C, SLOTS)
  # Outside, where `set` drops them.
  packed_rows = jnp.where(descending[order] > 0, packed_rows, chunks * C)

  def put(values: Array, empty: int) -> Array:
    whole = jnp.full(flat, empty, jnp.int32)
    whole = whole.at[packed_rows, slots].set(values.astype(jnp.int32), mode='drop')
    return whole.reshape(chunks, C, SLOTS)

  used = jnp.sum(jnp.any(bins.held > 0, axis=1), dtype=jnp.int32)
  return Packing(
    rows=put(row_numbers, N),
    starts=put(starts, 0),
    prefixes=put(columns, 0),
    count=jnp.maximum(used, 1),
    places=jnp.sum(bins.filled),
  )


def _total_by(values: Array, numbers: Array, limit: int) -> Array:
  """Sums values over those that have the same number below a limit, for each of them."""
  return jnp.zeros(limit, values.dtype).at[numbers].add(values)[numbers]


def take_rows(tree: Any, rows: Array) -> Any:
  """Takes rows of a tree of arrays [N, …]; zeros (False) where the number is N."""

  def take(x: Array) -> Array:
    return x.at[rows].get(mode='fill', fill_value=0)

  return jax.tree.map(take, tree)
