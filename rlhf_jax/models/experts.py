"""Mixture of experts: each token goes to the few experts that its router likes best.

No token is dropped. Two ways that give the same numbers:

  ragged, on a TPU  tokens sorted by expert, one grouped product (`jax.lax.ragged_dot`):
                    work for the chosen experts only
  scan, elsewhere   one expert after the other over all tokens: E / k times the work,
                    but nothing of [experts, tokens, …]; on a CPU XLA would write the
                    grouped product out as just that

The auxiliary loss that balances a router is left out: fine-tuning keeps the balance of
pre-training or loses it.

Letters: M tokens, D width, E experts, k of them for each token, F inner width of an
expert.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.models.model_config import product_precision

Activation = Callable[[jax.Array], jax.Array]


def route(
  x: jax.Array,
  router: jax.Array,
  count: int,
  renormalise: bool,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the experts of each token.

  Mixtral (Jiang et al. 2024, arXiv:2401.04088, section 2.1).

  Args:
    x: [M, D].
    router: [D, E].
    count: k.
    renormalise: the k weights sum to 1; otherwise they are those of the softmax over
      all experts.

  Returns:
    (weights [M, k] float32, experts [M, k] int32).
  """
  router = router.astype(x.dtype)
  logits = jnp.matmul(
    x,
    router,
    preferred_element_type=jnp.float32,
    precision=product_precision(x.dtype),
  )
  probabilities = jax.nn.softmax(logits, axis=-1)  # [M, E]
  weights, chosen = jax.lax.top_k(probabilities, count)
  if renormalise:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
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
    ragged: in one grouped product; else one expert after the other.

  Returns:
    [M, D], the dtype of x.
  """
  mix_experts = _mix_ragged if ragged else _mix_by_scan
  return mix_experts(x, weights, chosen, gate, up, down, activation)


def _mix_by_scan(
  x: jax.Array,
  weights: jax.Array,
  chosen: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  down: jax.Array,
  activation: Activation,
) -> jax.Array:
  """Computes `mix` with one expert after the other over all tokens."""

  @jax.checkpoint  # or the backward pass keeps every expert's [M, F]
  def add_expert(total: jax.Array, expert: tuple[jax.Array, ...]):
    number, gate, up, down = expert
    is_chosen = jnp.where(chosen == number, weights, 0.0)
    weight = jnp.sum(is_chosen, axis=-1, keepdims=True)  # [M, 1], 0 for other experts
    inner = activation(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))  # [M, F]
    out = inner @ down.astype(x.dtype)
    return total + weight * out.astype(jnp.float32), None

  numbers = jnp.arange(gate.shape[0])
  nothing = jnp.zeros(x.shape, jnp.float32)
  total, _ = jax.lax.scan(add_expert, nothing, (numbers, gate, up, down))
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
  nothing = jnp.zeros(x.shape, jnp.float32)
  return nothing.at[tokens].add(out).astype(x.dtype)
