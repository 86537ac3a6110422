"""Mixture of experts: each token goes to the few experts its router likes best, and none is dropped.

Two ways that give the same numbers:
  ragged, on a TPU  tokens sorted by expert, one grouped product (`jax.lax.ragged_dot`): work for the chosen experts only
  scan, elsewhere   one expert after the other over all tokens: E / k times the work, but nothing of [experts, tokens, …];
                    on a CPU XLA would write the grouped product out as just that

The auxiliary loss that balances a router is left out: fine-tuning keeps the balance of pre-training or loses it.

Letters: M tokens, D width, E experts, k of them for each token, F inner width of an expert.
"""

import jax
import jax.numpy as jnp


def route(x, router, count, renormalise):
  """The experts of each token (Jiang et al. 2024, arXiv:2401.04088, section 2.1).

  Args:
    x: [M, D].
    router: [D, E].
    count: k.
    renormalise: the k weights sum to 1; otherwise they are the softmax's over all experts.

  Returns:
    (weights [M, k] float32, experts [M, k] int32).
  """
  odds = jax.nn.softmax(jnp.matmul(x, router.astype(x.dtype), preferred_element_type=jnp.float32), axis=-1)
  weights, chosen = jax.lax.top_k(odds, count)
  return weights / jnp.sum(weights, axis=-1, keepdims=True) if renormalise else weights, chosen


def mix(x, weights, chosen, gate, up, down, activation, ragged):
  """Σ_k weight · down(activation(gate x) · up x) over the chosen experts.

  Args:
    x: [M, D].
    weights, chosen: [M, k], as `route` gives them.
    gate, up: [E, D, F].
    down: [E, F, D].
    ragged: in one grouped product; else one expert after the other.

  Returns:
    [M, D], the dtype of x.
  """
  return (_ragged if ragged else _scan)(x, weights, chosen, gate, up, down, activation)


def _scan(x, weights, chosen, gate, up, down, activation):
  @jax.checkpoint  # or the backward pass keeps every expert's [M, F]
  def one(total, expert):
    number, gate, up, down = expert
    part = jnp.sum(jnp.where(chosen == number, weights, 0.0), axis=-1, keepdims=True)
    out = (activation(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))) @ down.astype(x.dtype)
    return total + part * out.astype(jnp.float32), None

  numbers = jnp.arange(gate.shape[0])
  total, _ = jax.lax.scan(one, jnp.zeros(x.shape, jnp.float32), (numbers, gate, up, down))
  return total.astype(x.dtype)


def _ragged(x, weights, chosen, gate, up, down, activation):
  count = chosen.shape[1]
  order = jnp.argsort(chosen.reshape(-1), stable=True)  # places of (token, choice) pairs, expert by expert
  sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0])
  rows = x[order // count]
  product = lambda rows, weight: jax.lax.ragged_dot(rows, weight.astype(x.dtype), sizes)
  out = product(activation(product(rows, gate)) * product(rows, up), down)
  out = out.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
  return jnp.zeros(x.shape, jnp.float32).at[order // count].add(out).astype(x.dtype)
