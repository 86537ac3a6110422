"""Chooses the responses that the report shows: side by side, best and worst, over time, tokens."""

from collections.abc import Iterable, Sequence
import dataclasses
import math

from rlhf_jax.report.differences import mark_differences, Piece
from rlhf_jax.report.kept_responses import FINAL, GIVEN, Kept, TRAINING

SHOWN_PROMPTS = 24  # side by side
SHOWN_CASES = 6  # the best and as many of the worst
SHOWN_HISTORIES = 6  # prompts whose responses are shown at every evaluation
MAX_SHOWN_TEXT = 1200  # characters; a longer one is cut
MAX_TOKENS = 160  # of a response, in the view of tokens
MAX_TOKEN_VIEWS = 8
MAX_STEPS = 12  # evaluations in the history of a prompt; of more, some are left out

_LEAST_GAIN = 1e-6  # less is a rounding error

Key = tuple[str, str]  # (prompt_id, prompt)


@dataclasses.dataclass(frozen=True)
class Shown:
  """A response as it is shown.

  Attributes:
    name: of the model, or the step.
    pieces: the text; marked is what the baseline's response lacks.
    facts: (name, value): score, utility, KL, length.
    is_better: whether the judge prefers it to the baseline's; None where it
      prefers neither.
  """

  name: str
  pieces: Sequence[Piece]
  facts: Sequence[tuple[str, str]]
  is_better: bool | None = None


@dataclasses.dataclass(frozen=True)
class Case:
  """A prompt with the responses to it."""

  prompt: str
  responses: Sequence[Shown]
  verdict: str = ''  # better, worse or same: the last model beside the baseline


@dataclasses.dataclass(frozen=True)
class TokenView:
  """A response token by token.

  Attributes:
    title: stage and step.
    prompt: the text.
    facts: as in Shown.
    measures: the names of what is known of each token.
    tokens: (text, measure → (value as text, its strength in −1..1)).
  """

  title: str
  prompt: str
  facts: Sequence[tuple[str, str]]
  measures: Sequence[str]
  tokens: Sequence[tuple[str, dict[str, tuple[str, float]]]]


def final_rows(rows: Iterable[Kept], decoding: str) -> dict[str, dict[Key, list[Kept]]]:
  """Groups the rows of the final table: model → prompt → its samples."""
  models: dict[str, dict[Key, list[Kept]]] = {}
  for row in rows:
    if row.evaluation == FINAL and row.decoding == decoding:
      of_model = models.setdefault(row.model, {})
      of_model.setdefault((row.prompt_id, row.prompt), []).append(row)
  return models


def side_by_side(
  models: dict[str, dict[Key, list[Kept]]], names: Sequence[str], baseline: str
) -> list[Case]:
  """Shows the first response of every model to prompts spread evenly over all.

  Args:
    models: from `final_rows`.
    names: the models to show, in this order; the last one counts for the
      verdict.
    baseline: the model in comparison with which differences are marked.
  """
  names = [name for name in names if name in models]
  if not names:
    return []
  # Only prompts that all of them answered.
  keys = [key for key in models[names[0]] if all(key in models[name] for name in names)]
  return [
    _make_case(key, {name: models[name][key][0] for name in names}, baseline)
    for key in spread(keys, SHOWN_PROMPTS)
  ]


