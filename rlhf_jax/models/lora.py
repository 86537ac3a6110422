"""Low-rank adapters: x W + α/r · (x A) B, where W is frozen.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3). Each chosen matrix of the layers
gets two more leaves, such as `query_lora_a` [L, D, r] and `query_lora_b` [L, r,
H, C]. A is initialised at random and B with zeros, so that the model starts as
its base. If a tree of parameters has adapters, only they and the scalar head are
trained.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.models import quantised
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.options import Natural, Positive
from rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LoraOptions:
  """How to train adapters of frozen matrices, in place of all parameters."""

  rank: Natural = 0  # r; 0 = no adapters, every parameter is trained
  alpha: Positive = 16.0  # adapters are scaled by alpha / rank
  # matrices with adapters: query, key, value, output, gate, up, down; () = all
  # that a layer has
  targets: tuple[str, ...] = ()
  # storage format of all frozen models: float32, bfloat16, int8, int4, nf4 (the
  # last three need the qwix extra)
  base: str = 'float32'

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if self.rank:
      return {}
    return dict.fromkeys(('alpha', 'targets', 'base'), 'rank is 0')


# The suffixes of the adapters' names, after that of their matrix.
A = '_lora_a'
B = '_lora_b'

Axis = tuple[int, str]  # size, axis name
# (name, shape, axis names, keyword arguments for the initializer)
Leaf = tuple[str, tuple[int, ...], tuple[str | None, ...], dict[str, float]]


def adapter_leaves(
  config: ModelConfig,
  name: str,
  inputs: Sequence[Axis],
  outputs: Sequence[Axis],
) -> Iterator[Leaf]:
  """Yields the specifications of a matrix's two adapters, without the axis of layers.

  Args:
    config: the model's configuration.
    name: the name of the matrix.
    inputs: the input axes of the matrix.
    outputs: its output axes.

  Yields:
    (name, shape, axis names, initializer) of A, then of B.
  """
  rank = config.lora_rank
  in_sizes, in_names = zip(*inputs)
  out_sizes, out_names = zip(*outputs)
  std = (3 * math.prod(in_sizes)) ** -0.5  # the variance of PEFT's initial values
  yield name + A, (*in_sizes, rank), (*in_names, None), {'std': std}
  yield name + B, (rank, *out_sizes), (None, *out_names), {'fill': 0.0}


def is_adapter(path: Sequence[str]) -> bool:
  """Tells whether the leaf at this path is trained in a model with adapters."""
  return path[-1].endswith((A, B)) or path[0] == 'score'


def split_trainable(params: Params) -> tuple[Params, Params]:
  """Splits parameters into those that are trained and those that are frozen.

  Args:
    params: with or without adapters.

  Returns:
    (trained, frozen), two trees; the second is empty if there are no adapters.
  """
  flat = traverse_util.flatten_dict(params)
  if not any(path[-1].endswith(A) for path in flat):
    return params, {}
  trained = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
  frozen = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def merge_adapters(config: ModelConfig, params: Params) -> Params:
  """Adds the adapters to their matrices; works inside and outside jit.

  Args:
    config: the configuration of the model with adapters.
    params: its parameters; frozen ones may be in any storage format.

  Returns:
    The parameters of the same model without adapters, float32.
  """
  flat = traverse_util.flatten_dict(params)
  scale = config.lora_alpha / config.lora_rank if config.lora_rank else 0.0
  merged: dict[Any, jax.Array] = {}
  for path, leaf in flat.items():
    if path[-1].endswith((A, B)):
      continue
    merged[path] = quantised.restore(leaf, jnp.float32)
    a = flat.get((*path[:-1], path[-1] + A))
    b = flat.get((*path[:-1], path[-1] + B))
    if a is not None:
      change = jnp.matmul(
        a.reshape(a.shape[0], -1, a.shape[-1]),  # [L, in, r]
        b.reshape(*b.shape[:2], -1),  # [L, r, out]
        precision=jax.lax.Precision.HIGHEST,
      )
      merged[path] += scale * change.reshape(leaf.shape)
  return traverse_util.unflatten_dict(merged)
