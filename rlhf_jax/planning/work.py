"""What a program must do and hold at least, from shapes alone: products, bytes between HBM and processor, bytes between
devices, temporary memory. The compiler knows better; this answers where it is not at hand, and says what it adds.

Letters: N rows, T length, P prompt, R response, K responses of one prompt, D width, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Work:
  """
  Attributes:
    flops: of all products, over all devices; recomputation counts, what a query may not see only in plain attention.
    moved: bytes that one device reads from its memory or writes to it.
    sent: bytes that leave one device for others.
    held: bytes of temporary arrays on one device at once.
    kept: of them, those that stay until an update: what the backward pass needs, and gradients.
  """
  flops: float = 0.0
  moved: float = 0.0
  sent: float = 0.0
  held: float = 0.0
  kept: float = 0.0

  def __add__(self, other):
    """One after the other."""
    return Work(self.flops + other.flops, self.moved + other.moved, self.sent + other.sent, max(self.held, other.held))

  def __mul__(self, times):
    return Work(self.flops * times, self.moved * times, self.sent * times, self.held, self.kept)


def matrices(config, experts: int) -> int:
  """Elements of the matrices of all layers, as if a layer had so many experts."""
  D, C = config.embed, config.head_dim
  attention = D * C * (config.heads + 2 * config.kv_heads) + config.heads * C * D
  mlp = (3 if config.gated else 2) * D * config.mlp
  return config.layers * (attention + (mlp * experts + D * config.experts if config.experts else mlp))


def forward(config, layout, rows: int, length: int, head: int, start: int = 0) -> Work:
  """A forward pass over rows of `length` places beside `start` cached ones; the unembedding at `head` places of each.

  Args:
    layout: whose axes fsdp and tensor cut parameters; a decoding layout's too.
  """
  D, V, width, ways = config.embed, config.vocab_size, jnp.dtype(config.dtype).itemsize, Ways(layout)
  whole = length * (start + length)
  seen = config.layers * whole
  if config.attention != 'plain':
    seen = sum(length * min(window or whole, start + length / 2) for window in config.layer_windows)
  flops = 2 * rows * length * matrices(config, config.experts_per_token)
  flops += 4 * rows * seen * config.heads * config.head_dim + 2 * rows * head * D * V
  here = rows * length / ways.rows / ways.context  # tokens on this device
  weights = (matrices(config, config.experts) + (D * V if head else 0)) * width / ways.tensor
  inner = (config.heads + 2 * config.kv_heads) * config.head_dim + 3 * config.mlp
  passing = here * config.layers * width * (8 * D + 2 * inner / ways.tensor)
  sent = weights * (1 - 1 / ways.fsdp) + 2 * config.layers * here * D * width * 2 * (1 - 1 / ways.tensor)
  held = here * width * (4 * D + 2 * inner / ways.tensor) + 2 * matrices(config, config.experts) * width / (
      ways.tensor * config.layers) + (D * V * width / ways.tensor if head else 0)
  if config.attention == 'plain':
    held += 4 * rows / ways.rows * config.heads / ways.tensor * length / ways.context * (length + start)
  return Work(flops, weights + passing, sent, held)


def training(config, layout, rows: int, length: int, head: int, parts: int, trained) -> Work:
  """Forward and backward over rows in `parts`, one after the other, and an update with Adam.

  Args:
    trained: the tree of shapes with shardings that has gradients.
  """
  width, ways, own = jnp.dtype(config.dtype).itemsize, Ways(layout), on_device(trained)
  one = forward(config, layout, rows // parts, length, head)
  here = rows // parts * length / ways.rows / ways.context
  saved = dict(full=config.embed, dots=4 * config.embed + 3 * config.mlp, none=14 * config.embed + 5 * config.mlp)
  kept = config.layers * here * width * saved[config.remat] + own  # and the gradients
  if config.remat != 'full' and config.attention == 'plain':
    kept += 4 * config.layers * rows // parts / ways.rows * config.heads / ways.tensor * length * length / ways.context
  reduced = own * (ways.fsdp - 1) * width / 4 + 2 * own * (1 - 1 / ways.data)  # scattered over fsdp, then over data
  again = one * ((4 if config.remat == 'full' else 3) * parts)
  sent = (one.sent * (3 if config.remat == 'full' else 2) + reduced) * parts
  summed = 4 * config.embed * config.vocab_size / ways.tensor if head else 0  # of the unembedding's gradient
  return dataclasses.replace(again, moved=again.moved + 10 * own, sent=sent, held=one.held * 2 + kept + summed, kept=kept)


def rollout(config, layout, prompts: int, P: int, R: int, K: int) -> Work:
  """Prefill of all prompts, and R steps for K responses of each, as if none ended before."""
  width, decoding = jnp.dtype(config.dtype).itemsize, layout.decoding
  ways, trained = Ways(decoding), Ways(layout)
  cut = ways.tensor if config.kv_heads % ways.tensor == 0 else 1
  cache = 2 * config.layers * config.kv_heads * config.head_dim * width / cut * prompts * K / ways.rows
  config = dataclasses.replace(config, attention='plain')  # looks at the whole cache, filled or not
  step = forward(config, decoding, prompts * K, 1, 1, P + R - 1)
  step = dataclasses.replace(step, moved=step.moved + cache * (P + R))
  whole = forward(config, decoding, prompts, P, 1, R) + step * (R - 1)
  laid = 0.0
  if layout.rollout_tensor:
    weights = (matrices(config, config.experts) + config.embed * config.vocab_size * (1 if config.tied else 2)) * width
    laid = weights / ways.tensor
    whole = dataclasses.replace(whole, sent=whole.sent + laid * (1 - ways.tensor / (trained.fsdp * trained.tensor)))
  return dataclasses.replace(whole, held=whole.held + 2 * cache * (P + R) + laid)


class Ways:
  """In how many parts a layout cuts rows, places and parameters.

  Attributes:
    rows, context, fsdp, tensor, data.
  """

  def __init__(self, layout):
    sizes, wide = layout.mesh.shape, layout.mesh.shape.get('wide', 1)
    self.rows = layout.batch_shards
    self.tensor = sizes['tensor'] * wide
    self.fsdp = math.prod(sizes[axis] for axis in layout.rules['embed'] or ())
    self.context = sizes['context'] if layout.rules['length'] else 1
    self.data = sizes['data']


def on_device(tree) -> int:
  """Bytes of a tree of shapes with shardings on one device; a leaf that stands in it twice counts once."""
  leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
  return int(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bytes(leaf.dtype) for leaf in leaves))


def _bytes(dtype):
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    return 8
  return 0.5 if 'int4' in dtype.name else dtype.itemsize
