"""Opens rewards by name: functions that give a score to each generated response."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax import options as options_lib
from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import sources as reward_sources
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.runtime import hosts
from rlhf_jax.stages import reward
from rlhf_jax.stages.shared import model_sources, packing
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore, no_reward_model, OpenModel
from rlhf_jax.types import Array, Params, Prompts, Samples, Sequences

TEXT_WIDTH = 64  # texts that are tokenised again are padded to a multiple of it


@dataclasses.dataclass(frozen=True)
class RewardOptions(reward_sources.RewardSourceOptions):
  """The settings of a section that say what is rewarded, see RolloutOptions."""

  reward: tuple[str, ...] = ('reward',)
  reward_weights: tuple[float, ...] = ()


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
      standardise_rewards, reward_functions, scorer, parts, packed_rows.
    *record_lists: what `Prompts.index` may point at, for example training and
      held-out prompts.

  Returns:
    A score for each list. Its metrics are `reward/failed`, the share of responses on
    which a reward failed, and, of several rewards, the mean of each.

  Raises:
    UserError: there is no such reward, or not one weight for each.
  """
  names = tuple(options.reward)
  _check_weights(context, names, options.reward_weights)
  weights = tuple(options.reward_weights) or (1.0,) * len(names)
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


def check_scores(context: Context) -> None:
  """Checks the rewards of a section before any stage runs.

  Args:
    context: the context of the stage, whose options have those of RolloutOptions.

  Raises:
    UserError: a reward cannot be opened, or there is not one weight for each.
  """
  options = options_lib.from_section(RewardOptions, context.section)
  _check_weights(context, options.reward, options.reward_weights)
  for name in options.reward:
    check_score(context, name, options)


def check_score(context: Context, name: str, options: RewardSourceOptions) -> None:
  """Checks that a reward can be opened, and that a reward model has a scalar head.

  Args:
    context: the context of the stage.
    name: as in a config's `reward`.
    options: the options of the kinds of rewards.

  Raises:
    UserError: it cannot be opened.
  """
  source = reward_sources.parse_reward_source(name)
  if not source.head:
    reward_sources.check_reward_source(source, options)
    return
  model = model_sources.find_model(name, context.workdir, context.config.stages)
  if not model.config.head:
    raise no_reward_model(context, name)


