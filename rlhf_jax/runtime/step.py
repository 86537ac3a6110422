"""From a loss to a compiled train step: micro-batches, gradient clipping, optimizer, guard, donation, shardings."""

import math
from typing import Any, Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax.errors import UserError
from rlhf_jax.types import TrainState, merge_params

OPTIMIZER = dict(
    learning_rate=3e-4,  # the peak
    schedule='cosine',  # after the warm-up: constant, linear or cosine
    final_scale=0.1,  # the last learning rate as a part of the peak
    warmup_steps=0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,  # decoupled; never on norms and biases
    clip_norm=1.0,  # global norm of the gradient; 0 = off
    moment_dtype='float32',  # of the first moment; bfloat16 halves it (the second, whose root divides, stays float32)
)

SCHEDULES = ('constant', 'linear', 'cosine')


@flax.struct.dataclass
class Loss:
  """What a loss function returns: sums, so that micro-batches add up exactly.

  Attributes:
    total: [] float32, the sum to minimise; the loss is total / weight.
    weight: [] float32, what the sum is over (tokens, prompts, …).
    means: statistics summed over the same, reported divided by the weight; a pair brings a weight of its own.
    counts: statistics reported as they are.
  """
  total: jax.Array
  weight: jax.Array
  means: dict
  counts: dict = flax.struct.field(default_factory=dict)


def make_schedule(config, updates: int):
  """Learning rate by update: a linear warm-up, then the schedule down to final_scale × the peak."""
  if config.schedule not in SCHEDULES:
    raise UserError(f'optimizer.schedule: expected one of {", ".join(SCHEDULES)}, got {config.schedule!r}')
  peak, left = config.learning_rate, max(updates - config.warmup_steps, 1)
  decay = {
      'constant': lambda: optax.constant_schedule(peak),
      'linear': lambda: optax.linear_schedule(peak, peak * config.final_scale, left),
      'cosine': lambda: optax.cosine_decay_schedule(peak, left, config.final_scale),
  }[config.schedule]()
  warm = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
  return optax.join_schedules([warm, decay], [config.warmup_steps]) if config.warmup_steps else decay


def make_optimizer(config, updates: int) -> optax.GradientTransformation:
  """AdamW with global-norm clipping (see OPTIMIZER) for a run of so many updates.

  Raises:
    UserError: a value with which a finite gradient could make an update that is not.
  """
  def decayed(params):
    kept = lambda path: any(word in jax.tree_util.keystr(path) for word in ('norm', 'bias'))
    return jax.tree_util.tree_map_with_path(lambda path, _: not kept(path), params)
  if config.moment_dtype not in ('float32', 'bfloat16'):
    raise UserError(f'optimizer.moment_dtype: expected float32 or bfloat16, got {config.moment_dtype!r}')
  if not (config.eps > 0 and 0 <= config.b1 < 1 and 0 <= config.b2 < 1 and math.isfinite(config.learning_rate)):
    raise UserError('optimizer: expected a finite learning_rate, eps above 0, b1 and b2 from 0 and below 1; got '
                    + ', '.join(f'{name} {config[name]}' for name in ('learning_rate', 'eps', 'b1', 'b2')))
  adamw = optax.adamw(make_schedule(config, updates), config.b1, config.b2, config.eps,
                      weight_decay=config.weight_decay, mask=decayed, mu_dtype=config.moment_dtype)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def optimizer_shardings(optimizer, params_shapes, params_shardings, replicated):
  """The optimizer's state lies as the parameters do; its counters are on every device."""
  shapes = jax.eval_shape(optimizer.init, params_shapes)
  return optax.tree.map_params(optimizer, lambda _, sharding: sharding, shapes, params_shardings,
                               transform_non_params=lambda _: replicated)


