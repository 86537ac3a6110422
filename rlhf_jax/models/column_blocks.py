"""Matrices cut into blocks of columns, which a CPU multiplies faster with few rows.

For a product of few rows XLA's CPU backend spends most of the time on rearranging the matrix.
A block of few columns is a product of its own, which reads one piece of memory as it lies there.
A sampler cuts the matrices once, before it decodes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import MATRIX_AXES, Params

KEY = 'blocks'  # of the blocks among the leaves of a layer, and among all parameters
FEW_ROWS = range(2, 9)  # a product of one row, and of more rows, is faster with the whole matrix
COLUMNS = 64  # of a block
MOST_PARAMETERS = 2**28  # of a model whose matrices may be copied: blocks of 1 GiB


def are_worth_it(config: ModelConfig, params: Params, rows: int) -> bool:
  """Tells whether blocks are faster in products of so many rows, and not too large.

  Args:
    config: the model's configuration.
    params: its parameters.
    rows: the number of rows.
  """
  is_plain = config.dtype == 'float32' and not config.is_exact and not config.experts
  if not is_plain or rows not in FEW_ROWS:
    return False
  return sum(leaf.size for leaf in jax.tree.leaves(params)) <= MOST_PARAMETERS


def cut_matrices(params: Params, unembedding: jax.Array) -> Params:
  """Adds the blocks of all matrices to parameters whose layers are unstacked.

  Args:
    params: parameters whose `layers` are a tuple of dicts.
    unembedding: [D, V].

  Returns:
    The same parameters, with the blocks beside the matrices that they stand for. Matrices
    whose columns do not divide into blocks have none.
  """
  layers = tuple({**layer, KEY: _cut_layer(layer)} for layer in params['layers'])
  return {**params, 'layers': layers, KEY: _cut({'unembedding': unembedding})}


def leave_out(params: Params) -> Params:
  """Returns parameters without the blocks that `cut_matrices` has added, if it has."""
  if KEY not in params:
    return params
  layers = tuple({**layer, KEY: {}} for layer in params['layers'])
  return {**params, 'layers': layers, KEY: {}}


def multiply(x: jax.Array, blocks: jax.Array) -> jax.Array:
  """Multiplies rows by a matrix in blocks.

  Args:
    x: [..., K].
    blocks: [N / COLUMNS, K, COLUMNS].

  Returns:
    [..., N].
  """
  rows = x.reshape(-1, x.shape[-1])
  copies = jnp.broadcast_to(rows, (len(blocks), *rows.shape))
  products = jnp.matmul(copies, blocks)  # [N / COLUMNS, M, COLUMNS]
  return products.transpose(1, 0, 2).reshape(*x.shape[:-1], -1)


def _cut_layer(layer: dict[str, Any]) -> dict[str, jax.Array]:
  """Returns the blocks of a layer's matrices, by the names of these."""
  matrices = {}
  for name, (inputs, _) in MATRIX_AXES.items():
    leaf = layer.get(name)
    if isinstance(leaf, jax.Array):  # neither absent nor quantised
      matrices[name] = leaf.reshape(math.prod(leaf.shape[:inputs]), -1)
  return _cut(matrices)


def _cut(matrices: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Cuts matrices [K, N] into blocks [N / COLUMNS, K, COLUMNS]."""
  blocks = {}
  for name, matrix in matrices.items():
    if matrix.shape[1] % COLUMNS == 0:
      blocks[name] = matrix.reshape(len(matrix), -1, COLUMNS).transpose(1, 0, 2)
  return blocks
