"""Corrects for responses that another policy sampled than the one that learns from them.

The two differ where the policy that responds is an older one (`sampler_every`), and, by
less, where the sampler computes otherwise than the training forward pass: another kernel,
a coarser dtype. Importance weights π_old / π_sampler correct for both. Where the two
agree, the weights are 1 up to rounding.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import masked, policy_gradient
from rlhf_jax.options import Count, NonNegative
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import rollout
from rlhf_jax.stages.shared.model_store import copy_tree
from rlhf_jax.types import Array, merge_params, Params, Samples, TrainState

# Nats per token by which sampler and training may differ before a warning: about
# ten times what bfloat16 costs.
_LARGEST_GAP = 0.1


@dataclasses.dataclass(frozen=True)
class OffPolicyOptions(rollout.RolloutOptions):
  """The settings of a stage that corrects for its sampler."""

  sampler_every: Count = 1  # the policy that responds is updated every so many steps
  # C of the importance weights between the policy that responds and the one that
  # learns; 0 = none.
  weight_limit: NonNegative = 10.0
  weight_rule: str = 'truncate'  # weights above C: truncate to C; mask: outside [1/C, C] they are 0
  # sequence: all tokens of a response have its weight, which is unbiased below C;
  # token: each has its own, which varies less and corrects for little.
  weight_level: str = 'sequence'

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = super().unread()
    if not self.weight_limit:
      unread |= dict.fromkeys(('weight_rule', 'weight_level'), 'weight_limit is 0')
    return unread


class SamplerState(TrainState):
  """A train state that also holds the policy that responds, where that is an older one.

  Attributes:
    sampler_trained: the trainable parameters of the policy that responds; an empty
      tree where that is the current policy.
  """

  sampler_trained: dict

  @property
  def sampler_params(self) -> Params:
    """The complete policy that responds."""
    trained = self.sampler_trained or self.trained  # {} = the current policy responds
    return merge_params(trained, self.frozen.get('params', {}))


def check_options(options: OffPolicyOptions, where: str) -> None:
  """Checks the options.

  Args:
    options: the options of the stage.
    where: the section's name, for messages.

  Raises:
    UserError: an unknown choice, or a limit with which masking would leave nothing.
  """
  choices = {
    'weight_rule': tuple(policy_gradient.SAMPLER_WEIGHTS),
    'weight_level': ('token', 'sequence'),
  }
  for name, known in choices.items():
    value = getattr(options, name)
    if value not in known:
      raise UserError(f'{where}.{name}: expected one of {", ".join(known)}, got {value!r}')
  if options.weight_rule == 'mask' and 0 < options.weight_limit <= 1:
    raise UserError(
      f'{where}.weight_limit: expected a number above 1, or 0 for no weights, as weight_rule=mask '
      f'keeps what lies between 1/C and C; got {options.weight_limit:g}'
    )


def trusts_sampler(model: Model, options: OffPolicyOptions) -> bool:
  """Tells whether the sampler's log-probabilities are, to the bit, those before the update.

  So they are with exact numerics where the current policy responds: a step need not compute
  them again. `measure_gap` shows whether it is so.
  """
  return model.config.is_exact and options.sampler_every == 1


def measure_gap(value: steps.Loss, logprobs: Array, sampled: Array, mask: Array) -> steps.Loss:
  """Adds to a loss how far its forward pass is from the sampler; before any update, 0 is expected.

  Args:
    value: the loss of n responses.
    logprobs: [n, R] float32, of the policy that learns.
    sampled: [n, R] float32, of the sampler.
    mask: [n, R] bool.
  """
  gap = jnp.where(mask, jnp.abs(logprobs - sampled), 0.0)
  mean = (jnp.sum(gap), masked.count(mask))
  return dataclasses.replace(
    value,
    means=value.means | {'policy/sampler_gap_mean': mean},
    maxima=value.maxima | {'policy/sampler_gap': jnp.max(gap)},
  )


def importance_weights(
  old_logprobs: Array, samples: Samples, options: OffPolicyOptions
) -> tuple[Array, dict[str, Array]]:
  """Computes the importance weights of the tokens of a rollout.

  Args:
    old_logprobs: [N, R] float32, of the policy before the update.
    samples: the responses with the log-probabilities of their sampler, [N, R].
    options: the options of the stage.

  Returns:
    [N, R] float32; and metrics, [] float32 each.
  """
  mask = samples.mask
  weights = jnp.ones_like(old_logprobs)
  changed = jnp.zeros_like(mask)
  if options.weight_limit:
    ratios = policy_gradient.sampling_ratios(
      old_logprobs, samples.logprobs, mask, options.weight_level
    )
    weights = policy_gradient.SAMPLER_WEIGHTS[options.weight_rule](ratios, options.weight_limit)
    changed = weights != ratios
  metrics = {
    'weight/mean': masked.mean(weights, mask),
    'weight/effective_share': policy_gradient.effective_share(weights, mask),
    'weight/limited': masked.mean(changed, mask),
  }
  return weights, metrics


def first_sampler(layout: Layout, trained: Params, options: OffPolicyOptions) -> Params:
  """Returns the trainable parameters of the policy that responds in the first step.

  Args:
    layout: the mesh.
    trained: the trainable parameters of the policy.
    options: of which `sampler_every` is read.

  Returns:
    A copy of `trained`; an empty tree where the current policy always responds.
  """
  if options.sampler_every <= 1:
    return {}
  # A copy, as the step donates both trees and must not be given one buffer twice.
  return copy_tree(layout, trained)


def next_sampler(trained: Params, older: Params, step: Array, options: OffPolicyOptions) -> Params:
  """Returns the trainable parameters of the policy that responds in the next step.

  Args:
    trained: the trainable parameters of the policy after the update.
    older: the trainable parameters of the policy that responded.
    step: [] int32, steps made.
    options: of which `sampler_every` is read.

  Returns:
    A tree like `trained`; an empty one where the current policy always responds.
  """
  if options.sampler_every <= 1:
    return {}
  renew = step % options.sampler_every == 0

  def choose(new: Array, old: Array) -> Array:
    return jnp.where(renew, new, old)

  return jax.tree.map(choose, trained, older)


def build_warning(options: OffPolicyOptions) -> Callable[[dict[str, float]], str]:
  """Builds what warns of a sampler that disagrees with the training forward pass.

  Args:
    options: the options of the stage; an older sampler is meant to disagree.

  Returns:
    (metrics of a step) → a warning; '' = none.
  """
  corrected = 'importance weights are off (weight_limit=0)'
  if options.weight_limit:
    corrected = f'importance weights up to {options.weight_limit:g} correct for it in part'

  def warn(metrics: dict[str, float]) -> str:
    gap = metrics['policy/sampler_gap_mean']
    if options.sampler_every > 1 or gap <= _LARGEST_GAP:
      return ''
    return (
      f'the sampler and the training forward pass differ by {gap:.2g} nats a token (up to '
      f'{_LARGEST_GAP:g} is usual), so that the responses are not those of the policy that '
      f'learns; {corrected}'
    )

  return warn
