"""Labels pairs of responses by AI judges in place of people: RLAIF.

Pairs of a prompt's responses are compared by a principle drawn anew for each, in
both orders, and the two probabilities are averaged. The label is a ranking of two
with its `confidence`. First the judge is measured on comparisons that people
made; one that fails this gate labels nothing.
Sources: Lee et al. 2023, arXiv:2309.00267, §2.1; Bai et al. 2022b,
  arXiv:2212.08073, §4.1.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import itertools
import json
from typing import Any

import numpy as np

from rlhf_jax.data import records, sources
from rlhf_jax.data.records import Prompt, Ranking
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import constitution, judges, judging, quality
from rlhf_jax.feedback.constitution import Constitution
from rlhf_jax.feedback.endpoint import EndpointOptions
from rlhf_jax.feedback.judges import JudgeResources
from rlhf_jax.feedback.judging import (
  Comparison,
  Judgements,
  JudgeOfBothOrders,
)
from rlhf_jax.feedback.language_judge import JudgeOptions
from rlhf_jax.feedback.quality import GateOptions
from rlhf_jax.options import Count, Weights
from rlhf_jax.runtime import hosts
from rlhf_jax.stages.shared import scores, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.model_store import ModelStore

QUALITY_JSON = 'quality.json'  # in the stage's folder: how the judge was measured


@dataclasses.dataclass(frozen=True)
class AIGateOptions(GateOptions):
  """The gate: what a judge must reach on people's comparisons before it labels anything."""

  data: DataOptions = DataOptions()  # rankings that people made; their validation split is used


@dataclasses.dataclass(frozen=True)
class AILabelOptions:
  """The section `ai` of a feedback stage."""

  # Stages, models as in `init`, functions 'module:function', or addresses of
  # OpenAI-compatible servers; several make a panel.
  judges: tuple[str, ...] = ('pretrain',)
  weights: Weights = ()  # of several judges, in their order; all 1 if empty
  constitution: tuple[str, ...] = ()  # files, or shipped ones by name, to draw instructions from
  instruction: str = ''  # of all comparisons, where there is no constitution
  pairs: Count = 3  # comparisons for each prompt, of responses drawn at random
  labels: str = 'soft'  # soft (probabilities), hard (verdicts)
  judge: JudgeOptions = JudgeOptions()  # how a language model judges
  endpoint: EndpointOptions = EndpointOptions()  # how a server is asked
  gate: AIGateOptions = AIGateOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = {}
    if self.constitution:
      unread['instruction'] = 'there is a constitution'
    if len(self.judges) == 1:
      unread['weights'] = 'there is one judge'
    kinds = {judges.judge_kind(name) for name in self.judges}
    if not kinds:
      return unread  # no judge is a mistake of its own
    if 'endpoint' not in kinds:
      unread['endpoint'] = 'no judge is a server'
    if not kinds & {'model', 'reward'}:
      unread['judge'] = 'no judge is a model'
    return unread


def open_judge(context: Context, store: ModelStore, options: AILabelOptions) -> JudgeOfBothOrders:
  """Opens the judge of a stage's section `ai`, and measures it on people's comparisons.

  Args:
    context: the context of the stage.
    store: its models.
    options: the section `ai`.

  Returns:
    judge(comparisons) → (Judgements, probabilities as shown), as
    judging.ask_both_orders.

  Raises:
    UserError: the judge is not fit by the section's gate, unless that is overridden;
      quality.json in the stage's folder says more.
  """
  _check_options(options, f'{context.where}.ai')
  principles = constitution.load_constitution(options.constitution)
  resources = JudgeResources(
    judge=options.judge,
    endpoint=options.endpoint,
    cache=context.directory / 'responses.jsonl',  # a resumed run asks no server twice
    open_language_model=store.open_language_model,
    open_reward_model=functools.partial(
      scores.open_text_score, context, store, batch_size=options.judge.batch_size
    ),
    examples=_judge_examples(options, principles, np.random.default_rng(context.config.seed)),
  )
  opened = {name: judges.open_judge(name, resources) for name in options.judges}
  judge = judging.ask_both_orders(judging.build_panel(opened, options.weights))
  if options.gate.records:
    _pass_gate(context, options, judge)
  return judge


def check_judges(context: Context, store: ModelStore, options: AILabelOptions) -> None:
  """Checks the judges of a section `ai` before any stage runs; reads shapes of models only.

  Args:
    context: the context of the stage.
    store: its models.
    options: the section `ai`.

  Raises:
    UserError: a judge or the constitution cannot be opened, or an option is wrong.
  """
  _check_options(options, f'{context.where}.ai')
  constitution.load_constitution(options.constitution)
  resources = JudgeResources(
    judge=options.judge,
    endpoint=options.endpoint,
    cache=context.directory / 'responses.jsonl',
    open_language_model=store.open_language_model,
    examples=[],
  )
  for name in options.judges:
    kind = judges.find_judge_kind(name)
    if kind.name == 'reward':
      store.open_reward(judges.model_name(name))
    elif kind.on_device:
      store.open_reader(name)
    else:
      kind.open(name, resources)


