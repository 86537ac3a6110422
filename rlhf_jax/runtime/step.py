"""From a loss to a compiled train step.

A train step is a pure function (state, batch, …) → (state, metrics). This module
has the parts of which it is composed: gradients accumulated over micro-batches,
an update that is skipped if the loss or the gradient is not finite, and
`compile_step`, the only place where a step is jitted.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import random_keys
from rlhf_jax.runtime import optimizers
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.types import merge_params, Params, TrainState

Metrics = dict[str, jax.Array]  # name → [] float32


@flax.struct.dataclass
class Loss:
  """What a loss function returns: sums, so that micro-batches add up exactly.

  Attributes:
    total: [] float32, the sum to minimise; the loss is total / weight.
    weight: [] float32, the number of terms in the sum (tokens, prompts, …).
    means: statistics summed over the same terms, which are reported divided by the
      weight; a pair (sum, weight) is divided by its own weight instead.
    counts: statistics that are reported as they are.
    maxima: statistics of which the largest is reported; not negative.
  """

  total: jax.Array
  weight: jax.Array
  means: dict[str, Any]
  counts: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  maxima: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Parts:
  """A batch in parts whose number is known only when the step runs.

  Attributes:
    read: number of a part, [] int32 → the part, a tree of arrays; all have one shape.
    count: [] int32, how many parts there are, at least 1.
    limit: how many there may be.
    beside: parts of another shape, which belong to the same batch.
  """

  read: Callable[[jax.Array], Any]
  count: jax.Array
  limit: int
  beside: 'Parts | None' = None


LossFunction = Callable[[Params, Any, jax.Array], Loss]  # (params, batch, key) → Loss


def add_losses(first: Loss, second: Loss) -> Loss:
  """Adds two losses of one batch; a statistic that only one of them has is its own."""
  return Loss(
    total=first.total + second.total,
    weight=first.weight + second.weight,
    means=_join_statistics(jnp.add, first.means, second.means),
    counts=_join_statistics(jnp.add, first.counts, second.counts),
    maxima=_join_statistics(jnp.maximum, first.maxima, second.maxima),
  )


def _join_statistics(
  join: Callable[[Any, Any], Any], first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Any]:
  """Joins two dicts of numbers, or of pairs of numbers, name by name."""
  joined = {**first, **second}
  for name in first.keys() & second.keys():
    joined[name] = jax.tree.map(join, first[name], second[name])
  return joined


def _add_gradients(first: tuple[Loss, Params], second: tuple[Loss, Params]) -> tuple[Loss, Params]:
  """Adds losses and their gradients."""
  return add_losses(first[0], second[0]), jax.tree.map(jnp.add, first[1], second[1])


def create_train_state(
  params: Params,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
  layout: Layout,
  frozen: Params | None = None,
) -> TrainState:
  """Returns the state before the first update; every array is created sharded.

  Args:
    params: sharded parameters to train. The state takes them over: the first step
      donates their buffers.
    optimizer: the optimizer, whose state is sharded as the parameters are.
    key: [] the run's root random key.
    layout: the mesh the parameters are sharded on.
    frozen: the parameters of the model that are not trained.
  """
  replicated = layout.sharding()
  opt_shardings = optimizers.optimizer_shardings(
    optimizer,
    params,
    jax.tree.map(lambda leaf: leaf.sharding, params),
    replicated,
  )
  opt_state = layout.create(optimizer.init, opt_shardings, params)
  # The key is copied, as the first step donates it too.
  step, key = layout.create(lambda: (jnp.zeros((), jnp.int32), key), replicated)
  return TrainState(
    step=step,
    trained=params,
    opt_state=opt_state,
    key=key,
    frozen={'params': frozen} if frozen else {},
  )


def update_key(state: TrainState) -> jax.Array:
  """Returns the key of this step's update, which is the same after a resume."""
  return jax.random.fold_in(random_keys.for_purpose(state.key, 'update'), state.step)


