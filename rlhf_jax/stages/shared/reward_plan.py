"""Plans rewards: the memory each takes on the devices, and the programs it runs there."""

import functools
from typing import Any

import jax

from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_prompts,
  Program,
  StagePlan,
)
from rlhf_jax.rewards.sources import parse_reward_source
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared import packing
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Array, Params, Prompts, Samples


def add_reward(
  plan: StagePlan,
  layout: Layout,
  store: ModelStore,
  options: Any,
  name: str,
  prompts: Prompts,
  samples: Samples,
) -> None:
  """Adds a reward to the plan of a stage.

  Args:
    plan: the plan, which is changed in place.
    layout: an abstract layout.
    store: the stage's models.
    options: the stage's, see RolloutOptions.
    name: the name of the reward, as in a config.
    prompts: abstract, [B, P].
    samples: abstract, [B * K, R].
  """
  source = parse_reward_source(name)
  if source.head:
    _add_reward_model(plan, layout, store, options, name, prompts, samples)
  elif source.on_device:
    _add_scorer(plan, layout, store, options, name)
  # A reward that computes elsewhere needs no device: the plan only mentions it.
  elif source.kind.name == 'server':
    plan.notes.append(f'{name} runs on a server')
  else:
    plan.notes.append(f'{name} runs on the hosts')


def _add_reward_model(
  plan: StagePlan,
  layout: Layout,
  store: ModelStore,
  options: Any,
  name: str,
  prompts: Prompts,
  samples: Samples,
) -> None:
  """Adds a reward model, which reads all sequences in as many parts as the update."""
  opened = store.open_reward(name)
  params = opened.read()
  plan.resident[_unused_name(plan.resident, 'reward', name)] = params
  score = reward.build_score(opened.model, layout, options)
  responses = options.batch_size * options.num_samples
  new_tokens = options.sampling.max_new_tokens
  places = options.max_length + new_tokens
  sharing = packing.plan_sharing(
    range(responses), places, options.num_samples, [opened.model], layout, new_tokens, True
  )
  parts, rows, length = packing.divide(
    responses, options.parts, options.packed_rows, places, sharing
  )
  # Places of a row with logits: a scalar head needs none, unless it sees likelihoods.
  head_places = length if opened.model.config.likelihood_head else 0
  one_part = work.forward(opened.model.config, layout, rows, length, head_places)
  lower = functools.partial(score.lower, params, prompts, samples)
  plan.programs.append(Program('score', lower, one_part * parts))


def _add_scorer(
  plan: StagePlan,
  layout: Layout,
  store: ModelStore,
  options: Any,
  name: str,
) -> None:
  """Adds a language model that grades responses (direct RLAIF).

  Its prompts are texts, whose lengths a plan does not know: they count as the
  longest that it reads, and its options as one token each.
  """
  model_name = parse_reward_source(name).model_name
  assert model_name is not None  # every scorer names a model
  opened = store.open_reader(model_name)
  params = opened.read()
  plan.resident[_unused_name(plan.resident, 'scorer', name)] = params
  scorer = options.scorer
  prompts = abstract_prompts(layout, scorer.batch_size, scorer.max_length)
  grade = jax.jit(functools.partial(next_token_logprobs, opened.model))
  responses = options.batch_size * options.num_samples
  program = Program(
    'grade',
    functools.partial(grade.lower, params, prompts),
    work.forward(opened.model.config, layout, scorer.batch_size, scorer.max_length, 1),
    calls=-(-responses // scorer.batch_size),  # rounded up
  )
  plan.programs.append(program)
  plan.notes.append(
    f'the lengths of what {name} reads: each response counts as {scorer.max_length} tokens'
  )


def next_token_logprobs(model: Model, params: Params, prompts: Prompts) -> Array:
  """Computes the logprobs of the token after each prompt, as a scorer does.

  Args:
    model: its definition.
    params: its parameters.
    prompts: left-padded, [B, P].

  Returns:
    [B, V] float32.
  """
  positions = sampler.prompt_positions(prompts.mask)  # [B, P]
  segment_ids = prompts.mask.astype('int32')  # 1 = a token of the prompt
  hidden, _ = model.apply(params, prompts.tokens, positions, segment_ids)
  # Prompts are left-padded, so the last place is the last token of every one.
  return jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[:, -1]))


def _unused_name(resident: dict[str, Any], kind: str, name: str) -> str:
  """Returns a name that no resident tree has: the kind, or kind and name where that is taken."""
  return kind if kind not in resident else f'{kind} {name}'
