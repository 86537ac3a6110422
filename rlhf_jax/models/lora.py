"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685, eq. 3): x W + α/r · (x A) B, where W stays as it is.

Beside each chosen matrix of the layers stand two leaves, `query_lora_a` [L, D, r] and `query_lora_b` [L, r, H, C]. A begins
at random, B at 0, so that a model begins as its base. A tree of parameters that has adapters trains them and the scalar
head, and nothing else.
"""

import math

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.models import quantised

DEFAULTS = dict(
    rank=0,  # r; 0 = no adapters, every parameter is trained
    alpha=16.0,  # adapters count alpha / rank times
    targets=(),  # of query, key, value, output, gate, up, down; () = all that a layer has
    base='float32',  # how all frozen models are kept: float32, bfloat16, int8, int4, nf4 (the last three: the qwix extra)
)
A, B = '_lora_a', '_lora_b'


def adapter_leaves(config, name, inputs, outputs):
  """The two leaves of a matrix: (name, shape, axis names, how it begins) of each, without the axis of layers.

  Args:
    inputs, outputs: (size, axis name) of each axis that the matrix maps from and to.
  """
  (sizes, names), (out_sizes, out_names), rank = zip(*inputs), zip(*outputs), config.lora_rank
  yield name + A, (*sizes, rank), (*names, None), dict(std=(3 * math.prod(sizes)) ** -0.5)  # the variance of PEFT's
  yield name + B, (rank, *out_sizes), (None, *out_names), dict(fill=0.0)


def is_adapter(path) -> bool:
  """Whether the leaf with these keys is trained where there are adapters."""
  return path[-1].endswith((A, B)) or path[0] == 'score'


def split_trainable(params):
  """(what is trained, what is frozen): two trees; the second is empty where there are no adapters."""
  flat = traverse_util.flatten_dict(params)
  if not any(path[-1].endswith(A) for path in flat):
    return params, {}
  parts = ({path: leaf for path, leaf in flat.items() if is_adapter(path) == wanted} for wanted in (True, False))
  return tuple(map(traverse_util.unflatten_dict, parts))


def merge_adapters(config, params):
  """The same model without adapters, float32: they are added to their matrices. Inside jit or outside."""
  flat, merged = traverse_util.flatten_dict(params), {}
  for path, leaf in flat.items():
    if path[-1].endswith((A, B)):
      continue
    merged[path] = quantised.restore(leaf, jnp.float32)
    a, b = (flat.get((*path[:-1], path[-1] + ending)) for ending in (A, B))
    if a is not None:
      change = jnp.matmul(a.reshape(a.shape[0], -1, a.shape[-1]), b.reshape(*b.shape[:2], -1),
                          precision=jax.lax.Precision.HIGHEST)
      merged[path] += config.lora_alpha / config.lora_rank * change.reshape(leaf.shape)
  return traverse_util.unflatten_dict(merged)
