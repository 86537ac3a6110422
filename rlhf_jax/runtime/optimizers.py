"""AdamW or Muon with clipping and a learning-rate schedule, from typed options."""

import dataclasses
from typing import Any

import jax
import optax

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.options import Natural, NonNegative, Positive, Share, ShareBelowOne
from rlhf_jax.types import MATRIX_AXES, Params

NAMES = ('adamw', 'muon')
SCHEDULES = ('constant', 'linear', 'cosine')
MOMENT_DTYPES = ('float32', 'bfloat16')

# The root mean square of an update is this share of the learning rate, about that of AdamW's, so
# that the same rates serve both (Liu et al. 2025, arXiv:2502.16982, equation 4).
_MUON_RMS = 0.2
# The rescaling of this name spares an iteration or two of the usual five (Boissin et al. 2025,
# arXiv:2512.04632).
_MUON_ITERATIONS = 3
_MUON_PRECONDITIONING = 'aol'


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
  """Settings of the optimizer, its schedule and gradient clipping."""

  # adamw; or muon (Jordan et al. 2024), which orthogonalises the updates of the layers' matrices,
  # and leaves everything else to AdamW
  name: str = 'adamw'
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
  """Returns the optimizer, with global-norm clipping before it where `clip_norm` is set.

  Args:
    options: the optimizer's settings.
    updates: the number of updates in the whole run.

  Raises:
    UserError: a setting is wrong, or could turn a finite gradient into an update that
      is not finite.
  """
  _check_options(options)
  make = _make_muon if options.name == 'muon' else _make_adamw
  optimizer = make(options, make_schedule(options, updates))
  if not options.clip_norm:  # for optax, a norm of 0 would clip every gradient to 0
    return optimizer
  return optax.chain(optax.clip_by_global_norm(options.clip_norm), optimizer)


def _make_adamw(options: OptimizerOptions, rate: optax.Schedule) -> optax.GradientTransformation:
  """Makes AdamW (Loshchilov and Hutter 2019)."""
  return optax.adamw(
    rate,
    options.b1,
    options.b2,
    options.eps,
    weight_decay=options.weight_decay,
    mask=_decay_mask,
    mu_dtype=options.moment_dtype,
  )


def _make_muon(options: OptimizerOptions, rate: optax.Schedule) -> optax.GradientTransformation:
  """Makes Muon for the matrices of the layers, and AdamW for everything else."""
  muon = optax.contrib.muon(
    rate,
    ns_steps=_MUON_ITERATIONS,
    preconditioning=_MUON_PRECONDITIONING,
    eps=options.eps,
    weight_decay=options.weight_decay,
    mu_dtype=options.moment_dtype,
    muon_weight_dimension_numbers=_list_muon_axes,
    consistent_rms=_MUON_RMS,
  )
  # Muon has an Adam of its own for the rest, but with Nesterov's momentum and without a mask.
  return optax.partition({'muon': muon, 'adamw': _make_adamw(options, rate)}, _choose_optimizers)


def _choose_optimizers(params: Params) -> Any:
  """Returns for each parameter the name of its optimizer."""

  def choose(path: Any, leaf: Any) -> str:
    return 'adamw' if _find_muon_axes(path, leaf) is None else 'muon'

  return jax.tree_util.tree_map_with_path(choose, params)


def _list_muon_axes(params: Params) -> Any:
  """Returns the axes of each of the matrices that Muon updates."""
  return jax.tree_util.tree_map_with_path(_find_muon_axes, params)


def _find_muon_axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
  """Returns the axes of a matrix of a layer; None for any other parameter."""
  name = path[-1].key
  if name not in MATRIX_AXES or leaf.ndim < sum(MATRIX_AXES[name]):
    return None
  # Axes before these count layers or experts, each with a matrix of its own.
  inputs, outputs = MATRIX_AXES[name]
  return optax.contrib.MuonDimensionNumbers(
    reduction_axis=tuple(range(-inputs - outputs, -outputs)),
    output_axis=tuple(range(-outputs, 0)),
  )


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
  by_path = dict(jax.tree_util.tree_leaves_with_path(params_shardings))

  def find(path: Any, leaf: Any) -> Any:
    # A moment stands under the path of its parameter, behind names of the optimizer's own.
    for start in range(len(path)):
      if path[start:] in by_path:
        return by_path[path[start:]]
    return replicated

  return jax.tree_util.tree_map_with_path(find, jax.eval_shape(optimizer.init, params_shapes))


def _check_options(options: OptimizerOptions) -> None:
  """Raises UserError for settings under which an update may not be finite."""
  if options.name not in NAMES:
    raise UserError(f'optimizer.name: expected {" or ".join(NAMES)}, got {options.name!r}')
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