def best_and_worst(
  models: dict[str, dict[Key, list[Kept]]], model: str, baseline: str
) -> tuple[list[Case], list[Case]]:
  """Shows the prompts at which a model gained and lost most against the baseline.

  The gain is the difference of the mean utility over all samples; where the
  judge is a reward, of the mean score.

  Args:
    models: from `final_rows`.
    model: whose gains count.
    baseline: in comparison with which.

  Returns:
    (the best, the worst), the most extreme first.
  """
  own, other = models.get(model, {}), models.get(baseline, {})
  gains = []
  for key in own:
    if key in other:
      gain = _mean_worth(own[key]) - _mean_worth(other[key])
      if math.isfinite(gain):  # NaN where nothing judged a sample
        gains.append((gain, key))
  gains.sort(key=_gain)
  worst = [pair for pair in gains[:SHOWN_CASES] if pair[0] < 0]
  best = [pair for pair in gains[::-1][:SHOWN_CASES] if pair[0] > 0]

  def show(pairs: list[tuple[float, Key]]) -> list[Case]:
    cases = []
    for gain, key in pairs:
      # The sample that stands for the mean: the one nearest to it.
      chosen = {name: _typical(models[name][key]) for name in (baseline, model)}
      case = _make_case(key, chosen, baseline)
      cases.append(dataclasses.replace(case, verdict=f'{gain:+.2f} on average'))
    return cases

  return show(best), show(worst)


def _gain(row: tuple) -> float:
  return row[0]  # of (gain, …)


def histories(rows: Sequence[Kept], stage: str) -> list[Case]:
  """Shows how a stage's responses to a few prompts changed from evaluation to evaluation."""
  own = [row for row in rows if row.evaluation == TRAINING and row.stage == stage]
  own = [row for row in own if row.decoding != GIVEN]  # these never change
  by_prompt: dict[Key, list[Kept]] = {}
  for row in own:
    if row.sample == 0:
      by_prompt.setdefault((row.prompt_id, row.prompt), []).append(row)
  steps = len({row.step for row in own})
  # Without prompts that some evaluation left out, and where there was only one.
  keys = [key for key, rows in by_prompt.items() if len(rows) == steps > 1]
  cases = []
  for key in spread(keys, SHOWN_HISTORIES):
    before = ''  # nothing is marked in the first one
    shown = []
    for row in spread(by_prompt[key], MAX_STEPS):
      pieces = mark_differences(_cut(row.response), before or _cut(row.response))
      shown.append(Shown(f'step {row.step}', pieces, list_facts(row)))
      before = _cut(row.response)
    cases.append(Case(_cut(key[1]), shown))
  return cases


def reward_errors(rows: Sequence[Kept], stage: str) -> list[Case]:
  """Shows the pairs that a reward model gets most wrong, at its last evaluation.

  Args:
    rows: of the run.
    stage: that trained the reward model.

  Returns:
    For each of some prompts the response that people rank higher, and the one
    that the model scores higher; the largest mistake first.
  """
  own = [row for row in rows if row.decoding == GIVEN and row.stage == stage]
  last = max((row.step or 0 for row in own), default=0)
  by_prompt: dict[Key, list[Kept]] = {}
  for row in own:
    if row.step == last:
      by_prompt.setdefault((row.prompt_id, row.prompt), []).append(row)
  mistakes = []
  for key, responses in by_prompt.items():
    margins = [
      ((better.score or 0.0) - (worse.score or 0.0), better, worse)
      for better in responses
      for worse in responses
      if better.verdict['rank'] < worse.verdict['rank'] and better.response != worse.response
    ]
    if margins:  # one pair of each prompt
      mistakes.append((*min(margins, key=_gain), key))
  mistakes.sort(key=_gain)
  cases = []
  for margin, better, worse, key in mistakes[:SHOWN_CASES]:
    if margin < 0:
      shown = [
        Shown('people prefer', [(_cut(better.response), False)], list_facts(better)),
        Shown('the model prefers', [(_cut(worse.response), False)], list_facts(worse)),
      ]
      cases.append(Case(_cut(key[1]), shown))
  return cases


def token_views(rows: Sequence[Kept]) -> list[TokenView]:
  """Shows single tokens: of every stage, at its last evaluation."""
  views: list[TokenView] = []
  with_tokens = [row for row in rows if row.tokens.get('token')]
  last = {row.stage: row.step for row in with_tokens}
  for row in with_tokens:
    if row.step == last[row.stage] and len(views) < MAX_TOKEN_VIEWS:
      views.append(_view_tokens(row))
  return views


