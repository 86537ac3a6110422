"""Implements `evaluate reward`: reward models on pairs of responses.

Letters: N rows of data, K responses to each, P pairs.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import sys
from typing import Any

import numpy as np

from rlhf_jax import json_lines
from rlhf_jax.commands import (
  collect_models,
  contestants,
  prompt_sets,
  results_file,
)
from rlhf_jax.data import row_files, sources
from rlhf_jax.data.records import (
  conversation,
  parse_record,
  Ranking,
  response_text,
)
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import reward_bench, reward_quality
from rlhf_jax.evaluation.reward_quality import JudgedPairs
from rlhf_jax.text_table import format_rows

Scores = list[np.ndarray]  # of N rows, [K] float each


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row of data."""

  id: str
  source: str
  messages: list[dict]
  responses: list[str]
  ranks: list[int]
  subset: str = ''  # of RewardBench; '' in other data


def measure(options: argparse.Namespace) -> None:
  """Writes --output and prints the tables.

  Raises:
    UserError: a model or the data is not there, or not of the right
      kind.
  """
  # models before data: a mistyped name is the likelier mistake
  places = [contestants.find_stage(word) for word in options.models]
  for place in places:
    contestants.check_model(place, head=True)
  rows = _read(options)
  scores = {}
  for word, place in zip(options.models, places, strict=True):
    score = collect_models.open_score(place, options.batch_size)
    scores[word] = score([row.messages for row in rows], [row.responses for row in rows])
  pairs = _list_pairs(rows)
  judged = _describe_pairs(rows, pairs)
  margins = {name: _margins(values, pairs) for name, values in scores.items()}
  results: dict[str, Any] = {
    'data': options.data,
    'rows': len(rows),
    'pairs': len(pairs),
  }
  results['models'] = {name: _measure_one(values, judged) for name, values in margins.items()}
  if len(margins) > 1:
    results['agreement'] = reward_quality.compare_models(margins)
    stacked = np.stack([*margins.values()])
    results['ensemble'] = reward_quality.measure_ensemble(stacked, judged)
  if rows[0].subset:
    results['reward_bench'] = {name: _bench(rows, values) for name, values in scores.items()}
  results_file.write_results(options.output, results)
  _write_errors(options, rows, pairs, next(iter(margins.values())))
  print('\n'.join(_format(results)))
  print(f'{options.output}: all figures', file=sys.stderr)


def _read(options: argparse.Namespace) -> list[_Row]:
  """Reads the rows of --data."""
  if options.data == 'tinyworld':
    data = DataOptions(seed=options.world)
    records = sources.load_records(data, 'ranking', 'validation')
    rows = [_from_record(record) for record in records]
  else:
    rows = [_from_file(row, place) for place, row in row_files.read_rows(options.data)]
  if not rows:
    raise UserError(f'{options.data}: no rows')
  return sources.spread_evenly(rows, options.limit) if options.limit else rows


def _from_record(record: Ranking, subset: str = '', name: str = '') -> _Row:
  """Makes a row of a ranking."""
  return _Row(
    id=name or record.id,
    source=subset or record.source,
    messages=conversation(record),
    responses=[response_text(response) for response in record.responses],
    ranks=record.ranks,
    subset=subset,
  )


def _from_file(row: Any, place: str) -> _Row:
  """Makes a row of a file's row; those of RewardBench have a subset."""
  if not isinstance(row, dict):
    raise UserError(f'{place}: expected an object')
  subset = row.get('subset', '')
  # other data has subsets, too, but no chosen responses beside them
  is_bench = isinstance(subset, str) and subset and 'chosen' in row
  record = parse_record('ranking', row, place)
  return _from_record(record, subset if is_bench else '', str(row.get('id', '')))


def _list_pairs(rows: Sequence[_Row]) -> list[tuple[int, int, int]]:
  """Returns (row, better response, worse response) of all pairs that are not tied."""
  pairs = []
  # a ranking of K gives up to K (K − 1) / 2 pairs
  for number, row in enumerate(rows):
    for i, j in itertools.permutations(range(len(row.ranks)), 2):
      if row.ranks[i] < row.ranks[j]:
        pairs.append((number, i, j))
  if not pairs:
    raise UserError('no two responses of the data have different ranks')
  return pairs


def _describe_pairs(rows: Sequence[_Row], pairs: Sequence[tuple[int, int, int]]) -> JudgedPairs:
  """Returns what is known of the pairs without a model."""
  longer, names, clusters = [], [], []
  for number, better, worse in pairs:
    row = rows[number]
    difference = len(row.responses[better]) - len(row.responses[worse])
    longer.append(0.5 + 0.5 * np.sign(difference))
    names.append(row.source)
    clusters.append(prompt_sets.prompt_key(row.messages))
  return JudgedPairs(np.array(longer), np.array(names), np.array(clusters))


