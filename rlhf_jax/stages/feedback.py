"""Collects rankings: models respond to each prompt, and somebody orders the responses.

This is the first half of step 3 of RLHF. `source` says who orders the responses:
  simulated: simulated annotators of TinyWorld, who read texts and give ranks.
  ai: one or several judges (stages/shared/ai_labels.py), which is RLAIF; they compare
    pairs and give probabilities.
  reward: a reward model or a reward function. These rankings serve iterated DPO
    (sample, rank, train, again), and SFT on the best of each, which is
    rejection-sampling fine-tuning (RAFT: Dong et al. 2023, arXiv:2304.06767).
  people: real ones, in the application `rlhf_jax.collect`, whose queue the
    responses go into (stages/shared/people_labels.py).
With rankings that exist already, leave this stage out and point the next one at
their files.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from rlhf_jax import fingerprints, random_keys
from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.data.tinyworld import people
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.objectives import ranking
from rlhf_jax.options import Count
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.runtime import hosts
from rlhf_jax.stages.shared import (
  ai_labels,
  people_labels,
  response_plan,
  scores,
  training,
)
from rlhf_jax.stages.shared.ai_labels import AILabelOptions
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.stages.shared.people_labels import PeopleOptions
from rlhf_jax.types import Array, Prompts, Samples

SOURCES = ('simulated', 'people', 'ai', 'reward')
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Options(RewardSourceOptions):
  """The section of a stage that collects rankings."""

  policies: tuple[str, ...] = ('sft',)  # stages whose models respond, each num_samples times
  num_samples: Count = 4  # responses of each policy to each prompt
  source: str = 'simulated'  # who orders the responses: simulated, people, ai, reward
  annotators: Count = 5  # simulated people, each with habits of their own; one ranks a prompt
  people: PeopleOptions = PeopleOptions()
  ai: AILabelOptions = AILabelOptions()
  reward: str = 'reward'  # which one, where `source` is reward; named as in PPO
  batch_size: Count = 64  # prompts at once, over all devices
  max_length: Count = 48  # tokens of a prompt at most
  data: DataOptions = DataOptions()
  sampling: SamplingOptions = SamplingOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    settings = {
      'simulated': ('annotators',),
      'people': ('people',),
      'ai': ('ai',),
      'reward': ('reward', 'reward_functions', 'scorer', 'reward_server'),
    }
    if self.source not in settings:
      return {}  # an unknown source is a mistake of its own
    unread = self.unread_without((self.reward,))
    for source, names in settings.items():
      if source != self.source:
        unread |= dict.fromkeys(names, f'source is {self.source!r}')
    return unread

  @property
  def parts(self) -> int:
    """The number of parts in which a reward model reads the responses."""
    return 1

  @property
  def packed_rows(self) -> int:
    """Returns 0: a reward model reads padded rows."""
    return 0


@dataclasses.dataclass(frozen=True)
class Collected:
  """Responses to the prompts of a split.

  Attributes:
    prompts: N prompts, without those that are too long.
    texts: N lists of responses, those of all policies.
    scores: N lists of floats where a reward orders the responses; else N empty lists.
  """

  prompts: list[Prompt]
  texts: list[list[str]]
  scores: list[list[float]]


def run(context: Context) -> None:
  """Writes train.jsonl and validation.jsonl: rankings of the prompts of each split."""
  options = context.read_options(STAGE)
  training.check_batch(context, options.batch_size, 1)
  check_options(options, context.where)
  # A fault in the second split should show before hours are spent on the first.
  sources.load_records(options.data, 'prompt', 'validation')
  if options.source == 'people':
    _collect_from_people(context, options)
    return
  judge = None  # for the other sources
  if options.source == 'ai':
    judge = ai_labels.open_judge(context, ModelStore(context), options.ai)
  rows: Sequence[Any]  # rankings, or dicts with their fields and more
  for number, split in enumerate(SPLITS):
    path = context.directory / f'{split}.jsonl'
    if path.exists():
      fingerprints.check_file(path)
      continue  # written before the run was interrupted
    key = jax.random.fold_in(context.key(), number)
    # What is drawn on the host comes from a key too, so that it is the same in every
    # process.
    rng = random_keys.host_generator(random_keys.for_purpose(key, 'labels'))
    collected = collect_responses(context, options, split, key)
    if judge is not None:
      rows = ai_labels.label_pairs(
        context,
        options.ai,
        judge,
        split,
        collected.prompts,
        collected.texts,
        rng,
      )
    else:
      rows = _rank(context, options, split, collected, rng)
    training.write_records(context, path.name, rows)


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for an unknown source."""
  if options.source not in SOURCES:
    raise UserError(f'{where}.source: expected one of {", ".join(SOURCES)}, got {options.source!r}')
  if options.source == 'people':
    people_labels.check_options(options.people, f'{where}.people')


