"""Says in plain words what a run has shown, and no more than its intervals allow."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from rlhf_jax.evaluation import winrate
from rlhf_jax.report.kept_responses import GIVEN, Kept, TRAINING
from rlhf_jax.report.run_files import last_evaluation, Run

RATES = {  # key of a row → what a higher value means
  'helpful': 'helpful',
  'honest': 'honest',
  'harmless': 'harmless',
}
Interval = Sequence[float]
Row = Mapping[str, Any]

GOOD, BAD, OPEN = 'good', 'bad', 'open'  # how a sentence stands to what one hopes for


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A statement, and whether it is good, bad or open."""

  text: str
  tone: str = OPEN


@dataclasses.dataclass(frozen=True)
class Headline:
  """The title, and the sentences below it."""

  title: str
  tone: str
  sentences: Sequence[Sentence]


def write_headline(run: Run) -> Headline:
  """Writes the headline of a run, finished or not."""
  models = run.results.get('models') or {}
  compared = [name for name in models if name != run.baseline]
  sentences = []
  if run.baseline in models and compared:
    # The table's last model is the one that the experiment is about.
    main = compared[-1]
    verdict = _compare(main, run.baseline, models, 'sampled')
    title, tone = _title(main, run.baseline, verdict.tone)
    sentences.append(verdict)
    if 'greedy' in models[main]:
      sentences.append(_compare(main, run.baseline, models, 'greedy'))
    sentences += _compare_rates(main, run.baseline, models)
    for other in compared[:-1]:
      # That the base is worse than SFT is neither good nor bad news of the last model.
      said = _compare(other, run.baseline, models, 'sampled')
      sentences.append(dataclasses.replace(said, tone=OPEN))
  else:
    title, tone = _state_of(run), OPEN
  sentences += _describe_reward(run.results.get('reward') or {})
  sentences += _describe_bought(run.results.get('downstream') or {}, run.baseline)
  sentences += _describe_agreement(run.results.get('reward_agreement') or {})
  sentences += describe_progress(run.responses, [stage.name for stage in run.stages])
  if not run.results:
    sentences += _describe_last_values(run)
  return Headline(title, tone, sentences)


def describe_win(
  model: str, baseline: str, rate: float, interval: Interval, manner: str
) -> Sentence:
  """Says whether a model is better than another, from its win rate and the interval.

  >>> describe_win('ppo', 'sft', 0.6, (0.55, 0.65), 'sampled').text
  'ppo wins 60.0% of the comparisons with sft, sampled (95% interval 55.0 to 65.0%): it is better.'
  """
  low, high = interval  # as shares
  where = f'(95% interval {100 * low:.1f} to {100 * high:.1f}%)'
  said = f'{model} wins {rate:.1%} of the comparisons with {baseline}, {manner} {where}'
  # A half is what two equal models would reach, as a tie counts half.
  if low > 0.5:
    return Sentence(f'{said}: it is better.', GOOD)
  if high < 0.5:
    return Sentence(f'{said}: it is worse.', BAD)
  return Sentence(f'{said}: no difference is shown, as a half lies inside.', OPEN)


def describe_rate(
  label: str, model: str, baseline: str, own: Row, other: Row, key: str
) -> Sentence | None:
  """Says whether a rate of two models differs; None where one of them has no such rate.

  Intervals that do not touch show a difference; intervals that overlap show
  none.
  """
  if key not in own or key not in other:
    return None
  change = f'{other[key]:.1%} for {baseline}, {own[key]:.1%} for {model}'
  own_interval, other_interval = own.get(f'{key}_ci95'), other.get(f'{key}_ci95')
  if not own_interval or not other_interval:
    return Sentence(f'{label}: {change}.')
  # Intervals that overlap may still hide a difference, so that nothing
  # is said rather than too much.
  if own_interval[0] > other_interval[1]:
    return Sentence(f'{model} is more {label}: {change}.', GOOD)
  if own_interval[1] < other_interval[0]:
    return Sentence(f'{model} is less {label}: {change}.', BAD)
  return Sentence(f'No difference in being {label} is shown: {change}; the intervals overlap.')


def _title(model: str, baseline: str, tone: str) -> tuple[str, str]:
  """Returns the title that a verdict allows, and its tone."""
  titles = {
    GOOD: f'{model} is better than {baseline}',
    BAD: f'{model} is worse than {baseline}',
    OPEN: f'No difference between {model} and {baseline} is shown',
  }
  return titles[tone], tone


def win_key(row: Row) -> str:
  """Returns the key of the win rate that counts: without style, if the judge tells them apart."""
  by_substance = 'substance_win_rate_vs_sft'
  return by_substance if by_substance in row else 'win_rate_vs_sft'


def _compare(model: str, baseline: str, models: Mapping[str, Any], decoding: str) -> Sentence:
  """Compares a model with the baseline by win rate."""
  row = models[model].get(decoding) or {}
  key = win_key(row)
  # A row may lack the decoding: the best of N has no greedy one.
  if f'{key}_ci95' not in row:
    return Sentence(f'{model} was not compared with {baseline}, {decoding}.')
  manner = {'sampled': 'sampled', 'greedy': 'greedily'}[decoding]
  if key.startswith('substance'):
    manner += ', by substance'
  return describe_win(model, baseline, row[key], row[f'{key}_ci95'], manner)


def _compare_rates(model: str, baseline: str, models: Mapping[str, Any]) -> list[Sentence]:
  """Compares the rates of a model with those of the baseline."""
  own, other = models[model]['sampled'], models[baseline]['sampled']
  said = [describe_rate(label, model, baseline, own, other, key) for key, label in RATES.items()]
  return [sentence for sentence in said if sentence is not None]


