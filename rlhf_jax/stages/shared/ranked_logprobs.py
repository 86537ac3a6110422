"""Log-probabilities of ranked responses, padded or packed, for losses that compare them.

Shape letters beside those of types.py: N = B * K responses, C packed rows in a chunk of S
slots each (packing.py).
"""

from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp

from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import packing
from rlhf_jax.stages.shared.packing import Chunks, PackedRows
from rlhf_jax.types import Array, Params, Rankings, Sequences


class ResponseLogprobs(NamedTuple):
  """The log-probabilities of ranked responses under a model.

  Attributes:
    sums: [B, K] float32, log π(y|x) in nats; 0 where a place is empty.
    lengths: [B, K] float32, |y| with the end token; 1 where a place is empty.
  """

  sums: Array
  lengths: Array


class PackedRankings(flax.struct.PyTreeNode):
  """Whole rankings in a chunk of packed rows, whose slots count as the places of one row.

  Attributes:
    rows: the responses with their prompts, C * S slots.
    group: [1, C * S] int32, 0 = an empty slot; equal numbers = the same ranking.
    ranks: [1, C * S] int32, as in Rankings.
    confidence: [1, C * S] float32.
    reference_logprobs: [1, C * S] float32.
  """

  rows: PackedRows
  group: Array
  ranks: Array
  confidence: Array
  reference_logprobs: Array

  @property
  def token_count(self) -> Array:
    """The tokens of all responses, each with its prompt, [] float32."""
    return jnp.sum(self.rows.lengths, dtype=jnp.float32)


def response_logprobs(
  model: Model, params: Params, batch: Rankings | PackedRankings
) -> ResponseLogprobs:
  """Computes log π(y|x), summed over each response.

  Args:
    model: the definition.
    params: its parameters.
    batch: B rows of K places; or packed rankings, one row of C * S places.

  Returns:
    Sums and lengths, [B, K] float32.
  """
  shape = batch.group.shape
  if isinstance(batch, PackedRankings):
    computed = _packed_logprobs(model, params, batch.rows)
  else:
    computed = _padded_logprobs(model, params, _as_sequences(batch))
  return ResponseLogprobs(computed.sums.reshape(shape), computed.lengths.reshape(shape))


def map_logprobs(
  model: Model, layout: Layout, packed_rows: int, params: Params, batch: Rankings
) -> ResponseLogprobs:
  """Computes what `response_logprobs` does, packed if asked to; it has no gradient then.

  Args:
    model: the definition.
    layout: the mesh.
    packed_rows: C; 0 = the rows stay padded.
    params: the model's parameters.
    batch: B rows of K places.
  """
  if not packed_rows:
    return response_logprobs(model, params, batch)
  chunks = open_chunks(batch, model, layout, packed_rows, together=1)

  def compute(rows: PackedRows) -> ResponseLogprobs:
    return _packed_logprobs(model, params, rows)

  sums, lengths = packing.map_chunks(compute, chunks)
  shape = batch.group.shape
  # Rows without a token are in no chunk.
  return ResponseLogprobs(sums.reshape(shape), jnp.maximum(lengths.reshape(shape), 1.0))


def pack_rankings(
  batch: Rankings, model: Model, layout: Layout, packed_rows: int
) -> tuple[Any, dict[str, Array]]:
  """Packs a batch of rankings for its update, if asked to.

  Args:
    batch: B rows of K places; the rankings of a row stay in one chunk.
    model: the policy's definition.
    layout: the mesh.
    packed_rows: C, at least K; 0 = nothing is packed.

  Returns:
    (the batch, or its parts, which are PackedRankings; the metrics of packing).
  """
  if not packed_rows:
    return batch, {}
  B, K, _ = batch.tokens.shape
  chunks = open_chunks(batch, model, layout, packed_rows, together=K)
  # Rows of the batch share a chunk, so that their groups need numbers of their own.
  numbers = jnp.arange(B)[:, None] * K + batch.group
  labels = {
    'group': jnp.where(batch.group > 0, numbers, 0),
    'ranks': batch.ranks,
    'confidence': batch.confidence,
    'reference_logprobs': batch.reference_logprobs,
  }
  flat = {name: value.reshape(-1) for name, value in labels.items()}  # [N] each

  def read(number: Array) -> PackedRankings:
    taken = chunks.take(flat, number)  # [C * S] each
    return PackedRankings(
      chunks.read(number), **{name: value[None] for name, value in taken.items()}
    )

  return steps.Parts(read, chunks.packing.count, chunks.limit), chunks.metrics()


def open_chunks(
  batch: Rankings, model: Model, layout: Layout, packed_rows: int, together: int
) -> Chunks:
  """Packs the responses of rankings, which share the prompts of their row of the batch.

  Args:
    batch: B rows of K places.
    model: what reads them.
    layout: the mesh.
    packed_rows: C.
    together: K, if what stands in a row is compared; else 1.
  """
  sequences = _as_sequences(batch)
  _, K, T = batch.tokens.shape
  sharing = packing.share_prompts(sequences, K, [model], layout)
  return packing.open_chunks(sequences, T, packed_rows, model, layout, together, sharing)


def _as_sequences(batch: Rankings) -> Sequences:
  """Makes a row of each place: [B, K, T] → Sequences [N, T] whose targets are the responses."""

  def as_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])

  segment_ids = as_rows(batch.segment_ids)
  places = jnp.arange(segment_ids.shape[1])
  # The state at a token predicts the next one, so that nothing predicts the first.
  begins = jnp.maximum(batch.begins.reshape(-1, 1), 1)
  is_response = (places >= begins) & (segment_ids > 0)
  return Sequences(
    tokens=as_rows(batch.tokens),
    positions=as_rows(batch.positions),
    segment_ids=segment_ids,
    loss_mask=is_response.astype(jnp.float32),
  )


def _padded_logprobs(model: Model, params: Params, rows: Sequences) -> ResponseLogprobs:
  """Computes sums and lengths of N padded rows, [N] float32 each."""
  hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], rows.tokens[:, 1:])
  mask = rows.loss_mask[:, 1:] > 0  # [N, T - 1]
  sums = jnp.sum(jnp.where(mask, logprobs, 0.0), axis=1)
  lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
  return ResponseLogprobs(sums, jnp.maximum(lengths, 1.0))  # some losses divide by it


def _packed_logprobs(model: Model, params: Params, rows: PackedRows) -> ResponseLogprobs:
  """Computes sums and lengths of the slots of packed rows, [C * S] float32 each."""
  hidden = packing.run_trunk(model, params, rows)
  logprobs, _ = packing.packed_logprobs(model, params, hidden, rows)
  lengths = (rows.ends - rows.begins).astype(jnp.float32)
  return ResponseLogprobs(rows.sum_responses(logprobs), jnp.maximum(lengths, 1.0))
