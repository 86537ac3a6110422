"""Estimates, from shapes alone, of the compute, traffic and memory that a program needs.

They count the FLOPs of matrix products, bytes between HBM and processor, bytes
sent between devices, and bytes of temporary arrays. The compiler's numbers are
more exact; these estimates replace them where the compiler is not installed, and
are a check on them where it is.

Shape letters: N rows, T length, P tokens of a prompt, R tokens of a response, K
responses to one prompt, D width of the model, V vocabulary.
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
  """The estimated cost of a program."""

  # FLOPs of all matrix products, over all devices. Recomputation under `remat`
  # counts. Masked pairs of a query and a key count only for plain attention,
  # which computes them.
  flops: float = 0.0
  hbm_bytes: float = 0.0  # bytes that one device reads from its memory or writes to it
  sent: float = 0.0  # bytes that one device sends to others
  temporary: float = 0.0  # the peak of one device's temporary arrays, bytes
  # the part of `temporary` that stays until the update: gradients, and the
  # activations that are saved for the backward pass
  saved: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    """Returns the cost of two programs that run one after the other; `saved` is dropped."""
    return Work(
      flops=self.flops + other.flops,
      hbm_bytes=self.hbm_bytes + other.hbm_bytes,
      sent=self.sent + other.sent,
      temporary=max(self.temporary, other.temporary),
    )

  def __mul__(self, times: int) -> 'Work':
    """Returns the cost of a program that runs several times in a row."""
    return Work(
      flops=self.flops * times,
      hbm_bytes=self.hbm_bytes * times,
      sent=self.sent * times,
      temporary=self.temporary,
      saved=self.saved,
    )


@dataclasses.dataclass(frozen=True)
class Partition:
  """Into how many shards a layout divides rows, sequences and parameters."""

  rows: int  # shards of a batch
  context: int  # shards of a sequence along its length
  fsdp: int  # shards of a parameter along the axis `embed`
  tensor: int  # shards of heads, MLP and vocabulary
  data: int  # replicas of the parameters, along the mesh axis data


def partition_of(layout: Layout) -> Partition:
  """Returns the partition of a layout, which may be a decoding layout."""
  sizes = layout.mesh.shape
  return Partition(
    rows=layout.batch_shards,
    context=sizes['context'] if layout.rules['length'] else 1,
    fsdp=math.prod(sizes[axis] for axis in layout.rules['embed'] or ()),
    tensor=sizes['tensor'] * sizes.get('wide', 1),  # only a decoding layout has an axis `wide`
    data=sizes['data'],
  )


def count_matrix_elements(config: ModelConfig, experts: int) -> int:
  """Counts the elements of the matrices of all layers.

  Args:
    config: the model's shape.
    experts: how many experts of each layer are counted; unused for dense models.
  """
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
    layout: the mesh and its rules; may be a decoding layout.
    rows: N, over all devices.
    length: T, positions of each row.
    head: positions of each row at which logits are computed; 0 = none.
    start: positions before these that are in the key-value cache.

  Returns:
    The cost of one pass.
  """
  D = config.embed
  V = config.vocab_size
  parts = partition_of(layout)
  itemsize = jnp.dtype(config.dtype).itemsize  # bytes of an element of an activation
  plain = config.attention == 'plain'

  # a multiplication and an addition for each element of a matrix and each token
  products = 2 * rows * length * count_matrix_elements(config, config.experts_per_token)
  # queries times keys, then attention weights times values
  pairs = _count_attended_pairs(config, length, start)
  attention = 4 * rows * pairs * config.heads * config.head_dim
  flops = products + (attention + 2 * rows * head * D * V)

  local_tokens = rows * length / parts.rows / parts.context  # on one device
  # all experts are read, even if each token uses only a few of them
  all_matrices = count_matrix_elements(config, config.experts)
  unembedding = D * V if head else 0
  weights = (all_matrices + unembedding) * itemsize / parts.tensor
  # widths that tensor parallelism shards: queries, keys, values, and three of the MLP
  inner = (config.heads + 2 * config.kv_heads) * config.head_dim + 3 * config.mlp
  activations = local_tokens * config.layers * itemsize * (8 * D + 2 * inner / parts.tensor)

  # all-gathers of the parameters over fsdp, two all-reduces of activations a layer over tensor
  sent = weights * (1 - 1 / parts.fsdp) + 2 * config.layers * local_tokens * D * itemsize * 2 * (
    1 - 1 / parts.tensor
  )

  # the activations of a layer, its gathered parameters and those of the next
  # layer, and the unembedding
  temporary = (
    local_tokens * itemsize * (4 * D + 2 * inner / parts.tensor)
    + 2 * all_matrices * itemsize / (parts.tensor * config.layers)
    + (D * V * itemsize / parts.tensor if head else 0)
  )
  if plain:  # float32 attention weights of one layer
    row_bytes = 4 * rows / parts.rows  # float32, of all local rows
    head_bytes = row_bytes * config.heads / parts.tensor
    temporary += head_bytes * length / parts.context * (length + start)
  return Work(flops=flops, hbm_bytes=weights + activations, sent=sent, temporary=temporary)


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
    length: T, positions of each row.
    head: positions of each row at which logits are computed; 0 = none.
    parts: number of microbatches, which run one after the other.
    trained: the tree of abstract arrays that have gradients.

  Returns:
    The cost of one update.
  """
  itemsize = jnp.dtype(config.dtype).itemsize
  shards = partition_of(layout)
  gradients = bytes_on_device(trained)
  rematerialise = config.remat == 'full'
  one_forward = forward(config, layout, rows // parts, length, head)

  local_tokens = rows // parts * length / shards.rows / shards.context
  # remat=dots saves the input, the results of all products but the last, and
  # those of cuDNN's attention
  products = config.embed + (config.heads + 2 * config.kv_heads) * config.head_dim
  products += (2 if config.gated else 1) * config.mlp
  attended = 0 if config.attention == 'plain' else config.heads * config.head_dim
  saved_elements = dict(  # remat → what a layer saves of each token for its backward pass
    full=config.embed,
    dots=config.embed + products + attended,
    none=14 * config.embed + 5 * config.mlp,
  )
  saved = config.layers * local_tokens * itemsize * saved_elements[config.remat] + gradients
  # Attention weights are saved too, but not under remat=dots: that policy saves no
  # products with batch axes.
  if config.remat == 'none' and config.attention == 'plain':
    row_bytes = 4 * config.layers * rows // parts / shards.rows  # float32, of all local rows
    saved += row_bytes * config.heads / shards.tensor * length * length / shards.context

  # gradients are reduce-scattered over fsdp in the dtype of activations, then
  # all-reduced over data
  reduced = gradients * (shards.fsdp - 1) * itemsize / 4 + 2 * gradients * (1 - 1 / shards.data)
  sent = (one_forward.sent * (3 if rematerialise else 2) + reduced) * parts
  # a backward pass costs as much as two forward passes
  passes = one_forward * ((4 if rematerialise else 3) * parts)
  unembedding = _GRADIENT_BYTES * config.embed * config.vocab_size / shards.tensor if head else 0
  return dataclasses.replace(
    passes,
    hbm_bytes=passes.hbm_bytes + 10 * gradients,  # Adam: parameters and both moments, in and out
    sent=sent,
    temporary=one_forward.temporary * 2 + saved + unembedding,
    saved=saved,
  )


def rollout(
  config: ModelConfig,
  layout: Layout,
  prompts: int,
  P: int,
  R: int,
  K: int,
) -> Work:
  """Estimates the generation of responses, assuming that all of them reach the maximum length.

  Args:
    config: the policy's shape.
    layout: the training layout; its decoding layout is used for generation.
    prompts: the number of prompts, over all devices.
    P: tokens of a prompt.
    R: tokens of a response.
    K: responses to each prompt.

  Returns:
    The cost of one prefill and R − 1 decoding steps.
  """
  itemsize = jnp.dtype(config.dtype).itemsize
  decoding = layout.decoding
  parts = partition_of(decoding)
  trained_parts = partition_of(layout)

  heads_divide = config.kv_heads % parts.tensor == 0
  cache_parts = parts.tensor if heads_divide else 1  # else the cache is replicated over tensor
  cache = 2 * config.layers * config.kv_heads * config.head_dim * itemsize / cache_parts
  cache = cache * prompts * K / parts.rows  # bytes of one position in the cache, on one device

  # decoding attends to the whole cache, whether it is filled or not
  config = dataclasses.replace(config, attention='plain')
  step = forward(config, decoding, prompts * K, 1, 1, P + R - 1)
  # every step reads the whole cache
  step = dataclasses.replace(step, hbm_bytes=step.hbm_bytes + cache * (P + R))
  total = forward(config, decoding, prompts, P, 1, R) + step * (R - 1)

  copied = 0.0  # bytes of a copy of the parameters in the decoding layout
  if layout.rollout_tensor:
    embeddings = config.embed * config.vocab_size * (1 if config.tied else 2)
    weights = (count_matrix_elements(config, config.experts) + embeddings) * itemsize
    copied = weights / parts.tensor
    # the part of its copy that a device already has is not sent to it
    local_share = parts.tensor / (trained_parts.fsdp * trained_parts.tensor)
    total = dataclasses.replace(total, sent=total.sent + copied * (1 - local_share))
  # a compiled loop needs about twice the size of the cache; docs/plan.md compares
  return dataclasses.replace(total, temporary=total.temporary + 2 * cache * (P + R) + copied)


def bytes_on_device(tree: Any) -> int:
  """Returns the bytes that a tree of abstract arrays takes on one device.

  A leaf that appears twice counts once, such as the base that two models with
  adapters share.
  """
  leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
  return int(sum(_count_local_elements(leaf) * _element_bytes(leaf.dtype) for leaf in leaves))


def _count_attended_pairs(config: ModelConfig, length: int, start: int) -> float:
  """Counts the pairs of a query and a key in one row that are computed, over all layers."""
  pairs = length * (start + length)
  if config.attention == 'plain':
    return config.layers * pairs
  # a causal kernel skips keys that a query does not attend to; a layer may have a window
  mean_visible = start + length / 2
  return sum(length * min(window or pairs, mean_visible) for window in config.layer_windows)


def _count_local_elements(leaf) -> int:
  """Returns the elements of an abstract array on one device."""
  return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _element_bytes(dtype) -> float:
  """Returns the bytes of an element of a dtype."""
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return _KEY_BYTES
  if 'int4' in dtype.name:  # two elements are packed into a byte, but itemsize is 1
    return 0.5
  return dtype.itemsize