def _check_options(options: AILabelOptions, where: str) -> None:
  """Raises UserError for unknown labels, no judge, or weights of others."""
  if options.labels not in ('soft', 'hard'):
    raise UserError(f'{where}.labels: expected soft or hard, got {options.labels!r}')
  if not options.judges:
    raise UserError(f'{where}.judges: expected at least one')
  if len(options.weights) not in (0, len(options.judges)):
    raise UserError(
      f'{where}.weights: expected {len(options.judges)} numbers, got {len(options.weights)}'
    )


def label_pairs(
  context: Context,
  options: AILabelOptions,
  judge: JudgeOfBothOrders,
  split: str,
  prompts: Sequence[Prompt],
  texts: Sequence[Sequence[str]],
  rng: np.random.Generator,
) -> list[dict[str, Any]]:
  """Draws pairs of responses to each prompt and lets the judge label them.

  Args:
    context: the context of the stage.
    options: the section `ai`.
    judge: the judge that open_judge returned.
    split: 'train' or 'validation'.
    prompts: N prompts.
    texts: N lists of responses.
    rng: draws the pairs, the order of each, and its principle.

  Returns:
    Rankings of two responses, as dicts with `judge`, `principle`, `as_shown` and
    `rationale` beside a Ranking's fields.

  Raises:
    UserError: no comparison got a label.
  """
  drawn = _draw_comparisons(options, prompts, texts, rng)
  judged, as_shown = judge([comparison for _, comparison in drawn])
  if not drawn or np.isnan(judged.probabilities).all():
    raise UserError(
      f'{context.name}: no label for any of {len(drawn)} {split} comparisons: each was too long '
      'for ai.judge.max_length, or the judge gave no verdict'
    )
  _report_labels(context, split, drawn, judged, as_shown)
  rows = []
  # NaN: too long for the judge, or no verdict. Such a comparison has no label.
  for number in np.flatnonzero(~np.isnan(judged.probabilities)):
    prompt, comparison = drawn[number]
    ranking = _label_as_ranking(
      f'{prompt.id}/{split}/{number}',
      comparison,
      float(judged.probabilities[number]),
      options.labels,
    )
    verdicts = {name: float(values[number]) for name, values in judged.each.items()}
    row = {
      **dataclasses.asdict(ranking),
      'judge': verdicts,
      'principle': comparison.principle,
      'as_shown': as_shown[number].tolist(),
      'rationale': judged.rationales[number],
    }
    rows.append(row)
  return rows


def measure_judge(
  judge: JudgeOfBothOrders,
  rankings: Sequence[Ranking],
  count: int,
  principles: Iterator[str],
  rng: np.random.Generator,
) -> dict[str, Any]:
  """Measures a judge against people.

  Args:
    judge: as judging.ask_both_orders.
    rankings: rankings that people made.
    count: pairs to compare, at most.
    principles: an endless iterator of instructions.
    rng: draws the pairs.

  Returns:
    {'position': how often the place decides, 'people': the agreement with people,
    'sources': that for each source of rankings, 'between': that of the panel's
    judges}, see feedback/quality.py.
  """
  chosen = quality.draw_pairs(rankings, count, rng)
  comparisons = []
  for row, i, j in chosen:
    comparison = Comparison(
      records.conversation(row),
      records.response_text(row.responses[i]),
      records.response_text(row.responses[j]),
      next(principles),
    )
    comparisons.append(comparison)
  judged, as_shown = judge(comparisons)
  # [N] bool: people prefer the first response.
  people = np.array([row.ranks[i] < row.ranks[j] for row, i, j in chosen])
  # [N, 2] characters, to tell a preference for long responses from judgement.
  lengths = np.array([[len(pair.first), len(pair.second)] for pair in comparisons])
  row_sources = np.array([row.source for row, _, _ in chosen])

  def agreement(where: np.ndarray) -> dict[str, Any]:
    return quality.compare_with_people(judged.probabilities[where], people[where], lengths[where])

  return {
    'position': quality.measure_position_bias(as_shown),
    'people': agreement(np.full(len(chosen), True)),
    'sources': {name: agreement(row_sources == name) for name in sorted(set(row_sources))},
    'between': quality.compare_judges(judged.each),
  }


# Opening and measuring.


def _judge_examples(
  options: AILabelOptions,
  principles: Constitution,
  rng: np.random.Generator,
) -> list[Any]:
  """Returns the constitution's examples as a language model is shown them."""
  count = options.judge.examples
  if options.judge.thought and principles.thought_examples:
    instructions = _instructions(options, rng)
    texts = principles.thought_examples[:count]
    return [text.replace('{}', next(instructions)) for text in texts]
  examples = []
  for example in principles.comparison_examples[:count]:
    # In random order, so that the examples do not teach that one place wins.
    better = int(rng.integers(2))
    pair = [example.better, example.worse]
    if better == 1:
      pair.reverse()
    messages = [{'role': 'user', 'content': example.human}]
    instruction = next(_instructions(options, rng))
    examples.append((Comparison(messages, pair[0], pair[1], instruction), better))
  return examples