def collect_responses(context: Context, options: Options, split: str, key: Array) -> Collected:
  """Lets every policy respond to the prompts of a split.

  Args:
    context: the context of the stage.
    options: the section.
    split: 'train' or 'validation'.
    key: the key of the sampling; policy n uses fold_in(key, n).

  Returns:
    The responses, those of the first policy first.
  """
  store = ModelStore(context)
  prompts = sources.load_records(options.data, 'prompt', split)
  examples = encode.prompts(prompts, context.tokenizer, options.max_length, spread=hosts.spread)
  score = None
  if options.source == 'reward':
    score = _open_score(context, store, options, prompts)
  texts: list[list[str]] = [[] for _ in examples]
  values: list[list[float]] = [[] for _ in examples]
  for number, name in enumerate(options.policies):
    policy = store.open(name)
    respond = responses.build_responder(
      policy.model,
      options.sampling,
      context.tokenizer,
      context.layout,
      options.num_samples,
      score=score,
    )
    host_batches = batches.prompts_once(examples, options.batch_size)
    policy_key = jax.random.fold_in(random_keys.for_purpose(key, 'responses'), number)
    completed = respond(policy.read(), host_batches, policy_key)
    for texts_of_prompt, new_texts in zip(texts, completed.texts, strict=True):
      texts_of_prompt += new_texts
    if completed.scores is None:
      continue
    for scores_of_prompt, new_scores in zip(values, completed.scores.tolist(), strict=True):
      scores_of_prompt += new_scores
  # Prompts that are too long have no example; `index` leads back to the record.
  fitting = [prompts[int(example['index'])] for example in examples]
  return Collected(fitting, texts, values)


def _open_score(
  context: Context,
  store: ModelStore,
  options: Options,
  prompts: Sequence[Prompt],
) -> Any:
  """Opens the reward that orders the responses: (Prompts, Samples) → [B * K] float32."""
  score_source = scores.open_score(context, store, options.reward, options)

  def score(asked: Prompts, samples: Samples) -> Array:
    return score_source(asked, samples, prompts)[0]

  return score


def _collect_from_people(context: Context, options: Options) -> None:
  """Queues the responses of both splits, then waits for people and writes their rankings."""
  missing = [split for split in SPLITS if not (context.directory / f'{split}.jsonl').exists()]
  for split in missing:
    if people_labels.is_queued(context, options.people, split):
      continue
    key = jax.random.fold_in(context.key(), SPLITS.index(split))
    collected = collect_responses(context, options, split, key)
    people_labels.queue_responses(
      context, options.people, split, collected.prompts, collected.texts
    )
  for split in missing:
    rows = people_labels.wait_and_read(context, options.people, split)
    training.write_records(context, f'{split}.jsonl', rows)


def _rank(
  context: Context,
  options: Options,
  split: str,
  collected: Collected,
  rng: np.random.Generator,
) -> list[records.Ranking]:
  """Orders the responses by simulated people or by a reward."""
  if options.source == 'simulated':
    orders = _order_by_people(context, options, collected, rng)
  else:
    orders = _order_by_reward(options, collected)
  rankings = []
  for prompt, texts, (who, ranks) in zip(collected.prompts, collected.texts, orders, strict=True):
    ranked = records.Ranking(
      id=f'{prompt.id}/{split}',
      source=who,
      license='',
      domain='',
      context='',
      messages=records.conversation(prompt),
      responses=texts,
      ranks=ranks,
      tools=prompt.tools,
    )
    rankings.append(ranked)
  return rankings


def _order_by_people(
  context: Context,
  options: Options,
  collected: Collected,
  rng: np.random.Generator,
) -> Iterator[tuple[str, list[int]]]:
  """Yields (who ranked, ranks) for each prompt; one simulated person ranks it."""
  annotators = people.draw_annotators(options.annotators, context.config.seed)
  for prompt, texts in zip(collected.prompts, collected.texts, strict=True):
    person = int(rng.integers(len(annotators)))
    ranks = people.rank_responses(prompt, texts, annotators[person], rng)
    yield f'annotator-{person}', ranks


def _order_by_reward(options: Options, collected: Collected) -> Iterator[tuple[str, list[int]]]:
  """Yields (the reward's name, ranks) for each prompt."""
  for values in collected.scores:
    one_row: Any = np.asarray([values], np.float32)  # [1, K], on the host
    ranks = ranking.from_scores(one_row)[0]
    yield options.reward, ranks.tolist()


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  return response_plan.plan_responses(
    context,
    options.policies,
    options.sampling,
    batch_size=options.batch_size,
    max_length=options.max_length,
    num_samples=options.num_samples,
  )


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_prompts(rows: Sequence[Prompt], overlong: str) -> list[dict]:
    return encode.prompts(rows, tokenizer, options.max_length, overlong)

  def encode_nothing(rows: Sequence[records.Ranking], overlong: str) -> list[dict]:
    return []  # judges read texts

  uses = [DataUse('data', options.data, 'prompt', encode_prompts)]
  gate = options.ai.gate
  if options.source == 'ai' and gate.records:
    people = DataUse('ai.gate.data', gate.data, 'ranking', encode_nothing, splits=('validation',))
    uses.append(people)
  return uses


def check(context: Context) -> None:
  """Checks options, reward and judges before any stage runs; raises UserError."""
  options = context.read_options(STAGE)
  training.check_batch(context, options.batch_size, 1)
  check_options(options, context.where)
  if options.source == 'people' and context.url and not options.people.workdir:
    raise UserError(
      f'{context.where}.people.workdir: the workdir is {context.url}, whose local folder is made '
      "anew at each start; expected a folder for people's work"
    )
  if options.source == 'reward':
    scores.check_score(context, options.reward, options)
  if options.source == 'ai':
    ai_labels.check_judges(context, ModelStore(context), options.ai)


TINY: dict[str, Any] = {'data': {'count': 16}, 'batch_size': 16}
STAGE = StageKind(
  options=Options,
  run=run,
  plan=plan,
  tiny=TINY,
  data=list_data,
  files=tuple(f'{split}.jsonl' for split in SPLITS),
  check=check,
)
