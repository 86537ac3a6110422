"""Opens rewards by name: functions that give a score to each generated response."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import sources as reward_sources
from rlhf_jax.runtime import hosts
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.types import Array, Prompts, Samples

# (prompts, samples) → (scores [B * K] float32 on the mesh, metrics)
Score = Callable[[Prompts, Samples], tuple[Array, dict[str, Array]]]
# (prompts, samples, the records of the prompts) → (scores, how many responses failed)
SourceScore = Callable[[Prompts, Samples, Sequence[Prompt]], tuple[Array, int]]


def open_scores(
  context: Context,
  store: ModelStore,
  options: Any,
  *record_lists: Sequence[Prompt],
) -> list[Score]:
  """Opens the rewards of a section, as one weighted score for each list of records.

  Args:
    context: the context of the stage.
    store: the stage's models; a reward model on the same base shares it.
    options: of the stage, see RolloutOptions: reward, reward_weights,
      standardise_rewards, reward_functions, scorer, parts.
    *record_lists: what `Prompts.index` may point at, for example training and
      held-out prompts.

  Returns:
    A score for each list. Its metrics are `reward/failed`, the share of responses on
    which a reward failed, and, of several rewards, the mean of each.

  Raises:
    UserError: there is no such reward, or not one weight for each.
  """
  names = tuple(options.reward)
  weights = tuple(options.reward_weights) or (1.0,) * len(names)
  if not names or len(weights) != len(names):
    raise UserError(
      f'{context.where}.reward_weights: expected {len(names)} numbers, got {len(weights)}'
    )
  # Opened once: the lists of records share the parameters of reward models.
  scores = [open_score(context, store, name, options) for name in names]
  # Standardising takes means over the batch on all devices, so it is compiled.
  combine = jax.jit(
    functools.partial(
      combine_scores,
      names=names,
      weights=weights,
      standardise=options.standardise_rewards,
    )
  )

  def score(
    prompts: Prompts, samples: Samples, records: Sequence[Prompt]
  ) -> tuple[Array, dict[str, Array]]:
    results = [score_one(prompts, samples, records) for score_one in scores]
    total, metrics = combine([values for values, _ in results])
    failed = sum(failures for _, failures in results)
    return total, {
      **metrics,
      'reward/failed': np.float32(failed / len(total)),
    }

  return [functools.partial(score, records=records) for records in record_lists]


def combine_scores(
  values: Sequence[Array],
  names: Sequence[str],
  weights: Sequence[float],
  standardise: bool,
) -> tuple[Array, dict[str, Array]]:
  """Adds several rewards with their weights.

  Args:
    values: [N] float32 for each reward.
    names: the names of the rewards, for metrics.
    weights: one for each.
    standardise: first scale each to mean 0 and variance 1 over the batch.

  Returns:
    (their weighted sum [N], the mean of each before weighting if there are several).
  """
  total: Any = 0  # becomes [N]
  for value, weight in zip(values, weights, strict=True):
    centred = value
    if standardise:
      # The 1e-8 keeps a batch of equal scores at 0 instead of dividing by 0.
      centred = (value - jnp.mean(value)) * jax.lax.rsqrt(jnp.var(value) + 1e-8)
    total = total + weight * centred
  metrics = {}
  if len(names) > 1:
    metrics = {f'reward/{name}': jnp.mean(value) for name, value in zip(names, values, strict=True)}
  return total, metrics


def open_score(context: Context, store: ModelStore, name: str, options: Any) -> SourceScore:
  """Opens one reward by its name, see rewards/sources.py.

  Args:
    context: the context of the stage.
    store: the stage's models.
    name: as in a config's `reward`.
    options: a RewardSourceOptions with `parts`: in how many parts a reward model
      reads the responses.
  """
  source = reward_sources.parse_reward_source(name)
  if not source.scores_texts:
    return _open_model_score(store, name, options.parts)
  score_texts = reward_sources.open_reward_source(source, options, store.open_language_model)
  return functools.partial(_score_texts, context, score_texts)


def _open_model_score(store: ModelStore, name: str, parts: int) -> SourceScore:
  """Opens a reward model. It reads tokens, so responses stay on the device."""
  opened = store.open(name, head=True)
  params = opened.read()
  score_samples = reward.build_score(opened.model, parts)

  def score(prompts: Prompts, samples: Samples, records: Sequence[Prompt]) -> tuple[Array, int]:
    del records  # a model reads tokens
    return score_samples(params, prompts, samples), 0  # a model never fails

  return score


def _score_texts(
  context: Context,
  score_texts: reward_sources.Score,
  prompts: Prompts,
  samples: Samples,
  record_list: Sequence[Prompt],
) -> tuple[Array, int]:
  """Scores responses as texts: copies them to the host and their scores back to the mesh."""
  index, tokens, mask = hosts.to_host((prompts.index, samples.tokens, samples.mask))
  per_prompt = len(tokens) // len(index)  # K; row b * K + k responds to prompt b
  # A row that only pads the batch has index -1; it is scored as the first prompt and
  # not used.
  rows = [record_list[max(i, 0)] for i in np.repeat(index, per_prompt)]
  texts = [
    context.tokenizer.decode(row[inside].tolist()) for row, inside in zip(tokens, mask, strict=True)
  ]
  conversations = [records.conversation(row) for row in rows]
  values, failed = score_texts(conversations, texts, rows)
  return context.layout.place(values), failed