def _pass_gate(context: Context, options: AILabelOptions, judge: JudgeOfBothOrders) -> None:
  """Measures the judge on people's comparisons; raises UserError if it is not fit."""
  gate = options.gate
  rng = np.random.default_rng(context.config.seed)
  rankings = sources.load_records(gate.data, 'ranking', 'validation')
  measured = measure_judge(judge, rankings, gate.records, _instructions(options, rng), rng)
  unfit = quality.explain_unfit(measured, gate)
  _report(context, 'gate', {**measured, 'fit': not unfit, 'why': unfit})
  if hosts.is_first_process():
    consistency = measured['position']['consistency']
    print(quality.format_agreement({**measured['sources'], 'all': measured['people']}))
    print(f'{consistency:.1%} of its verdicts stay when the responses change places')
  if not unfit:
    return
  verdict = f'the judge {", ".join(options.judges)} is not fit: {unfit}'
  if not gate.override:
    raise UserError(
      f'{context.name}: {verdict}; {context.directory / QUALITY_JSON} says more. Give another '
      f'judge, or --config.{context.name}.ai.gate.override=True'
    )
  if hosts.is_first_process():
    print(f'{context.name}: {verdict}; going on, as ai.gate.override asks')


# Labelling.


def _draw_comparisons(
  options: AILabelOptions,
  prompts: Sequence[Prompt],
  texts: Sequence[Sequence[str]],
  rng: np.random.Generator,
) -> list[tuple[Prompt, Comparison]]:
  """Draws pairs of different responses to each prompt, in random order."""
  instructions = _instructions(options, rng)
  drawn = []
  for prompt, responses in zip(prompts, texts, strict=True):
    # Equal responses make no pair. Sorted, as the order of a set differs between
    # processes.
    pairs = list(itertools.combinations(sorted(set(responses)), 2))
    for place in rng.permutation(len(pairs))[: options.pairs]:
      first, second = pairs[place]
      if rng.random() >= 0.5:
        first, second = second, first
      comparison = Comparison(records.conversation(prompt), first, second, next(instructions))
      drawn.append((prompt, comparison))
  return drawn


def _label_as_ranking(
  row_id: str, comparison: Comparison, probability: float, labels: str
) -> Ranking:
  """Makes a ranking of the probability that the first response is better."""
  if probability == 0.5:
    ranks = [1, 1]  # a tie
  elif probability > 0.5:
    ranks = [1, 2]
  else:
    ranks = [2, 1]
  confidence = 1.0  # a hard label is certain
  if labels == 'soft':
    confidence = max(probability, 1 - probability)
  return Ranking(
    id=row_id,
    source='ai',
    license='',
    domain='',
    context='',
    messages=comparison.messages,
    responses=[comparison.first, comparison.second],
    ranks=ranks,
    confidence=confidence,
  )


def _report_labels(
  context: Context,
  split: str,
  drawn: Sequence[tuple[Prompt, Comparison]],
  judged: Judgements,
  as_shown: np.ndarray,
) -> None:
  """Reports how the judge decided: position, length, confidence, agreement of a panel."""
  probabilities = judged.probabilities
  lengths = np.array([[len(pair.first), len(pair.second)] for _, pair in drawn])
  known = ~np.isnan(probabilities)
  chose_longer = (lengths[:, 0] > lengths[:, 1]) == (probabilities > 0.5)
  # Pairs of one length say nothing about a preference for length.
  uneven = known & (lengths[:, 0] != lengths[:, 1])
  confidence = np.maximum(probabilities, 1 - probabilities)
  values = {
    **quality.measure_position_bias(as_shown),
    'longer': float(chose_longer[uneven].mean()),
    'confidence': float(confidence[known].mean()),
    'between': quality.compare_judges(judged.each),
  }
  _report(context, split, values)


def _instructions(options: AILabelOptions, rng: np.random.Generator) -> Iterator[str]:
  """Yields instructions for comparisons, each drawn anew, without end."""
  principles = constitution.load_constitution(options.constitution)
  while True:
    if principles.principles:
      yield principles.draw('choose', rng).choose
    else:
      yield options.instruction


def _report(context: Context, name: str, values: dict[str, Any]) -> None:
  """Adds values to the stage's quality.json, under a name."""
  path = context.directory / QUALITY_JSON
  report = {}
  if path.is_file():
    report = json.loads(path.read_text(encoding='utf-8'))
  report[name] = values
  training.write_on_first_process(path, json.dumps(report, indent=2) + '\n')
