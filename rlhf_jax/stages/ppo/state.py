"""What a PPO step is made of: definitions, state, and what flows between its functions."""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp

from rlhf_jax.models import lora
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.ppo.options import Options
from rlhf_jax.stages.shared import off_policy
from rlhf_jax.stages.shared.off_policy import SamplerState
from rlhf_jax.stages.shared.rollout import RolloutDefinitions
from rlhf_jax.types import (
  Array,
  merge_params,
  Params,
  Sequences,
)


@dataclasses.dataclass(frozen=True)
class Definitions(RolloutDefinitions):
  """The definitions that a PPO step is compiled with; they hold no arrays.

  Attributes:
    value_model: the value model's definition; the policy's own if the value is a head
      on its trunk.
  """

  value_model: Model


class PPOState(SamplerState):
  """The train state of policy and value model.

  Attributes:
    value_trained: the trained parameters of the value model; if it shares the policy's
      trunk, only those of its head.
    kl_coefficient: [] float32, β.
  """

  value_trained: dict
  kl_coefficient: Array

  @property
  def value_params(self) -> Params:
    """The complete value model: what is trained and what is frozen."""
    return merge_params(self.value_trained, self.frozen.get('value_params', {}))


class AssessedRollout(flax.struct.PyTreeNode):
  """A rollout with its advantages and returns; N = B * K rows.

  Attributes:
    sequences: prompts and responses, [N, P + R].
    mask: [N, R] bool, the response up to and including its end token.
    value_mask: [N, R] bool, where the value model learns: the mask and the score's
      place.
    logprobs: [N, R] float32, of the policy before the update.
    reference_logprobs: [N, R] float32; None without a reference.
    values: [N, R] float32, of the value model before the update.
    advantages: [N, R] float32.
    returns: [N, R] float32.
    weights: [N, R] float32, importance weights for another sampler.
    value_weight: [N] float32, the same in all rows: response tokens for each
      place in `value_mask`, over the rows that make an update. The loss is
      divided by the number of response tokens; with this weight, the value loss
      is a mean over its own places, however a minibatch is cut into
      micro-batches.
  """

  sequences: Sequences
  mask: Array
  value_mask: Array
  logprobs: Array
  reference_logprobs: Array | None
  values: Array
  advantages: Array
  returns: Array
  weights: Array
  value_weight: Array


class Documents(flax.struct.PyTreeNode):
  """Rows for PPO-ptx, with the weight of their loss.

  Attributes:
    rows: [n, T].
    weight: [n] float32, the same in all rows: response tokens for each target of the
      documents, over the rows that make an update.
  """

  rows: Sequences
  weight: Array


class Evaluated(NamedTuple):
  """The outputs of all models on N responses, before the update."""

  logprobs: Array  # [N, R] float32, of the policy
  # [N, R] float32, of the policy's distributions; None if its logprobs are the sampler's
  entropies: Array | None
  values: Array  # [N, R] float32
  reference_logprobs: Array | None  # [N, R] float32


class Forward(NamedTuple):
  """The outputs of policy and value model on n responses."""

  logprobs: Array  # [n, R] float32
  entropies: Array  # [n, R] float32
  values: Array  # [n, R] float32, at the state before each response token


def create_state(
  policy: Params,
  value: Params,
  definitions: Definitions,
  key: Array,
  options: Options,
) -> PPOState:
  """Creates the state before the first step.

  Args:
    policy: the policy's sharded parameters. The state takes them over: the first step
      donates their buffers.
    value: those of the value model, likewise.
    definitions: of which optimizer and layout are used.
    key: [] the run's root random key.
    options: of which `kl_coefficient` and `sampler_every` are read.
  """
  layout = definitions.layout
  trained, frozen = lora.split_trainable(policy)
  value_trained, value_frozen = lora.split_trainable(value)
  # One optimizer over both models, so that their gradients are clipped by one norm.
  joint = steps.create_train_state(
    {'policy': trained, 'value': value_trained},
    definitions.optimizer,
    key,
    layout,
  )
  return PPOState(
    step=joint.step,
    trained=trained,
    opt_state=joint.opt_state,
    key=joint.key,
    sampler_trained=off_policy.first_sampler(layout, trained, options),
    value_trained=value_trained,
    frozen={'params': frozen, 'value_params': value_frozen},
    kl_coefficient=layout.create(
      functools.partial(jnp.float32, options.kl_coefficient),
      layout.sharding(),
    ),
  )