def gradient_step(
  loss: LossFunction,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  batch: Any,
  *,
  microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
  """Updates a state once with the gradient of a loss; simple stages need no other step.

  If the loss or the gradient is not finite, the state is returned unchanged, with
  the same `step`.

  Args:
    loss: (params, batch, key) → Loss, with the parameters of the whole model,
      frozen ones too.
    optimizer: the optimizer that made `state.opt_state`.
    state: the state before the update.
    batch: a tree of arrays [B, …], B a multiple of `microbatches`.
    microbatches: the number of equal parts of the batch, which are computed one
      after the other to save memory.

  Returns:
    The state after the update, and the metrics of the loss and the update.
  """
  key = update_key(state)
  frozen = state.frozen.get('params', {})

  def loss_of_trained(trained: Params, batch: Any, key: jax.Array) -> Loss:
    return loss(merge_params(trained, frozen), batch, key)

  trained, opt_state, metrics = update_params(
    loss_of_trained,
    optimizer,
    state.trained,
    state.opt_state,
    batch,
    key,
    microbatches,
  )
  updates = update_is_finite(metrics).astype(jnp.int32)  # 0 or 1
  new_state = dataclasses.replace(
    state,
    step=state.step + updates,
    trained=trained,
    opt_state=opt_state,
  )
  return new_state, metrics


def update_params(
  loss: LossFunction,
  optimizer: optax.GradientTransformation,
  params: Params,
  opt_state: Any,
  batch: Any,
  key: jax.Array,
  microbatches: int = 1,
) -> tuple[Params, Any, Metrics]:
  """Makes one optimizer update: `compute_gradients`, then `apply_update`.

  Args:
    loss: (params, batch, key) → Loss.
    optimizer: the optimizer.
    params: the parameters to update.
    opt_state: the optimizer's state.
    batch: a tree of arrays [B, …], B a multiple of `microbatches`; or Parts.
    key: [] a random key; each of several parts gets its own.
    microbatches: the number of parts; 1 for Parts, which have their own.

  Returns:
    Parameters, optimizer state, and the metrics of loss and update. If loss or gradient is
    not finite, the first two are those that were given.
  """
  gradients, metrics = compute_gradients(loss, params, batch, key, microbatches)
  return apply_update(optimizer, params, opt_state, gradients, metrics)


def compute_gradients(
  loss: LossFunction,
  params: Params,
  batch: Any,
  key: jax.Array,
  microbatches: int = 1,
) -> tuple[Params, Metrics]:
  """Computes loss and gradient of a batch, in equal parts one after the other.

  As sums are accumulated and divided once, the results are the same for any
  number of parts.

  Args:
    loss: (params, batch, key) → Loss.
    params: the parameters to differentiate with respect to.
    batch: a tree of arrays [B, …], B a multiple of `microbatches`; or Parts.
    key: [] a random key; each of several parts gets its own.
    microbatches: the number of parts; 1 for Parts, which have their own.

  Returns:
    The gradients of total / weight, and the metrics `loss`, means, counts and maxima.
  """
  if isinstance(batch, Parts):
    value, gradients = _accumulate_parts(loss, params, batch, key)
  elif microbatches == 1:
    value, gradients = _loss_and_gradients(loss, params, batch, key)
  else:
    value, gradients = _accumulate(loss, params, batch, key, microbatches)
  weight = jnp.maximum(value.weight, 1e-9)  # a batch in which nothing counts has loss 0
  metrics = {'loss': value.total / weight}
  for name, statistic in value.means.items():
    if isinstance(statistic, tuple):  # a mean over other terms than those of the loss
      total, own_weight = statistic
      metrics[name] = total / jnp.maximum(own_weight, 1e-9)
    else:
      metrics[name] = statistic / weight
  metrics.update(value.counts | value.maxima)
  return jax.tree.map(lambda g: g / weight, gradients), metrics


def map_in_parts(
  function: Callable[[Any], Any],
  batch: Any,
  parts: int,
) -> Any:
  """Computes function(batch) part by part, to save memory.

  Args:
    function: maps a tree of arrays [b, …] to a tree of arrays [b, …], for any b.
    batch: a tree of arrays [B, …], B a multiple of `parts`.
    parts: the number of parts.

  Returns:
    The tree of arrays [B, …], rows in the order of the batch.
  """
  if parts == 1:
    return function(batch)
  results = jax.lax.map(function, _split_rows(batch, parts))
  return jax.tree.map(_join_rows, results)


def repeat(
  function: Callable[[jax.Array, Any], Any], carry: Any, count: jax.Array, limit: int
) -> Any:
  """Calls a function for the numbers below a count that is known only when the step runs.

  Args:
    function: (number [] int32, carry) → carry.
    carry: what the first call gets.
    count: [] int32, at least 1.
    limit: the largest that `count` can be. The program states it, so that a plan counts
      the most that the step can cost (planning/hlo.py).

  Returns:
    What the last call returned.
  """
  if limit == 1:
    return function(jnp.int32(0), carry)

  def goes_on(loop: tuple[jax.Array, Any]) -> jax.Array:
    number, _ = loop
    return (number < limit) & (number < count)

  def call(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    number, carry = loop
    return number + 1, function(number, carry)

  _, carry = jax.lax.while_loop(goes_on, call, (jnp.int32(0), carry))
  return carry


def apply_update(
  optimizer: optax.GradientTransformation,
  params: Params,
  opt_state: Any,
  gradients: Params,
  metrics: Metrics,
) -> tuple[Params, Any, Metrics]:
  """Applies one optimizer update; if loss or gradient is not finite, nothing changes.

  `update_is_finite` tells from the metrics which of the two happened. The update
  itself is not checked: Adam's update for a finite gradient is finite, and
  checking it would make XLA hold the whole update in memory before any parameter
  is written.

  Args:
    optimizer: the optimizer.
    params: the parameters.
    opt_state: the optimizer's state.
    gradients: a tree like `params`.
    metrics: with `loss`, as `compute_gradients` returns them.

  Returns:
    Parameters, optimizer state, and metrics with norm/gradient, norm/update and
    norm/params (of the parameters before the update).
  """
  metrics = {**metrics, 'norm/gradient': optax.tree.norm(gradients)}
  finite = update_is_finite(metrics)

  def keep_if_finite(new: Any, old: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, finite), new, old)

  updates, new_opt_state = optimizer.update(gradients, opt_state, params)
  metrics['norm/update'] = optax.tree.norm(updates)
  metrics['norm/params'] = optax.tree.norm(params)  # before the update
  new_params = optax.apply_updates(params, updates)
  return (
    keep_if_finite(new_params, params),
    keep_if_finite(new_opt_state, opt_state),
    metrics,
  )


def update_is_finite(metrics: Metrics) -> jax.Array:
  """Returns whether the update with these metrics was applied: loss and gradient are finite.

  Args:
    metrics: as `apply_update` returns them, or stacked along leading axes by a
      scan.

  Returns:
    A bool array of the shape of one metric.
  """
  return jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['norm/gradient'])