def create_train_state(params, optimizer, key, layout, frozen=None) -> TrainState:
  """The state before the first update; every leaf is born sharded.

  Args:
    params: sharded parameters to train; given up to the state.
    key: [] the run's root key.
    frozen: the rest of the model, which stays as it is.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
  opt_shardings = optimizer_shardings(optimizer, params, shardings, layout.sharding())
  opt_state = layout.create(optimizer.init, opt_shardings, params)
  step, key = layout.create(lambda: (jnp.zeros((), jnp.int32), key), layout.sharding())
  return TrainState(step=step, trained=params, opt_state=opt_state, key=key, frozen={'params': frozen} if frozen else {})


def compute_gradients(loss: Callable[..., Loss], params, batch, key, microbatches: int = 1):
  """Loss and gradient of a batch, in equal parts one after the other: the same numbers for any number of parts.

  Args:
    loss: (params, batch, key) → Loss.
    batch: a tree of arrays [B, …], B a multiple of microbatches.

  Returns:
    (gradients of total / weight, metrics: dict of [] float32).
  """
  def part(batch, key):
    def total(params):
      value = loss(params, batch, key)
      return value.total, value
    (_, value), grads = jax.value_and_grad(total, has_aux=True)(params)
    return value, grads

  if microbatches == 1:
    value, grads = part(batch, key)
  else:
    parts = _cut(batch, microbatches)
    keys = jax.random.split(key, microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), key))
    add = lambda sums, one: (jax.tree.map(jnp.add, sums, part(*one)), None)
    (value, grads), _ = jax.lax.scan(add, zeros, (parts, keys))
  weight = jnp.maximum(value.weight, 1e-9)
  mean = lambda x: x[0] / jnp.maximum(x[1], 1e-9) if isinstance(x, tuple) else x / weight
  metrics = {'loss': value.total / weight, **{name: mean(x) for name, x in value.means.items()}, **value.counts}
  return jax.tree.map(lambda g: g / weight, grads), metrics


def map_in_parts(function: Callable[..., Any], batch, parts: int):
  """function(batch) computed part by part to save memory; arrays [B, …] in and out, B a multiple of parts."""
  if parts == 1:
    return function(batch)
  out = jax.lax.map(function, _cut(batch, parts))
  return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)


def _cut(batch, parts):
  """[B, …] → [parts, B / parts, …]; every part takes every n-th row, so that it lies on all devices."""
  return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def apply_update(optimizer, params, opt_state, grads, metrics):
  """One optimizer update; where loss or gradient is not finite, nothing changes but the metrics say so. (Adam's update of
  a finite gradient is finite. Were it looked at too, XLA would keep all of it before writing anything.)

  Returns:
    (params, opt_state, metrics with norm/gradient, norm/update and norm/params).
  """
  metrics = {**metrics, 'norm/gradient': optax.tree.norm(grads)}
  fine = update_is_finite(metrics)
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
  updates, new_opt_state = optimizer.update(grads, opt_state, params)
  metrics |= {'norm/update': optax.tree.norm(updates), 'norm/params': optax.tree.norm(params)}
  return keep(optax.apply_updates(params, updates), params), keep(new_opt_state, opt_state), metrics


def update_is_finite(metrics):
  """Whether an update with these metrics was made: loss and gradient are finite. The shape of a metric, bool."""
  return jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['norm/gradient'])


def build(loss: Callable[..., Loss], optimizer, layout, microbatches: int = 1) -> Callable[..., Any]:
  """The train step of a loss.

  Args:
    loss: (params, batch, key, *frozen) → Loss.
    microbatches: parts of the batch, accumulated in one compiled scan.

  Returns:
    step(state, host batch, *frozen) → (state, metrics). The state's buffers are given up; its step and parameters
    stay as they were where the loss is not finite.
  """
  def train_step(state, batch, *frozen):
    key = jax.random.fold_in(state.key, state.step)
    rest = state.frozen.get('params', {})
    grads, metrics = compute_gradients(lambda p, b, k: loss(merge_params(p, rest), b, k, *frozen), state.trained, batch, key, microbatches)
    trained, opt_state, metrics = apply_update(optimizer, state.trained, state.opt_state, grads, metrics)
    state = state.replace(step=state.step + update_is_finite(metrics).astype(jnp.int32), trained=trained, opt_state=opt_state)
    return state, metrics

  compiled = compile_step(train_step, layout)

  def step(state, batch, *frozen):
    return compiled(state, layout.place(batch), *frozen)

  step.lower = compiled.lower
  return step


def compile_step(train_step, layout):
  """Jit of (state, batch, *frozen) → (state, metrics): the state keeps its shardings and gives up its buffers (but the
  frozen ones), metrics are whole on every device. Compiled once for each tree and shape of its arguments; `lower` of it
  takes the same, or shapes with shardings."""
  compiled = {}

  def apart(state, frozen, *rest):
    state, metrics = train_step(state.replace(frozen=frozen), *rest)
    return state.replace(frozen={}), metrics

  def program(state):
    which = jax.tree.structure(state)
    if which not in compiled:
      shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
      compiled[which] = jax.jit(apart, donate_argnums=0, out_shardings=(shardings, layout.sharding()))
    return compiled[which]

  def call(state, *rest):
    state, frozen = state.replace(frozen={}), state.frozen
    state, metrics = program(state)(state, frozen, *rest)
    return state.replace(frozen=frozen), metrics

  def lower(state, *rest):
    state, frozen = state.replace(frozen={}), state.frozen
    return program(state).lower(state, frozen, *rest)

  call.lower = lower
  return call
