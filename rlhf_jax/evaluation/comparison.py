"""The figures of a comparison of several models by one judge, and their table."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

import numpy as np

from rlhf_jax.evaluation import precision, ratings, verdicts
from rlhf_jax.evaluation.verdicts import Verdicts
from rlhf_jax.text_table import format_rows


def compute_figures(
  table: Verdicts,
  names: Sequence[str],
  clusters: np.ndarray,
  baseline: int,
  difference: float,
) -> dict[str, Any]:
  """Computes all figures of one judge's verdicts.

  Args:
    table: the verdicts.
    names: of the models.
    clusters: [N], the cluster of each prompt.
    baseline: the number of the model with which all are compared.
    difference: of win rates, for which the needed prompts are counted.

  Returns:
    A dict with
      verdicts, without_verdict: how many there are;
      pairs: of each two models, the figures of verdicts.compare_two with `ours` and `theirs`,
        detectable_difference, prompts_needed and variance (precision.py);
      ratings, ratings_controlled: from ratings.rate_models, the baseline's rating is 0;
      order: from verdicts.measure_order.
  """
  pairs = []
  # each two models once
  for a, b in itertools.combinations(range(len(names)), 2):
    # From the side of the model that is not the baseline.
    ours, theirs = (a, b) if b == baseline or a != baseline else (b, a)
    row = verdicts.compare_two(table, ours, theirs, clusters)
    if row['verdicts']:
      row |= _precision_of(table, row, ours, theirs, difference)
    pairs.append({'ours': names[ours], 'theirs': names[theirs], **row})
  return {
    'baseline': names[baseline],
    'verdicts': len(table.wins),
    'without_verdict': int(np.isnan(table.wins).sum()),
    'pairs': pairs,
    'ratings': ratings.rate_models(table, names, clusters, baseline),
    'ratings_controlled': ratings.rate_models(table, names, clusters, baseline, controlled=True),
    'order': verdicts.measure_order(table),
  }


def _precision_of(
  table: Verdicts,
  row: Mapping[str, Any],
  ours: int,
  theirs: int,
  difference: float,
) -> dict[str, Any]:
  """Returns how sure a win rate is, and where its variance comes from."""
  # the interval knows the clusters, so the error does, too
  met, _ = verdicts.take_side(table, ours, theirs)
  error = precision.standard_error_of(row['win_rate_ci95'])
  return {
    'detectable_difference': precision.detectable_difference(error),
    'prompts_needed': precision.prompts_needed(error, row['prompts'], difference),
    'variance': precision.variance_components(met.wins, met.prompts, met.judges),
  }


def compare_judges(tables: Mapping[str, Verdicts]) -> dict[str, float]:
  """Measures how often two judges agree on which of two models is better on a prompt.

  Args:
    tables: name of a judge → its verdicts on the same responses.

  Returns:
    'a, b' → the share of equal outcomes, of the mean of each judge over
    all verdicts on two models and a prompt; a tie equals a tie only.
  """
  outcomes = {name: _outcomes(table) for name, table in tables.items()}
  shares = {}
  for first, second in itertools.combinations(outcomes, 2):
    both = outcomes[first].keys() & outcomes[second].keys()
    same = [np.sign(outcomes[first][key]) == np.sign(outcomes[second][key]) for key in both]
    if same:
      shares[f'{first}, {second}'] = float(np.mean(same))
  return shares


def _outcomes(table: Verdicts) -> dict[tuple[int, int, int], float]:
  """Returns (prompt, lower model, higher model) → the mean of wins − ½ of the lower one."""
  # the mean over both orders and all responses to the prompt
  known = table.known()
  collected: dict[tuple[int, int, int], list[float]] = {}
  for prompt, first, second, wins in zip(
    known.prompts, known.first, known.second, known.wins, strict=True
  ):
    worth = wins - 0.5 if first < second else 0.5 - wins
    key = (
      int(prompt),
      int(min(first, second)),
      int(max(first, second)),
    )
    collected.setdefault(key, []).append(float(worth))
  return {key: round(float(np.mean(values)), 9) for key, values in collected.items()}


def format_figures(figures: Mapping[str, Any], lengths: Mapping[str, float]) -> str:
  """Formats the figures of one judge as a table and a few lines.

  Args:
    figures: from `compute_figures`.
    lengths: name of a model → the mean length of its responses in
      words, where known.
  """
  baseline = figures['baseline']
  # the table has a row for each model; `pairs` has all pairs
  against = {pair['ours']: pair for pair in figures['pairs'] if pair['theirs'] == baseline}
  headings = [
    'model',
    f'wins vs {baseline}',
    '95% interval',
    'controlled',
    '95% interval',
  ]
  headings += ['Elo', '95% interval', 'rank', 'words']
  rows = [headings]
  for rated in figures['ratings']:
    name = rated['name']
    low, high = rated['elo_ci95']
    best, worst = rated['rank_ci95']
    cells = [name, *_rate_cells(against.get(name, {}))]
    cells += [
      f'{rated["elo"]:+.0f}',
      '–' if name == baseline else f'{low:+.0f} – {high:+.0f}',
    ]
    # ranks that the data cannot tell apart overlap
    cells += [f'{best}' if best == worst else f'{best}–{worst}']
    cells += [f'{lengths[name]:.1f}' if name in lengths else '–']
    rows.append(cells)
  return '\n'.join([format_rows(rows), *_notes(figures, against)])


def _rate_cells(pair: Mapping[str, Any]) -> list[str]:
  """Returns the cells of the two win rates."""
  if not pair.get('verdicts'):
    return ['–'] * 4
  cells = []
  for name in ('win_rate', 'controlled'):
    low, high = pair[f'{name}_ci95']
    cells += [f'{pair[name]:.1%}', f'{low:.1%} – {high:.1%}']
  return cells


def _notes(figures: Mapping[str, Any], against: Mapping[str, Any]) -> list[str]:
  """Returns the lines below the table."""
  notes = []
  if figures['without_verdict']:
    notes.append(f'{figures["without_verdict"]} of {figures["verdicts"]} comparisons: no verdict')
  order = figures['order']
  if order.get('pairs'):
    notes.append(
      f'the order of responses: {order["consistency"]:.1%} of {order["pairs"]} pairs have the '
      f'same outcome in both; what is shown first wins {order["first"]:.1%}'
    )
  elif 'first' in order:
    notes.append(f'what is shown first wins {order["first"]:.1%}; its place is controlled')
  # the least sure of the comparisons with the baseline
  measured = [pair for pair in against.values() if pair.get('verdicts')]
  if measured:
    widest = max(pair['detectable_difference'] for pair in measured)
    notes.append(
      f'differences from {widest:.1%} on would be found with these prompts '
      f'(four times in five, at 5%)'
    )
  return notes
