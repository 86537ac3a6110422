"""Plans stages that only generate responses and train nothing."""

from collections.abc import Sequence
import functools
from typing import Any

from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_key,
  abstract_prompts,
  Program,
  StagePlan,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore


def plan_responses(
  context: Context,
  names: Sequence[str],
  sampling: SamplingOptions,
  *,
  batch_size: int,
  max_length: int,
  num_samples: int,
) -> StagePlan:
  """Plans the rollouts of several models.

  Args:
    context: the context of the stage, on an abstract layout.
    names: the models that respond, one after the other.
    sampling: how tokens are chosen.
    batch_size: prompts at once.
    max_length: tokens of a prompt.
    num_samples: K responses to each prompt.

  Returns:
    A plan with one program for each model.
  """
  layout = context.layout
  store = ModelStore(context)
  prompts = abstract_prompts(layout, batch_size, max_length)
  key = abstract_key(layout)
  resident = {}  # all models, as if they were kept together
  programs = []
  for name in names:
    opened = store.open(name)
    params = opened.read()
    resident[name] = params
    # On an abstract layout the sampler is one jitted function, which has `lower`.
    generate: Any = sampler.build_sampler(
      opened.model,
      sampling,
      context.tokenizer.stop_ids,
      context.tokenizer.pad_id,
      num_samples,
      layout=layout,
    )
    estimate = work.rollout(
      opened.model.config,
      layout,
      batch_size,
      max_length,
      sampling.max_new_tokens,
      num_samples,
    )
    lower = functools.partial(generate.lower, params, prompts, key)
    programs.append(Program(f'responses of {name}', lower, estimate))
  return StagePlan(resident, programs, ['judges and annotators are left out'])
