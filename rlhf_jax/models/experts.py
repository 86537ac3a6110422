"""Mixture of experts: a router sends each token to the k experts with the highest logits.

No token is dropped. There are two implementations with the same results:

  ragged, on a TPU  sorts the tokens by expert and computes one grouped product
                    (`jax.lax.ragged_dot`), for the chosen experts only
  scan, elsewhere   applies one expert after the other to all tokens: E / k times the
                    work, but no array of [experts, tokens, …], which is what XLA
                    on a CPU makes of the grouped product

There is no auxiliary loss that balances the router, so fine-tuning does not
enforce the balance that pre-training reached.

Letters: M tokens, D width, E experts, k of them for each token, F inner width of an
expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.models import exact
from rlhf_jax.models.exact import Arithmetic

Activation = Callable[[jax.Array], jax.Array]


def route(
  x: jax.Array,
  router: jax.Array,
  count: int,
  renormalise: bool,
  arithmetic: Arithmetic = exact.FAST,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the experts of each token.

  Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1).

  Args:
    x: [M, D].
    router: [D, E].
    count: the number of experts of each token, k.
    renormalise: whether the k weights are scaled to sum to 1; otherwise they are those
      of the softmax over all experts.
    arithmetic: how products and sums are computed.

  Returns:
    (weights [M, k] float32, experts [M, k] int32).
  """
  logits = arithmetic.logits(x, router.astype(x.dtype))  # [M, E]
  probabilities = jnp.exp(logits - arithmetic.peak(logits))
  probabilities = probabilities / arithmetic.total(probabilities)
  weights, chosen = jax.lax.top_k(probabilities, count)
  if renormalise:
    weights = weights / arithmetic.total(weights)
  return weights, chosen


def mix(
  x: jax.Array,
  weights: jax.Array,
  chosen: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  activation: Activation,
  ragged: bool,
  arithmetic: Arithmetic = exact.FAST,
) -> jax.Array:
  """Computes Σ_k weight · down(activation(gate x) · up x) over the chosen experts.

  Args:
    x: [M, D].
    weights: [M, k] float32, from `route`.
    chosen: [M, k] int32, from `route`.
    gate: [E, D, F].
    up: [E, D, F].
    down: [E, F, D].
    activation: of the gate.
    ragged: whether to compute one grouped product instead of one expert after the other.
    arithmetic: how products are computed, if one expert comes after the other.

  Returns:
    [M, D], the dtype of x.
  """
  if ragged:
    return _mix_ragged(x, weights, chosen, gate, up, down, activation)
  return _mix_by_scan(x, weights, chosen, gate, up, down, activation, arithmetic)


def _mix_by_scan(
  x: jax.Array,
  weights: jax.Array,
  chosen: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  activation: Activation,
  arithmetic: Arithmetic,
) -> jax.Array:
  """Computes `mix` with one expert after the other over all tokens."""

  def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return arithmetic.multiply(x, matrix.astype(x.dtype))

  @jax.checkpoint  # otherwise every expert's [M, F] would be stored for the backward pass
  def add_expert(total: jax.Array, expert: tuple[jax.Array, ...]):
    index, gate, up, down = expert
    expert_weights = jnp.where(chosen == index, weights, 0.0)  # [M, k]
    weight = jnp.sum(expert_weights, axis=-1, keepdims=True)  # [M, 1], 0 if not chosen
    inner = activation(multiply(x, gate)) * multiply(x, up)  # [M, F]
    out = multiply(inner, down)
    return total + arithmetic.rounded(weight * out.astype(jnp.float32)), None

  indices = jnp.arange(gate.shape[0])
  zeros = jnp.zeros(x.shape, jnp.float32)
  total, _ = jax.lax.scan(add_expert, zeros, (indices, gate, up, down))
  return total.astype(x.dtype)


def _mix_ragged(
  x: jax.Array,
  weights: jax.Array,
  chosen: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  activation: Activation,
) -> jax.Array:
  """Computes `mix` with tokens sorted by expert."""
  count = chosen.shape[1]
  experts = chosen.reshape(-1)
  order = jnp.argsort(experts, stable=True)  # (token, choice) pairs, expert by expert
  sizes = jnp.bincount(experts, length=gate.shape[0])  # rows of each expert
  tokens = order // count
  rows = x[tokens]  # [M k, D]

  def grouped_product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(rows, matrices.astype(x.dtype), sizes)

  inner = activation(grouped_product(rows, gate)) * grouped_product(rows, up)  # [M k, F]
  out = grouped_product(inner, down).astype(jnp.float32)
  out = out * weights.reshape(-1)[order][:, None]
  zeros = jnp.zeros(x.shape, jnp.float32)
  return zeros.at[tokens].add(out).astype(x.dtype)