def _view_tokens(row: Kept) -> TokenView:
  """Makes the view of one response."""
  columns: dict[str, list[float]] = {}
  logprobs, reference = row.tokens.get('logprob'), row.tokens.get('reference_logprob')
  if logprobs:
    columns['log-probability'] = logprobs
  if logprobs and reference:
    columns['KL'] = [ours - theirs for ours, theirs in zip(logprobs, reference, strict=False)]
  if row.tokens.get('advantage'):
    columns['advantage'] = row.tokens['advantage']
  columns = {name: values[:MAX_TOKENS] for name, values in columns.items()}
  # Colours show the size relative to the largest of this response.
  largest = {name: max(map(abs, values), default=0) or 1 for name, values in columns.items()}
  tokens = []
  for number, text in enumerate(row.tokens['token'][:MAX_TOKENS]):
    measures = {}
    for name, values in columns.items():
      if number < len(values):
        value = values[number]
        measures[name] = (f'{value:+.2f}', round(value / largest[name], 2))
    tokens.append((text, measures))
  title = f'{row.stage}, step {row.step}'
  return TokenView(title, _cut(row.prompt), list_facts(row), list(columns), tokens)


def list_facts(row: Kept) -> list[tuple[str, str]]:
  """Lists what is known of a response as (name, value)."""
  facts = []
  if row.score is not None:
    facts.append(('reward', f'{row.score:+.2f}'))
  if 'utility' in row.verdict:
    facts.append(('utility', f'{row.verdict["utility"]:+.2f}'))
  for name in ('helpful', 'honest', 'harmless'):
    if row.verdict.get(name) == 0:  # what is as it should be is not worth a word
      facts.append((f'not {name}', ''))
  if row.kl is not None:
    facts.append(('KL', f'{row.kl:.2f}'))
  facts.append(('tokens', f'{row.length}'))
  if not row.ended:
    facts.append(('cut off', ''))
  return facts


def spread(items: Sequence, count: int) -> list:
  """Chooses items that are spread evenly, the first and the last among them.

  >>> spread(range(10), 4)
  [0, 3, 6, 9]
  """
  if len(items) <= count:
    return list(items)
  if count == 1:
    return [items[0]]
  return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def worth(row: Kept) -> float:
  """Returns what a response is worth to the judge; NaN where nothing judged it."""
  if 'utility' in row.verdict:
    return row.verdict['utility']
  return math.nan if row.score is None else row.score


def _mean_worth(rows: Sequence[Kept]) -> float:
  return sum(worth(row) for row in rows) / len(rows)


def _typical(rows: Sequence[Kept]) -> Kept:
  """Returns the sample whose worth is nearest to the mean."""
  mean = _mean_worth(rows)  # NaN never gets here
  return min(rows, key=lambda row: abs(worth(row) - mean))


def _make_case(key: Key, chosen: dict[str, Kept], baseline: str) -> Case:
  """Makes the case of one prompt, in which differences from the baseline are marked."""
  other = chosen.get(baseline)
  shown = []
  comparison = ''
  for name, row in chosen.items():
    text = _cut(row.response)
    is_better = None
    if other is None or name == baseline:
      pieces = [(text, False)]
    else:
      pieces = mark_differences(text, _cut(other.response))
      comparison = _compare(row, other)
      is_better = {'better': True, 'worse': False}.get(comparison)
    shown.append(Shown(name, pieces, list_facts(row), is_better))
  return Case(_cut(key[1]), shown, comparison)


def _compare(row: Kept, other: Kept) -> str:
  """Says which of two responses is worth more; 'same' where the judge prefers neither."""
  gain = worth(row) - worth(other)
  if gain > _LEAST_GAIN:
    return 'better'
  if gain < -_LEAST_GAIN:
    return 'worse'
  return 'same'


def _cut(text: str) -> str:
  """Returns the beginning of a text that is too long to be shown."""
  return text if len(text) <= MAX_SHOWN_TEXT else text[:MAX_SHOWN_TEXT] + ' …'
