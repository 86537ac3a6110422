"""How frozen parameters are kept: as they are, in bfloat16, or in 8 or 4 bits (qwix), which each layer turns back when it
computes.

`int8` has a scale for each output; `int4` and `nf4` (Dettmers et al. 2023, arXiv:2305.14314, section 3) for each block of
at most 64 inputs of an output. Only the matrices of the layers are quantised; the embedding is then bfloat16, vectors stay
float32.
"""

import functools
import math

from flax import traverse_util
import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.model_config import TARGETS

BYTES = {
  'float32': 4,
  'bfloat16': 2,
  'int8': 1,
  'int4': 0.5,
  'nf4': 0.5,
}  # of a parameter of a matrix
KINDS = tuple(BYTES)
SMALL = KINDS[2:]
BLOCK = 64


def keep(
  params,
  kind: str,
  born=lambda function, shardings, leaf: jax.jit(function, out_shardings=shardings)(leaf),
):
  """A tree of parameters as `kind` says, leaf by leaf, each where it was.

  Args:
    born: (function, shardings, leaf) → its result.

  Raises:
    UserError: there is no such kind, or qwix is not installed.
  """
  if kind not in KINDS:
    raise UserError(f'lora.base: expected one of {", ".join(KINDS)}, got {kind!r}')
  if kind == 'float32':
    return params
  kept = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    matrix = path[0] == 'layers' and path[-1] in TARGETS
    if kind != 'bfloat16' and matrix:
      kept[path] = _quantise(leaf, kind, path[-1], born)
    elif matrix or path[0] in ('embedding', 'unembedding', 'positions'):
      kept[path] = born(lambda x: x.astype(jnp.bfloat16), leaf.sharding, leaf)
    else:
      kept[path] = leaf
  return traverse_util.unflatten_dict(kept)


def restore(leaf, dtype):
  """A kept leaf as an array of this dtype."""
  return _qwix().dequantize(leaf).astype(dtype) if is_quantised(leaf) else leaf.astype(dtype)


def restore_all(weights: dict, dtype) -> dict:
  """The leaves of one layer; those that are quantised as arrays of this dtype."""
  return {
    name: restore(leaf, dtype) if is_quantised(leaf) else leaf for name, leaf in weights.items()
  }


def is_quantised(leaf) -> bool:
  return hasattr(leaf, 'qvalue')


def _quantise(leaf, kind, name, born):
  """[L, (E,) inputs…, outputs…] → QArray, laid on the devices as the leaf is."""
  first = leaf.ndim - 2 if name in ('gate', 'up', 'down') else 1
  last = first + (name == 'output')  # the inputs' last axis
  inputs = range(first, last + 1)
  each = [axis for axis in range(leaf.ndim) if axis not in inputs]
  if kind == 'int8':
    how = dict(qtype=jnp.int8, channelwise_axes=each)
  else:
    how = dict(
      qtype=jnp.int4 if kind == 'int4' else 'nf4',
      channelwise_axes=[*each, *inputs[:-1]],
      tiled_axes={last: math.gcd(leaf.shape[last], BLOCK)},
    )
  quantise = functools.partial(_qwix().quantize, **how)
  sharding = leaf.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    size = lambda entry: math.prod(
      sharding.mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry)
    )
    cut = lambda part: [
      entry if entry and n % size(entry) == 0 else None for n, entry in zip(part.shape, spec)
    ]
    sharding = jax.tree.map(
      lambda part: jax.sharding.NamedSharding(
        leaf.sharding.mesh, jax.sharding.PartitionSpec(*cut(part))
      ),
      jax.eval_shape(quantise, leaf),
    )
  return born(quantise, sharding, leaf)


def _qwix():
  try:
    import qwix
  except ImportError:
    raise UserError(
      "a base of int8, int4 or nf4 needs qwix: pip install 'rlhf_jax[qwix]'"
    ) from None
  return qwix
