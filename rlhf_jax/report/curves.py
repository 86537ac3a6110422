"""Which curves the report draws, of one run or of several beside each other."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

from rlhf_jax.evaluation import winrate
from rlhf_jax.report import charts
from rlhf_jax.report.charts import Chart, Point, Series
from rlhf_jax.report.kept_responses import FINAL, GIVEN, Kept, TRAINING
from rlhf_jax.report.run_files import Run

HELD_OUT = 'held out'
ON_TRAINING = 'training data'


class Panel(NamedTuple):
  """What one panel draws of a stage: metric → its name in the legend."""

  title: str
  note: str
  metrics: Mapping[str, str]


PANELS = (
  Panel(
    'reward', 'score of the reward', {'reward/score': ON_TRAINING, 'eval/reward/score': HELD_OUT}
  ),
  Panel('KL', 'to the reference, nats per response', {'kl': ON_TRAINING, 'eval/kl': HELD_OUT}),
  Panel(
    'accuracy',
    'share of the pairs in the order of people',
    {
      'accuracy': ON_TRAINING,
      'eval/accuracy': HELD_OUT,
      'eval/length_accuracy': 'the longer one',
    },
  ),
  Panel('loss', 'what is minimised', {'loss': ON_TRAINING, 'eval/loss': HELD_OUT}),
  Panel(
    'nats per character',
    'held out; lower is better',
    {
      'eval/nats_per_character': 'model',
      'eval/bigram_nats_per_character': 'bigrams',
      'eval/gzip_nats_per_character': 'gzip',
    },
  ),
  Panel(
    'length',
    'tokens of a response',
    {'response/length': ON_TRAINING, 'eval/response/length': HELD_OUT},
  ),
  Panel(
    'ended',
    'share of the responses that end by themselves',
    {'response/eos_rate': ON_TRAINING, 'eval/response/eos_rate': HELD_OUT},
  ),
  Panel('entropy', 'of the policy, nats per token', {'policy/rollout_entropy': ON_TRAINING}),
  Panel('clipped', 'share of the tokens', {'policy/clip_fraction': ON_TRAINING}),
  Panel('value', 'explained variance; 1 is perfect', {'value/explained_variance': ON_TRAINING}),
  Panel('margin', 'of the implicit reward', {'margin': ON_TRAINING, 'eval/margin': HELD_OUT}),
  Panel('gradient', 'its norm before clipping', {'norm/gradient': ON_TRAINING}),
)
# The loss of a stage with one of these does not tell how good the policy is.
_POLICY_METRICS = {'reward/score', 'eval/reward/score'}


def draw_curves(groups: Mapping[str, Sequence[Run]]) -> dict[str, list[Chart]]:
  """Draws the curves of every stage.

  Args:
    groups: name → the runs that differ in their seed only, whose curves become
      one line with a band.

  Returns:
    Name of a stage → its panels.
  """
  # In the order of the first run that has them.
  names = dict.fromkeys(
    stage.name for runs in groups.values() for run in runs for stage in run.stages
  )
  drawn = {name: _draw_stage(name, groups) for name in names}
  return {name: panels for name, panels in drawn.items() if panels}


def _draw_stage(name: str, groups: Mapping[str, Sequence[Run]]) -> list[Chart]:
  """Draws the panels of a stage for which it has metrics."""
  drawn = []
  for panel in PANELS:
    series = []
    for number, (group, runs) in enumerate(groups.items()):
      for metric, label in panel.metrics.items():
        lines = [line for line in (read_curve(run, name, metric) for run in runs) if line]
        if not lines:
          continue
        # Of several groups, the legend tells them apart, and the line's form the data.
        is_alone = len(groups) == 1
        title = label if is_alone else f'{group}, {label}'
        color = None if is_alone else number
        on_training = label == ON_TRAINING
        series.append(charts.over_runs(title, lines, is_dashed=on_training, color=color))
    # The clipped loss of a policy hovers around 0, however well it learns.
    if panel.title == 'loss' and _has_policy(name, groups):
      continue
    chart = charts.draw_chart(panel.title, panel.note, 'step', series)
    if chart:
      drawn.append(chart)
  return drawn


def read_curve(run: Run, stage: str, metric: str) -> list[Point]:
  """Returns (step, value) of a metric, where it was measured."""
  for one in run.stages:
    if one.name == stage:
      values = [(line.get('step'), line.get(metric)) for line in one.metrics]
      return [(float(x), float(y)) for x, y in values if x is not None and y is not None]
  return []


def _has_policy(name: str, groups: Mapping[str, Sequence[Run]]) -> bool:
  """Says whether a stage samples from a policy."""
  for runs in groups.values():
    for run in runs:
      for stage in run.stages:
        if stage.name == name:
          return any(_POLICY_METRICS & set(line) for line in stage.metrics[:3])
  return False


# Gold and proxy reward against √KL (Gao et al. 2022, arXiv:2210.10760, figure 1).


def draw_frontier(groups: Mapping[str, Sequence[Run]]) -> list[Chart]:
  """Draws the reward and the judge's utility against √KL: along training, and of the table's rows.

  Args:
    groups: name → runs, as in `draw_curves`.
  """
  drawn = []
  colors: dict[str, int] = {}  # a name has the same colour in both charts
  for key, title in (
    ('score', 'reward that is optimised (proxy)'),
    ('utility', "judge's utility (gold)"),
  ):
    series = []
    for number, (group, runs) in enumerate(groups.items()):
      is_alone = len(groups) == len(runs) == 1
      for run in runs:
        for one in _run_frontier(run, key, is_alone):
          if is_alone:
            color = colors.setdefault(one.name, len(colors))
            series.append(dataclasses.replace(one, color=color))
            continue
          # Of several runs, colours tell the configs apart.
          seed = f', seed {run.config.get("seed")}' if len(runs) > 1 else ''
          name = f'{group}{seed}, {one.name}'
          series.append(dataclasses.replace(one, name=name, color=number))
    chart = charts.draw_chart(title, 'of held-out prompts, against √KL', '√KL', series)
    if chart:
      drawn.append(chart)
  return drawn


def _run_frontier(run: Run, key: str, is_alone: bool) -> list[Series]:
  """Returns the paths of training, and points of the final table.

  Beside other runs, only the models that were compared with the baseline have a
  point: with all controls nothing could be seen.
  """
  parts = ('models', 'controls') if is_alone else ('models',)
  points = _table_frontier(run, key, parts)
  if not is_alone:
    points = [one for one in points if one.name != f'{run.baseline}, table']
  return [*_training_frontier(run, key), *points]


def _training_frontier(run: Run, key: str) -> list[Series]:
  """Returns a line for each stage with evaluations that measure KL."""
  series = []
  for stage in run.stages:
    rows = [row for row in run.responses if row.evaluation == TRAINING and row.stage == stage.name]
    by_step: dict[int, list[Kept]] = {}
    for row in rows:
      if row.kl is not None and row.step is not None:
        by_step.setdefault(row.step, []).append(row)
    points, band = [], []
    for own in by_step.values():
      values = _values(own, key)
      if not values:
        continue
      # An estimate near 0 may be negative.
      x = math.sqrt(max(0.0, sum(row.kl or 0.0 for row in own) / len(own)))
      low, high = winrate.bootstrap(values, resamples=500)
      points.append((x, sum(values) / len(values)))
      band.append((x, low, high))
    if points:
      # In the order of the steps, as the path of training may turn back.
      series.append(Series(stage.name, points, band, has_bars=True))
  return series


def _values(rows: Sequence[Kept], key: str) -> list[float]:
  """Returns the score or the utility of the rows that have one."""
  if key == 'score':
    return [row.score for row in rows if row.score is not None]
  return [row.verdict[key] for row in rows if key in row.verdict]


def _table_frontier(run: Run, key: str, parts: Sequence[str]) -> list[Series]:
  """Returns a point for each row of the final table with a KL: models, best of N, tilts."""
  series = []
  for part in parts:
    for name, decodings in (run.results.get(part) or {}).items():
      row = decodings.get('sampled') or {}
      kl, value = row.get('kl_to_sft'), row.get(key)
      if kl is None or value is None:
        continue
      x = math.sqrt(max(0.0, kl))
      band = [(x, *row[f'{key}_ci95'])] if f'{key}_ci95' in row else []
      title = f'{name}, table'.replace('_', ' ')
      series.append(Series(title, [(x, value)], band, is_line=False, has_bars=True))
  return series


# Distributions.


def draw_distributions(run: Run) -> dict[str, list[charts.Histogram]]:
  """Draws how reward and utility are distributed over responses.

  Returns:
    What is distributed → a histogram of each model, or of the first and last
    evaluation.
  """
  drawn = {}
  names = list(run.results.get('models') or {})
  # Only models: what controls choose from is SFT's distribution again.
  final: dict[str, list[Kept]] = {name: [] for name in names}
  for row in run.responses:
    if row.evaluation == FINAL and row.decoding == 'sampled' and row.model in final:
      final[row.model].append(row)
  drawn["the judge's utility, final table, sampled"] = charts.draw_histograms(
    [(name, _values(rows, 'utility')) for name, rows in final.items()]
  )
  drawn['the reward, final table, sampled'] = charts.draw_histograms(
    [(name, _values(rows, 'score')) for name, rows in final.items()]
  )
  for stage in run.stages:
    rows = [row for row in run.responses if row.evaluation == TRAINING and row.stage == stage.name]
    steps = sorted({row.step for row in rows if row.step is not None})
    if rows and rows[0].decoding == GIVEN:
      last = [row for row in rows if row.step == steps[-1]]
      drawn[f'scores of held-out responses, {stage.name}'] = _draw_by_rank(last)
      continue
    # One histogram where there was one evaluation.
    ends = dict.fromkeys([steps[0], steps[-1]]) if steps else {}
    drawn[f'the reward of held-out prompts, {stage.name}'] = charts.draw_histograms(
      [
        (f'step {step}', _values([row for row in rows if row.step == step], 'score'))
        for step in ends
      ]
    )
  return {title: histograms for title, histograms in drawn.items() if histograms}


def _draw_by_rank(rows: Sequence[Kept]) -> list[charts.Histogram]:
  """Draws the scores of the responses that people rank first, and of those that they rank last."""
  lowest: dict[str, float] = {}  # rank of the last response to each prompt
  for row in rows:
    lowest[row.prompt_id] = max(lowest.get(row.prompt_id, 0.0), row.verdict['rank'])
  last = [row for row in rows if row.verdict['rank'] == lowest[row.prompt_id] > 1]
  first = [row for row in rows if row.verdict['rank'] == 1]
  return charts.draw_histograms(
    [('people rank it first', _values(first, 'score')), ('last', _values(last, 'score'))]
  )