def compile_step(
  train_step: Callable[..., tuple[Any, Metrics]],
  layout: Layout,
  donate: bool = True,
) -> 'CompiledStep':
  """Compiles a pure train step for a mesh: jit, donation and shardings are applied here only.

  Args:
    train_step: (state, batch, *others) → (state, metrics), a pure function.
    layout: where batches are placed.
    donate: whether the buffers of the state are donated. If not, a state can be used
      again after a step, at the cost of a second copy of it in memory.
  """
  return CompiledStep(train_step, layout, donate)


class CompiledStep:
  """A compiled train step, called as step(state, batch, *others) → (state, metrics).

  - The state keeps its shardings; its buffers are donated, except for those of
    `state.frozen`.
  - Arrays of the batch that are on the host are sharded along their rows
    (`Layout.place`).
  - `others`, such as the parameters of a reference model, are passed on unchanged.
  - Metrics are replicated.

  The step is compiled once for each structure and shape of its arguments.
  """

  def __init__(
    self,
    train_step: Callable[..., tuple[Any, Metrics]],
    layout: Layout,
    donate: bool,
  ):
    self._train_step = train_step
    self._layout = layout
    self._donate = donate
    # One jitted function for each structure of the state, as its output shardings
    # (those of the input state) must be a tree of the same structure.
    self._jitted: dict[Any, Any] = {}

  def __call__(
    self,
    state: Any,
    batch: Any,
    *others: Any,
  ) -> tuple[Any, Metrics]:
    """Makes one step; an input state that is donated must not be used afterwards.

    Args:
      state: a flax.struct dataclass of sharded arrays, with the field `frozen`.
      batch: a tree of arrays [B, …], on the host or on the mesh.
      *others: further arguments of the train step.
    """
    frozen = state.frozen
    donated = state.replace(frozen={})
    step = self._jit(donated)
    new_state, metrics = step(donated, frozen, self._layout.place(batch), *others)
    return new_state.replace(frozen=frozen), metrics

  def lower(
    self,
    state: Any,
    batch: Any,
    *others: Any,
  ) -> jax.stages.Lowered:
    """Lowers the step for arguments like those of a call, or abstract arrays with shardings."""
    frozen = state.frozen
    donated = state.replace(frozen={})
    return self._jit(donated).lower(donated, frozen, batch, *others)

  def _jit(self, state: Any) -> Any:
    """Returns the jitted function (state without frozen, frozen, batch, …) for such a state."""
    structure = jax.tree.structure(state)
    if structure not in self._jitted:
      state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
      replicated = self._layout.sharding()
      self._jitted[structure] = jax.jit(
        self._step_of_parts,
        donate_argnums=0 if self._donate else (),  # the state
        out_shardings=(state_shardings, replicated),
      )
    return self._jitted[structure]

  def _step_of_parts(
    self,
    donated: Any,
    frozen: Any,
    batch: Any,
    *others: Any,
  ) -> Any:
    """Calls the train step; `frozen` is a separate argument, as it is not donated."""
    state = donated.replace(frozen=frozen)
    new_state, metrics = self._train_step(state, batch, *others)
    return new_state.replace(frozen={}), metrics