def _describe_reward(reward: Row) -> list[Sentence]:
  """Says how well the reward model orders held-out pairs."""
  if 'accuracy' not in reward or 'pairs' not in reward:
    return []
  text = (
    f'The reward model orders {reward["accuracy"]:.1%} of {reward["pairs"]:,.0f} held-out pairs '
    'as people do'
  )
  if 'accuracy_low' in reward:
    low, high = reward['accuracy_low'], reward['accuracy_high']
    text += f' (95% interval {100 * low:.1f} to {100 * high:.1f}%)'
  if 'length_accuracy' in reward:
    text += f'; always preferring the longer response: {reward["length_accuracy"]:.1%}'
  return [Sentence(text + '.')]


def _describe_bought(bought: Row, baseline: str) -> list[Sentence]:
  """Says what optimising the reward model gained in the judge's eyes."""
  gains = bought.get('gains') or []
  # A judge that is the reward itself knows nothing that was not optimised.
  if not gains or bought.get('judge') == bought.get('reward'):
    return []
  said = []
  for gain in gains:
    low, high = gain['utility_gain_ci95']
    name = gain['row'].replace('_', ' ')
    said.append(f'{name} {gain["utility_gain"]:+.2f} ({low:+.2f} to {high:+.2f})')
  text = "What optimising the reward model gained in the judge's utility, against "
  return [Sentence(f'{text}{baseline}, with 95% intervals: {"; ".join(said)}.')]


def _describe_agreement(found: Row) -> list[Sentence]:
  """Says how far the reward models of a run agree."""
  said = []
  for names, row in (found.get('agreement') or {}).items():
    said.append(
      f'The reward models {names} prefer the same response in {row["same"]:.1%} of '
      f'{found["pairs"]:,} held-out pairs; by chance it would be {row["expected"]:.1%}.'
    )
  return [Sentence(text) for text in said]


def describe_progress(responses: Sequence[Kept], stages: Sequence[str]) -> list[Sentence]:
  """Says how reward and judge changed from the first to the last evaluation of a stage.

  A reward that rises while what it stands for falls is the sign of
  over-optimisation (Gao et al. 2022, arXiv:2210.10760).
  """
  said = []
  for stage in stages:
    rows = [row for row in responses if row.evaluation == TRAINING and row.stage == stage]
    rows = [row for row in rows if row.decoding != GIVEN]  # of the data: they do not learn
    # The first evaluation is that of the model before the stage.
    steps = sorted({row.step for row in rows if row.step is not None})
    if len(steps) < 2:
      continue
    first = {(row.prompt_id, row.prompt): row for row in rows if row.step == steps[0]}
    last = {(row.prompt_id, row.prompt): row for row in rows if row.step == steps[-1]}
    # The same prompts at both ends: the difference is paired.
    pairs = [(row, last[key]) for key, row in first.items() if key in last]
    proxy = [b.score - a.score for a, b in pairs if a.score is not None and b.score is not None]
    if len(proxy) < 2:  # no reward was measured
      continue
    where = f'In {stage}, from step {steps[0]} to {steps[-1]}'
    rose = _describe_change(proxy)
    gold = [
      b.verdict['utility'] - a.verdict['utility']
      for a, b in pairs
      if 'utility' in a.verdict and 'utility' in b.verdict
    ]
    if len(gold) < 2:  # nobody knows the truth here
      said.append(Sentence(f'{where}, the reward of held-out prompts changed by {rose}.'))
      continue
    text = f"{where}, the reward changed by {rose}, and the judge's utility by "
    said.append(_judge_progress(text + _describe_change(gold), proxy, gold))
  return said


def _judge_progress(text: str, proxy: Sequence[float], gold: Sequence[float]) -> Sentence:
  """Adds what the changes of the reward and of the judge's utility mean together."""
  proxy_low, _ = winrate.bootstrap(proxy)
  low, high = winrate.bootstrap(gold)
  # The reward rises for certain, and the judge's utility falls for certain.
  if proxy_low > 0 and high < 0:
    return Sentence(f'{text}: the reward is over-optimised.', BAD)
  if proxy_low > 0 and low > 0:
    return Sentence(f'{text}: both rise.', GOOD)
  return Sentence(f'{text}.')


def _describe_change(differences: Sequence[float]) -> str:
  """Formats a mean difference with its interval."""
  low, high = winrate.bootstrap(differences)
  mean = sum(differences) / len(differences)
  return f'{mean:+.2f} (95% interval {low:+.2f} to {high:+.2f})'


def _state_of(run: Run) -> str:
  """Says how far a run without a comparison is."""
  done = [stage for stage in run.stages if stage.seconds is not None]
  if run.results or len(done) == len(run.stages):
    return 'Finished; no models were compared'
  # The first of them is under way, or was when the process died.
  begun = [stage for stage in run.stages if stage.has_begun and stage.seconds is None]
  place = f'{len(done)} of {len(run.stages)} stages are finished'
  if not begun:
    return f'Not finished: {place}'
  stage = begun[0]
  step = max((line.get('step', 0) for line in stage.metrics), default=0)
  reached = f', at step {step} of {stage.steps}' if stage.steps else ''
  return f'Not finished: {place}; {stage.name} is under way{reached}'


def _describe_last_values(run: Run) -> list[Sentence]:
  """Says what the evaluations of each stage measured last."""
  said = []
  for stage in run.stages:
    values = last_evaluation(stage.metrics)
    shown = [
      f'{key} {value:.4g}' for key, value in values.items() if isinstance(value, (int, float))
    ]
    if shown:
      said.append(Sentence(f'{stage.name}, last evaluation: {", ".join(shown[:5])}.'))
  return said
