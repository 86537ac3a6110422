"""An AI's labels in place of people's: RLAIF (Lee et al. 2023, arXiv:2309.00267, §2.1; Bai et al. 2022b, arXiv:2212.08073,
§4.1).

Pairs of a prompt's answers are compared by a principle drawn anew for each, in both orders, and the two probabilities
averaged: that is the label, a ranking of two with its `confidence`. First the judge is measured on comparisons that people
made; one that is not fit labels nothing.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np

from rlhf_jax.data import records, sources
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import constitution, endpoint, judging, language_judge, quality
from rlhf_jax.stages.shared import common

DEFAULTS = dict(  # of the section `ai` of a feedback stage
    judges=('pretrain',),  # stages, models as in `init`, or addresses of OpenAI-compatible servers; several: a panel
    weights=(),  # of several judges, in their order; 1 each unless said
    constitution=(),  # files, or shipped ones by name, whose instructions for a comparison are drawn from
    instruction='',  # for all comparisons, where no constitution says one
    pairs=3,  # comparisons for each prompt, of answers drawn at random
    labels='soft',  # soft (probabilities), hard (verdicts)
    judge=dict(language_judge.DEFAULTS),
    endpoint=dict(endpoint.DEFAULTS),
    gate=dict(quality.DEFAULTS, data=dict(sources.DEFAULTS)),  # data: rankings by people
)


def open_judge(context: common.Context):
  """The judge of a stage's section `ai`: judge(comparisons) → (Judgements, as_shown), as judging.ask_both_orders.

  Raises:
    UserError: it is not fit by the section's gate, unless overridden; quality.json in the stage's folder says more.
  """
  settings = context.section.ai
  if settings.labels not in ('soft', 'hard') or settings.pairs < 1:
    raise UserError(f'config.{context.name}.ai: expected labels soft or hard and pairs from 1, got {settings.labels!r} '
                    f'and {settings.pairs}')
  said = constitution.load_constitution(settings.constitution)
  judges = {name: _open(context, name, said) for name in settings.judges}
  if not judges:
    raise UserError(f'config.{context.name}.ai.judges: expected at least one')
  judge = judging.ask_both_orders(judging.build_panel(judges, settings.weights))
  if settings.gate.records:
    _gate(context, judge)
  return judge


def label(context: common.Context, judge, split: str, prompts, texts, rng) -> list[dict]:
  """Rankings of two answers, as dicts with `judge`, `principle`, `as_shown` and `rationale` beside a Ranking's fields.

  Args:
    judge: of open_judge.
    prompts: N prompts.
    texts: N lists of answers.
  """
  settings = context.section.ai
  principles = _principles(settings, rng)
  asked = []
  for prompt, given in zip(prompts, texts):
    pairs = list(itertools.combinations(sorted(set(given)), 2))
    for place in rng.permutation(len(pairs))[:settings.pairs]:
      first, second = pairs[place] if rng.random() < 0.5 else pairs[place][::-1]
      asked.append((prompt, judging.Comparison(records.conversation(prompt), first, second, next(principles))))
  judged, as_shown = judge([comparison for _, comparison in asked])
  if not asked or np.isnan(judged.probabilities).all():
    raise UserError(f'{context.name}: no label for any of {len(asked)} {split} comparisons: each was too long for '
                    'ai.judge.max_length, or the judge gave no verdict')
  lengths = np.array([[len(one.first), len(one.second)] for _, one in asked])
  known = ~np.isnan(judged.probabilities)
  longer = (lengths[:, 0] > lengths[:, 1]) == (judged.probabilities > 0.5)
  _report(context, split, {
      **quality.measure_position_bias(as_shown), 'longer': float(longer[known & (lengths[:, 0] != lengths[:, 1])].mean()),
      'confidence': float(np.maximum(judged.probabilities, 1 - judged.probabilities)[known].mean()),
      'between': quality.compare_judges(judged.each)})
  rows = []
  for number in np.flatnonzero(known):
    (prompt, comparison), p = asked[number], float(judged.probabilities[number])
    sure = max(p, 1 - p) if settings.labels == 'soft' else 1.0
    ranking = records.Ranking(
        f'{prompt.id}/{split}/{number}', 'ai', '', '', '', comparison.messages, [comparison.first, comparison.second],
        [1, 1] if p == 0.5 else [1, 2] if p > 0.5 else [2, 1], sure)
    rows.append({**dataclasses.asdict(ranking), 'judge': {name: float(x[number]) for name, x in judged.each.items()},
                 'principle': comparison.principle, 'as_shown': as_shown[number].tolist(),
                 'rationale': judged.rationales[number]})
  return rows


def measure(judge, rankings, count: int, principles, rng) -> dict:
  """A judge against people: {'position', 'people', 'sources': source → as people, 'between'}.

  Args:
    judge: as judging.ask_both_orders.
    rankings: Rankings that people made.
    principles: an endless iterator of texts.
  """
  chosen = quality.draw_pairs(rankings, count, rng)
  judged, as_shown = judge([judging.Comparison(records.conversation(row), row.responses[i], row.responses[j],
                                               next(principles)) for row, i, j in chosen])
  people = np.array([row.ranks[i] < row.ranks[j] for row, i, j in chosen])
  lengths = np.array([[len(row.responses[i]), len(row.responses[j])] for row, i, j in chosen])
  whose = np.array([row.source for row, *_ in chosen])
  of = lambda some: quality.compare_with_people(judged.probabilities[some], people[some], lengths[some])
  return {'position': quality.measure_position_bias(as_shown), 'people': of(np.full(len(chosen), True)),
          'sources': {name: of(whose == name) for name in sorted(set(whose))}, 'between': quality.compare_judges(judged.each)}


def _gate(context, judge):
  settings = context.section.ai
  rng = np.random.default_rng(context.config.seed)
  rankings = sources.load_records(settings.gate.data, 'ranking', 'validation')
  measured = measure(judge, rankings, settings.gate.records, _principles(settings, rng), rng)
  unfit = quality.explain_unfit(measured, settings.gate)
  _report(context, 'gate', {**measured, 'fit': not unfit, 'why': unfit})
  if jax.process_index() == 0:
    print(quality.format_agreement({**measured['sources'], 'all': measured['people']}))
    print(f'{measured["position"]["consistency"]:.1%} of its verdicts stay when the answers change places')
  if unfit:
    said = f'the judge {", ".join(settings.judges)} is not fit: {unfit}'
    if not settings.gate.override:
      raise UserError(f'{context.name}: {said}; {context.directory / "quality.json"} says more. Give another judge, or '
                      f'--config.{context.name}.ai.gate.override=True')
    if jax.process_index() == 0:
      print(f'{context.name}: {said}; going on, as ai.gate.override asks')


def _open(context, name, said):
  """One judge by name."""
  settings = context.section.ai
  if name.startswith(('http://', 'https://')):
    ask = endpoint.build_endpoint_judge(name, settings.endpoint, context.directory / 'answers.jsonl')
    return ask if jax.process_count() == 1 else _first_process(ask)
  model, read, tokenizer = common.open_reader(context, name)
  judge, rng, examples = settings.judge, np.random.default_rng(context.config.seed), []
  if judge.thought and said.thought_examples:
    texts = said.thought_examples[:judge.examples]
    examples = [text.replace('{}', next(_principles(settings, rng))) for text in texts]
    return language_judge.build_judge(model, read(), tokenizer, context.layout, judge, examples)
  for example in said.comparison_examples[:judge.examples]:
    better = int(rng.integers(2))
    answers = [example.better, example.worse] if better == 0 else [example.worse, example.better]
    examples.append((judging.Comparison([dict(role='user', content=example.human)], *answers,
                                        next(_principles(settings, rng))), better))
  return language_judge.build_judge(model, read(), tokenizer, context.layout, judge, examples)


def _first_process(ask):
  """A judge that only the first process asks; the others are told its probabilities."""
  from jax.experimental import multihost_utils

  def judge(comparisons):
    N = len(comparisons)
    given = ask(comparisons) if jax.process_index() == 0 else judging.Judgements(np.zeros(N), [''] * N)
    return dataclasses.replace(given, probabilities=np.asarray(
        multihost_utils.broadcast_one_to_all(given.probabilities.astype(np.float32)), float))
  return judge


def _principles(settings, rng):
  """Instructions for comparisons, drawn anew each time."""
  said = constitution.load_constitution(settings.constitution)
  while True:
    yield said.draw('choose', rng).choose if said.principles else settings.instruction


def _report(context, name, values):
  """Puts values into the stage's quality.json."""
  path = context.directory / 'quality.json'
  old = json.loads(path.read_text()) if path.is_file() else {}
  Path(context.directory).mkdir(parents=True, exist_ok=True)
  common.write_text(path, json.dumps({**old, name: values}, indent=2) + '\n')