def _loss_and_gradients(
  loss: LossFunction,
  params: Params,
  batch: Any,
  key: jax.Array,
) -> tuple[Loss, Params]:
  """Returns the loss of a batch and the gradients of its total."""

  def total(params: Params) -> tuple[jax.Array, Loss]:
    value = loss(params, batch, key)
    return value.total, value

  (_, value), gradients = jax.value_and_grad(total, has_aux=True)(params)
  return value, gradients


def _accumulate(
  loss: LossFunction,
  params: Params,
  batch: Any,
  key: jax.Array,
  microbatches: int,
) -> tuple[Loss, Params]:
  """Returns the sums of `_loss_and_gradients` over parts of the batch, in one compiled scan."""
  parts = _split_rows(batch, microbatches)
  keys = jax.random.split(key, microbatches)

  def compute(batch: Any, key: jax.Array) -> tuple[Loss, Params]:
    return _loss_and_gradients(loss, params, batch, key)

  def add(sums: Any, part: Any) -> tuple[Any, None]:
    return _add_gradients(sums, compute(*part)), None

  # The sums start from zeros with the shapes and dtypes of what is added.
  first_part = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(compute, first_part, key)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, (parts, keys))
  return sums


def _accumulate_parts(
  loss: LossFunction, params: Params, parts: Parts, key: jax.Array
) -> tuple[Loss, Params]:
  """Returns the sums of `_loss_and_gradients` over as many parts as there are."""
  sums = _accumulate_equal_parts(loss, params, parts, key)
  if parts.beside is None:
    return sums
  return _add_gradients(sums, _accumulate_parts(loss, params, parts.beside, key))


def _accumulate_equal_parts(
  loss: LossFunction, params: Params, parts: Parts, key: jax.Array
) -> tuple[Loss, Params]:
  """Returns the sums over the parts of one shape."""

  def compute(number: jax.Array) -> tuple[Loss, Params]:
    part_key = jax.random.fold_in(key, number)
    return _loss_and_gradients(loss, params, parts.read(number), part_key)

  def add(number: jax.Array, sums: Any) -> Any:
    return _add_gradients(sums, compute(number))

  shapes = jax.eval_shape(compute, jnp.int32(0))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return repeat(add, zeros, parts.count, parts.limit)


def _split_rows(batch: Any, parts: int) -> Any:
  """Splits [B, …] into [parts, B / parts, …].

  Each part takes every n-th row (n = parts), so that it is spread over all devices.
  """
  return jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1),
    batch,
  )


def _join_rows(x: jax.Array) -> jax.Array:
  """Joins [parts, B / parts, …] to [B, …]; the inverse of `_split_rows`."""
  in_order = x.swapaxes(0, 1)  # [B / parts, parts, …]
  return in_order.reshape(-1, *x.shape[2:])