def _margins(scores: Scores, pairs: Sequence[tuple[int, int, int]]) -> np.ndarray:
  """Returns the score of the better response minus that of the worse one, [P]."""
  return np.array([scores[row][better] - scores[row][worse] for row, better, worse in pairs])


def _measure_one(margins: np.ndarray, judged: JudgedPairs) -> dict[str, Any]:
  """Returns the figures of one model."""
  return {
    'accuracy': reward_quality.measure_accuracy(margins, judged),
    'calibration': reward_quality.measure_calibration(margins),
  }


def _bench(rows: Sequence[_Row], scores: Scores) -> dict[str, Any]:
  """Returns the figures of RewardBench or RewardBench 2."""
  # the first RewardBench has pairs only
  two = all(len(row.responses) == 2 for row in rows)
  if two:
    # The better one of each row, and the other.
    ordered = [values[np.argsort(row.ranks)] for row, values in zip(rows, scores, strict=True)]
    chosen, rejected = np.array(ordered).T
    return reward_bench.score_pairs(chosen, rejected, [row.subset for row in rows])
  by_subset: dict[str, list[float]] = {}
  ties = []
  for row, values in zip(rows, scores, strict=True):
    order = np.argsort(row.ranks, kind='stable')
    if row.subset == reward_bench.TIES:
      ties.append(
        (
          row.id,
          values[order].tolist(),
          row.ranks.count(min(row.ranks)),
        )
      )
    else:
      right = reward_bench.score_best_of(values[order].tolist())
      by_subset.setdefault(row.subset, []).append(right)
  subsets = {name: float(np.mean(values)) for name, values in by_subset.items()}
  if ties:
    subsets[reward_bench.TIES] = reward_bench.score_ties(ties)
  return {
    'subsets': subsets,
    'score': reward_bench.mean_of_subsets(subsets),
  }


def _write_errors(
  options: argparse.Namespace,
  rows: Sequence[_Row],
  pairs: Sequence[tuple[int, int, int]],
  margins: np.ndarray,
) -> None:
  """Writes the pairs that the first model gets most wrong."""
  errors = []
  for number in reward_quality.list_errors(margins, options.errors):
    place, better, worse = pairs[number]
    row = rows[place]
    errors.append(
      {
        'id': row.id,
        'source': row.source,
        'margin': float(margins[number]),
        'messages': row.messages,
        'better': row.responses[better],
        'worse': row.responses[worse],
      }
    )
  json_lines.write_values(options.output.with_suffix('.errors.jsonl'), errors)


def _format(results: Mapping[str, Any]) -> list[str]:
  """Returns the lines of the tables."""
  lines = []
  for name, values in results['models'].items():
    table = [
      [
        'source',
        'pairs',
        'accuracy',
        '95% interval',
        'longer wins',
        'gain',
        '95% interval',
      ]
    ]
    for source, row in values['accuracy'].items():
      low, high = row['accuracy_ci95']
      below, above = row['gain_ci95']
      table.append(
        [
          source,
          f'{row["pairs"]:,}',
          f'{row["accuracy"]:.1%}',
          f'{low:.1%} – {high:.1%}',
          f'{row["length_accuracy"]:.1%}',
          f'{row["gain"]:+.1%}',
          f'{below:+.1%} – {above:+.1%}',
        ]
      )
    calibration = values['calibration']
    lines += [f'model: {name}', format_rows(table)]
    lines += [
      f'calibration: expected error {calibration["expected_error"]:.1%}, '
      f'Brier {calibration["brier"]:.3f}',
      format_rows(_calibration_rows(calibration), '  '),
      '',
    ]
  for pair, row in results.get('agreement', {}).items():
    lines.append(
      f'{pair}: the same preference on {row["same"]:.1%} of the pairs (by chance '
      f'{row["expected"]:.1%}), correlation {row["correlation"]:.2f}'
    )
  if 'ensemble' in results:
    row = results['ensemble']
    quarters = ', '.join(f'{value:.0%}' for value in row['by_disagreement'])
    lines.append(
      f'their mean: accuracy {row["accuracy"]:.1%}; by quarters of disagreement {quarters}'
    )
  for name, row in results.get('reward_bench', {}).items():
    sections = row.get('sections', {})
    parts = [f'{key} {value:.1%}' for key, value in {**row['subsets'], **sections}.items()]
    score = f', score {row["score"]:.1%}' if 'score' in row else ''
    lines.append(f'RewardBench, {name}: {", ".join(parts)}{score}')
  return lines


def _calibration_rows(
  calibration: Mapping[str, Any],
) -> list[list[str]]:
  """Returns the reliability table."""
  rows = [['confidence', 'pairs', 'mean', 'right']]
  for part in calibration['bins']:
    rows.append(
      [
        f'{part["low"]:.2f} – {part["high"]:.2f}',
        str(part['pairs']),
        f'{part["confidence"]:.3f}',
        f'{part["accuracy"]:.3f}',
      ]
    )
  return rows
