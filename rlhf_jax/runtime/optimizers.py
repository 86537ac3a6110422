"""AdamW with clipping and a learning-rate schedule, from typed options."""

import dataclasses
from typing import Any

import jax
import optax

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.options import Natural, NonNegative, Positive, Share, ShareBelowOne
from rlhf_jax.types import Params

SCHEDULES = ('constant', 'linear', 'cosine')
MOMENT_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """Settings of AdamW, its schedule and gradient clipping."""

  learning_rate: NonNegative = 3e-4  # the peak
  schedule: str = 'cosine'  # after the warm-up: constant, linear or cosine
  final_scale: Share = 0.1  # the last learning rate as a fraction of the peak
  warmup_steps: Natural = 0  # updates in which the rate rises from 0 to the peak
  b1: ShareBelowOne = 0.9  # decay rate of the first moment
  b2: ShareBelowOne = 0.999  # decay rate of the second moment
  # Added to the root of the second moment; with 0, a gradient of 0 would give 0 / 0.
  eps: Positive = 1e-8
  weight_decay: NonNegative = 0.0  # decoupled; never applied to norms and biases
  clip_norm: NonNegative = 1.0  # global norm of the gradient; 0 = no clipping
  # The dtype of the first moment; bfloat16 halves its memory. The second moment
  # is always float32, as updates are divided by its root.
  moment_dtype: str = 'float32'

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if self.schedule != 'constant':
      return {}
    return {'final_scale': "schedule is 'constant'"}


def make_schedule(
  options: OptimizerOptions,
  updates: int,
) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made.

  The rate rises linearly from 0 to the peak in `warmup_steps` updates, then follows
  the schedule down to `final_scale` × the peak.

  Args:
    options: the optimizer's settings.
    updates: the number of updates in the whole run.

  Raises:
    UserError: there is no schedule of this name.
  """
  peak = options.learning_rate
  warmup = options.warmup_steps
  remaining = max(updates - warmup, 1)
  if options.schedule == 'constant':
    decay = optax.constant_schedule(peak)
  elif options.schedule == 'linear':
    decay = optax.linear_schedule(peak, peak * options.final_scale, remaining)
  elif options.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(peak, remaining, options.final_scale)
  else:
    raise UserError(
      f'optimizer.schedule: expected one of {", ".join(SCHEDULES)}, got {options.schedule!r}'
    )
  if not warmup:
    return decay  # which begins at the peak
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
  options: OptimizerOptions,
  updates: int,
) -> optax.GradientTransformation:
  """Returns AdamW, with global-norm clipping before it where `clip_norm` is set.

  Args:
    options: the optimizer's settings.
    updates: the number of updates in the whole run.

  Raises:
    UserError: a setting is wrong, or could turn a finite gradient into an update that
      is not finite.
  """
  _check_options(options)
  adamw = optax.adamw(
    make_schedule(options, updates),
    options.b1,
    options.b2,
    options.eps,
    weight_decay=options.weight_decay,
    mask=_decay_mask,
    mu_dtype=options.moment_dtype,
  )
  if not options.clip_norm:  # for optax, a norm of 0 would clip every gradient to 0
    return adamw
  return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)


def optimizer_shardings(
  optimizer: optax.GradientTransformation,
  params_shapes: Params,
  params_shardings: Any,
  replicated: jax.sharding.Sharding,
) -> Any:
  """Returns the shardings of the optimizer's state.

  Moments are sharded as their parameters are; counters are replicated.

  Args:
    optimizer: the optimizer.
    params_shapes: a tree of arrays or of their shapes.
    params_shardings: the same tree of shardings.
    replicated: the sharding of everything that does not mirror the parameters.
  """
  shapes = jax.eval_shape(optimizer.init, params_shapes)
  return optax.tree.map_params(
    optimizer,
    lambda _, sharding: sharding,
    shapes,
    params_shardings,
    transform_non_params=lambda _: replicated,
  )


def _check_options(options: OptimizerOptions) -> None:
  """Raises UserError for settings under which an update may not be finite."""
  if options.moment_dtype not in MOMENT_DTYPES:
    expected = ' or '.join(MOMENT_DTYPES)
    raise UserError(f'optimizer.moment_dtype: expected {expected}, got {options.moment_dtype!r}')
  options_lib.check_ranges(options, 'optimizer')


def _decay_mask(params: Params) -> Any:
  """Returns for each parameter whether weight decay applies: to all but norms and biases."""

  def decays(path: Any, _: Any) -> bool:
    name = jax.tree_util.keystr(path)
    return not ('norm' in name or 'bias' in name)  # anywhere in the path

  return jax.tree_util.tree_map_with_path(decays, params)
