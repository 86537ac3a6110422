"""Estimates, from shapes alone, of what a program must at least do and hold.

Counts products, bytes between HBM and processor, bytes between devices, and temporary
memory. The compiler knows better; these estimates answer where it is not installed, and
put its numbers in perspective where it is.

Letters: N rows, T length, P prompt, R response, K responses to one prompt, D width, V
vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime.mesh import Layout

_KEY_BYTES = 8  # of a random key, whose dtype has no size of its own
_GRADIENT_BYTES = 4  # gradients are summed in float32


@dataclasses.dataclass(frozen=True)
class Work:
  """What a program must do, and the temporary memory that it needs."""

  # FLOPs of all matrix products, over all devices. Recomputation under `remat` counts;
  # what a query may not see counts only where attention is plain, which computes it and
  # masks it.
  flops: float = 0.0
  moved: float = 0.0  # bytes that one device reads from its memory or writes to it
  sent: float = 0.0  # bytes that one device sends to others
  held: float = 0.0  # bytes of temporary arrays on one device at the same time
  # the part of `held` that stays until the update: gradients, and the activations that
  # the backward pass needs
  kept: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    """Returns the work of two programs that run one after the other; nothing of it is kept."""
    return Work(
      flops=self.flops + other.flops,
      moved=self.moved + other.moved,
      sent=self.sent + other.sent,
      held=max(self.held, other.held),
    )

  def __mul__(self, times: int) -> 'Work':
    """Returns the work of a program that runs several times in a row."""
    return Work(
      flops=self.flops * times,
      moved=self.moved * times,
      sent=self.sent * times,
      held=self.held,
      kept=self.kept,
    )


@dataclasses.dataclass(frozen=True)
class Partition:
  """In how many parts a layout cuts rows, places and parameters."""

  rows: int  # parts of a batch
  context: int  # parts of a row's places
  fsdp: int  # parts of a parameter along its width
  tensor: int  # parts of heads, MLP and vocabulary
  data: int  # copies of the parameters along the axis data


def partition_of(layout: Layout) -> Partition:
  """Returns in how many parts a layout, which may be a decoding layout, cuts arrays."""
  sizes = layout.mesh.shape
  return Partition(
    rows=layout.batch_shards,
    context=sizes['context'] if layout.rules['length'] else 1,
    fsdp=math.prod(sizes[axis] for axis in layout.rules['embed'] or ()),
    tensor=sizes['tensor'] * sizes.get('wide', 1),  # only a decoding layout has an axis `wide`
    data=sizes['data'],
  )


def count_matrix_elements(config: ModelConfig, experts: int) -> int:
  """Returns the elements of the matrices of all layers, if a layer had so many experts."""
  D = config.embed
  head_dim = config.head_dim
  queries_keys_values = D * head_dim * (config.heads + 2 * config.kv_heads)
  attention = queries_keys_values + config.heads * head_dim * D
  mlp = (3 if config.gated else 2) * D * config.mlp  # gate, up and down, or up and down
  if config.experts:
    mlp = mlp * experts + D * config.experts  # and the router
  return config.layers * (attention + mlp)


def forward(
  config: ModelConfig,
  layout: Layout,
  rows: int,
  length: int,
  head: int,
  start: int = 0,
) -> Work:
  """Estimates a forward pass.

  Args:
    config: the model's shape.
    layout: cuts the parameters along fsdp and tensor; may be a decoding layout.
    rows: N, over all devices.
    length: T, places of each row.
    head: places of each row at which the unembedding is applied.
    start: cached places before these.

  Returns:
    The work of one pass.
  """
  D = config.embed
  V = config.vocab_size
  parts = partition_of(layout)
  width = jnp.dtype(config.dtype).itemsize  # bytes of an activation
  plain = config.attention == 'plain'

  # a multiplication and an addition for each element of a matrix and each token
  products = 2 * rows * length * count_matrix_elements(config, config.experts_per_token)
  # queries with keys, then weights with values
  seen = _count_attended(config, length, start)
  attention = 4 * rows * seen * config.heads * config.head_dim
  flops = products + (attention + 2 * rows * head * D * V)

  local_tokens = rows * length / parts.rows / parts.context  # on one device
  # every expert is read, however few a token visits
  all_matrices = count_matrix_elements(config, config.experts)
  unembedding = D * V if head else 0
  weights = (all_matrices + unembedding) * width / parts.tensor
  # widths that tensor parallelism cuts: queries, keys, values, and three of the MLP
  inner = (config.heads + 2 * config.kv_heads) * config.head_dim + 3 * config.mlp
  activations = local_tokens * config.layers * width * (8 * D + 2 * inner / parts.tensor)

  # parameters are gathered over fsdp; two sums of activations a layer go over tensor
  sent = weights * (1 - 1 / parts.fsdp) + 2 * config.layers * local_tokens * D * width * 2 * (
    1 - 1 / parts.tensor
  )

  # the activations of a layer, its parameters and those of the next one, and the
  # unembedding
  held = (
    local_tokens * width * (4 * D + 2 * inner / parts.tensor)
    + 2 * all_matrices * width / (parts.tensor * config.layers)
    + (D * V * width / parts.tensor if head else 0)
  )
  if plain:  # float32 attention weights of one layer
    local_rows = 4 * rows / parts.rows
    held += local_rows * config.heads / parts.tensor * length / parts.context * (length + start)
  return Work(flops=flops, moved=weights + activations, sent=sent, held=held)


def training(
  config: ModelConfig,
  layout: Layout,
  rows: int,
  length: int,
  head: int,
  parts: int,
  trained: Any,
) -> Work:
  """Estimates a forward and a backward pass over a batch, and an update with Adam.

  Args:
    config: the model's shape.
    layout: the mesh and its rules.
    rows: N, over all devices.
    length: T, places of each row.
    head: places of each row at which the unembedding is applied.
    parts: microbatches that run one after the other.
    trained: the tree of abstract arrays that has gradients.

  Returns:
    The work of one update.
  """
  width = jnp.dtype(config.dtype).itemsize
  cut = partition_of(layout)
  gradients = bytes_on_device(trained)
  rematerialise = config.remat == 'full'
  part = forward(config, layout, rows // parts, length, head)

  local_tokens = rows // parts * length / cut.rows / cut.context
  saved = dict(  # elements of a token that a layer saves for its backward pass
    full=config.embed,
    dots=4 * config.embed + 3 * config.mlp,
    none=14 * config.embed + 5 * config.mlp,
  )
  kept = config.layers * local_tokens * width * saved[config.remat] + gradients
  # Attention weights are saved too, but not under remat=dots: that policy saves no
  # products with batch axes.
  if config.remat == 'none' and config.attention == 'plain':
    kept += (
      4 * config.layers * rows // parts / cut.rows * config.heads / cut.tensor * length * length
    ) / cut.context

  # gradients are scattered over fsdp in the width of activations, then summed over data
  reduced = gradients * (cut.fsdp - 1) * width / 4 + 2 * gradients * (1 - 1 / cut.data)
  sent = (part.sent * (3 if rematerialise else 2) + reduced) * parts
  passes = part * ((4 if rematerialise else 3) * parts)  # a backward pass costs two forward ones
  unembedding = _GRADIENT_BYTES * config.embed * config.vocab_size / cut.tensor if head else 0
  return dataclasses.replace(
    passes,
    moved=passes.moved + 10 * gradients,  # Adam reads and writes parameters and both moments
    sent=sent,
    held=part.held * 2 + kept + unembedding,
    kept=kept,
  )


def rollout(
  config: ModelConfig,
  layout: Layout,
  prompts: int,
  P: int,
  R: int,
  K: int,
) -> Work:
  """Estimates the generation of responses, as if none ended before its last token.

  Args:
    config: the policy's shape.
    layout: the training layout; its decoding layout is used for generation.
    prompts: prompts, over all devices.
    P: tokens of a prompt.
    R: tokens of a response.
    K: responses to each prompt.

  Returns:
    The work of one prefill and R − 1 decoding steps.
  """
  width = jnp.dtype(config.dtype).itemsize
  decoding = layout.decoding
  parts = partition_of(decoding)
  trained_parts = partition_of(layout)

  heads_divide = config.kv_heads % parts.tensor == 0
  cache_parts = parts.tensor if heads_divide else 1  # too few heads are replicated
  cache = 2 * config.layers * config.kv_heads * config.head_dim * width / cache_parts
  cache = cache * prompts * K / parts.rows  # bytes of one place in the cache, on one device

  # decoding attends to the whole cache, filled or not
  config = dataclasses.replace(config, attention='plain')
  step = forward(config, decoding, prompts * K, 1, 1, P + R - 1)
  # every step reads the whole cache
  step = dataclasses.replace(step, moved=step.moved + cache * (P + R))
  total = forward(config, decoding, prompts, P, 1, R) + step * (R - 1)

  copied = 0.0  # bytes of the parameters as decoding lays them, a copy beside the trained ones
  if layout.rollout_tensor:
    embeddings = config.embed * config.vocab_size * (1 if config.tied else 2)
    weights = (count_matrix_elements(config, config.experts) + embeddings) * width
    copied = weights / parts.tensor
    # what a device has already of its part need not be sent
    had = parts.tensor / (trained_parts.fsdp * trained_parts.tensor)
    total = dataclasses.replace(total, sent=total.sent + copied * (1 - had))
  # compiled loops hold the cache about twice; docs/plan.md compares
  return dataclasses.replace(total, held=total.held + 2 * cache * (P + R) + copied)


def bytes_on_device(tree: Any) -> int:
  """Returns the bytes that a tree of abstract arrays takes on one device.

  A leaf that appears in the tree twice, as the shared base of two models with adapters
  does, counts once.
  """
  leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
  return int(sum(_count_local_elements(leaf) * _bytes_of(leaf.dtype) for leaf in leaves))


def _count_attended(config: ModelConfig, length: int, start: int) -> float:
  """Returns the pairs of a query and a key in a row, summed over all layers."""
  pairs = length * (start + length)
  if config.attention == 'plain':
    return config.layers * pairs
  # a causal kernel skips what a query may not see; a layer may have a window
  mean_visible = start + length / 2
  return sum(length * min(window or pairs, mean_visible) for window in config.layer_windows)


def _count_local_elements(leaf) -> int:
  """Returns the elements of an abstract array on one device."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _bytes_of(dtype) -> float:
  """Returns the bytes of an element."""
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return _KEY_BYTES
  if 'int4' in dtype.name:  # packed, two to a byte; its itemsize says one
    return 0.5
  return dtype.itemsize