def _check_weights(context: Context, names: Sequence[str], weights: Sequence[float]) -> None:
  """Raises UserError unless there are rewards, and no weights or one for each."""
  if not names or len(weights) not in (0, len(names)):
    raise UserError(
      f'{context.where}.reward_weights: expected {len(names)} numbers, got {len(weights)}'
    )


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
    options: a RewardSourceOptions with `parts` and `packed_rows`: how a reward model
      reads the responses.
  """
  source = reward_sources.parse_reward_source(name)
  if not source.scores_texts:
    return _open_model_score(context, store, name, options)
  score_texts = reward_sources.open_reward_source(source, options, store.open_language_model)
  return functools.partial(_score_texts, context, score_texts)


def _open_model_score(
  context: Context,
  store: ModelStore,
  name: str,
  options: Any,
) -> SourceScore:
  """Opens a reward model.

  It reads the run's tokens, so responses stay on the device. One whose ids mean
  something else reads the texts with its own tokenizer and its own template.
  """
  opened = store.open_reward(name)
  params = opened.read()
  if opened.tokenizer is not context.tokenizer:
    return _build_text_score(context, opened, params, options)
  score_samples = reward.build_score(opened.model, context.layout, options)

  def score(prompts: Prompts, samples: Samples, records: Sequence[Prompt]) -> tuple[Array, int]:
    del records  # a model reads tokens
    return score_samples(params, prompts, samples), 0  # a model never fails

  return score


def open_text_score(
  context: Context, store: ModelStore, name: str, batch_size: int
) -> Callable[[Sequence[list[dict]], Sequence[str]], np.ndarray]:
  """Opens a reward model as a function of texts.

  Args:
    context: the context of the stage.
    store: the stage's models.
    name: of the reward model, as `init` names it.
    batch_size: texts that it reads at once.

  Returns:
    score(conversations, a response to each) → [N] float32.
  """
  opened = store.open_reward(name)
  params = opened.read()
  tokenizer = opened.tokenizer
  longest = opened.model.config.max_length
  score_sequences = jax.jit(functools.partial(reward.score_sequences, opened.model))

  def score(conversations: Sequence[list[dict]], texts: Sequence[str]) -> np.ndarray:
    # Each text once: a judge compares it with several others, in both orders.
    places: dict[tuple[tuple[int, ...], int], int] = {}
    numbers = []
    for conversation, text in zip(conversations, texts, strict=True):
      exchange = tokenizer.exchange(conversation, text)
      ids = tuple([*exchange.prompt, *exchange.response][-longest:])
      numbers.append(places.setdefault((ids, len(exchange.response)), len(places)))
    encoded = [*places]
    values = []
    begins = range(0, len(encoded), batch_size)
    for begin in tqdm.tqdm(begins, desc='judge', unit='batch', leave=False, disable=None):
      batch = encoded[begin : begin + batch_size]
      # Filled up with the last text, so that all batches are of one size.
      filled = batch + batch[-1:] * (batch_size - len(batch))
      sequences = context.layout.place(_pad_sequences(filled, tokenizer.pad_id, longest))
      values.append(hosts.to_host(score_sequences(params, sequences))[: len(batch)])
    return np.concatenate(values)[numbers]

  return score


def _build_text_score(
  context: Context,
  opened: OpenModel,
  params: Params,
  options: Any,
) -> SourceScore:
  """Builds the score of a reward model that tokenises the texts of prompts and responses again."""
  tokenizer = opened.tokenizer
  longest = opened.model.config.max_length

  @jax.jit
  def score_sequences(params: Params, sequences: Sequences) -> Array:
    return packing.map_responses(
      functools.partial(reward.score_sequences, opened.model, params),
      sequences,
      sequences.tokens.shape[1],  # a response may be as long
      opened.model,
      context.layout,
      options,
    )

  def encode(conversation: list[Any], text: str, row: Prompt, ended: bool) -> tuple[list[int], int]:
    exchange = tokenizer.exchange(conversation, text, getattr(row, 'tools', None))
    response = exchange.response
    if not ended and tokenizer.eos_id in response:
      response = response[: response.index(tokenizer.eos_id)]
    return [*exchange.prompt, *response][-longest:], len(response)

  def score(prompts: Prompts, samples: Samples, records: Sequence[Prompt]) -> tuple[Array, int]:
    conversations, texts, rows = _read_texts(context, prompts, samples, records)
    ended = hosts.to_host(samples.ended)
    encoded = [encode(*one) for one in zip(conversations, texts, rows, ended, strict=True)]
    sequences = _pad_sequences(encoded, tokenizer.pad_id, longest)
    return score_sequences(params, context.layout.place(sequences)), 0

  return score


def _pad_sequences(
  encoded: Sequence[tuple[Sequence[int], int]], pad_id: int, longest: int
) -> Sequences:
  """Pads sequences on the right to a multiple of 64, so that few programs are compiled.

  Args:
    encoded: the ids of a prompt with its response, and how many of them are the response's.
    pad_id: the padding token.
    longest: tokens that the model reads at most.

  Returns:
    Sequences [N, T] of host arrays, whose targets are the responses.
  """
  longest_here = max(len(ids) for ids, _ in encoded)
  width = min(-(-longest_here // TEXT_WIDTH) * TEXT_WIDTH, longest)
  tokens: Any = np.full((len(encoded), width), pad_id, np.int32)
  segment_ids: Any = np.zeros((len(encoded), width), np.int32)
  loss_mask: Any = np.zeros((len(encoded), width), np.float32)
  for row, (ids, num_response) in enumerate(encoded):
    tokens[row, : len(ids)] = ids
    segment_ids[row, : len(ids)] = 1
    loss_mask[row, max(0, len(ids) - num_response) : len(ids)] = 1
  positions: Any = np.tile(np.arange(width, dtype=np.int32), (len(encoded), 1))
  return Sequences(
    tokens=tokens,
    positions=positions,
    segment_ids=segment_ids,
    loss_mask=loss_mask,
  )


def _score_texts(
  context: Context,
  score_texts: reward_sources.Score,
  prompts: Prompts,
  samples: Samples,
  record_list: Sequence[Prompt],
) -> tuple[Array, int]:
  """Scores responses as texts: copies them to the host and their scores back to the mesh."""
  conversations, texts, rows = _read_texts(context, prompts, samples, record_list)
  values, failed = score_texts(conversations, texts, rows)
  return context.layout.place(values), failed


def _read_texts(
  context: Context,
  prompts: Prompts,
  samples: Samples,
  record_list: Sequence[Prompt],
) -> tuple[list[Any], list[str], list[Prompt]]:
  """Copies responses to the host: (their conversations, their texts, the records of each)."""
  index, tokens, mask = hosts.to_host((prompts.index, samples.tokens, samples.mask))
  per_prompt = len(tokens) // len(index)  # K; row b * K + k responds to prompt b
  # A row that only pads the batch has index -1; it is scored as the first prompt
  # and not used.
  rows = [record_list[max(i, 0)] for i in np.repeat(index, per_prompt)]
  texts = [
    context.tokenizer.decode(row[inside].tolist()) for row, inside in zip(tokens, mask, strict=True)
  ]
  return [records.conversation(row) for row in rows], texts, rows
