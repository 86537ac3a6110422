"""Implements the command `compare`: models on the same prompts, judged and tabulated."""

import argparse
from collections.abc import Mapping, Sequence
import itertools
import sys
from typing import Any

import numpy as np

from rlhf_jax import json_lines
from rlhf_jax.commands import (
  contestants,
  kept_answers,
  prompt_sets,
  results_file,
  verdict_sources,
)
from rlhf_jax.commands.contestants import Answers
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import comparison, precision, style
from rlhf_jax.evaluation.verdicts import Verdicts
from rlhf_jax.runtime import compilation


def compare(options: argparse.Namespace) -> None:
  """Writes --output and prints the tables.

  Raises:
    UserError: whatever is wrong with models, judges, prompts or
      numbers; all are checked before the first model responds.
  """
  _check_numbers(options)
  # people judged what they were shown, not what models say today
  people = [name for name in options.judge if name.startswith(verdict_sources.PEOPLE)]
  if people and len(people) < len(options.judge):
    raise UserError(
      '--judge: people judged other responses; compare them in a command of their own'
    )
  # A judge that is missing is found before the first response.
  for name in options.judge:
    verdict_sources.check_judge(name, options)
  if people:
    results, lines = _compare_by_people(options)
  else:
    results, lines = _compare_by_judges(options)
  results_file.write_results(options.output, results)
  print('\n'.join(lines))
  print(f'{options.output}: all figures', file=sys.stderr)


def _check_numbers(options: argparse.Namespace) -> None:
  """Raises UserError for numbers out of range."""
  if len(options.models) < 2:
    raise UserError('expected two models or more, to compare')
  for name in ('samples', 'max_new_tokens', 'batch_size'):
    if getattr(options, name) < 1:
      raise UserError(f'--{name}: expected 1 or more, got {getattr(options, name)}')
  if not 0 < options.difference < 1:
    raise UserError(f'--difference: expected a number between 0 and 1, got {options.difference}')


def _baseline(options: argparse.Namespace, names: Sequence[str]) -> int:
  """Returns the number of the baseline."""
  if not options.baseline:
    return 0
  if options.baseline not in names:
    raise UserError(f'--baseline: expected one of {", ".join(names)}, got {options.baseline!r}')
  return [*names].index(options.baseline)


# By people.


def _compare_by_people(
  options: argparse.Namespace,
) -> tuple[dict[str, Any], list[str]]:
  """Compares the models whose responses people ranked: (results, lines to print)."""
  names = [*options.models]
  baseline = _baseline(options, names)
  results: dict[str, Any] = {
    'models': {name: name for name in names},
    'judges': {},
  }
  lines = []
  for name in options.judge:
    table, prompts = verdict_sources.read_people(name, names)
    figures = comparison.compute_figures(
      table,
      names,
      np.arange(len(prompts)),
      baseline,
      options.difference,
    )
    results['judges'][name] = figures
    lines += [
      f'judge: {name}',
      comparison.format_figures(figures, {}),
      *_variance_lines(figures),
    ]
  return results, lines


# By any other judge.


def _compare_by_judges(
  options: argparse.Namespace,
) -> tuple[dict[str, Any], list[str]]:
  """Lets all models respond and the judges judge: (results, lines to print)."""
  models = contestants.parse_contestants(options.models)
  names = [model.name for model in models]
  baseline = _baseline(options, names)
  for model in models:
    contestants.check_contestant(model)
  prompts = prompt_sets.read_prompts(options)
  # all that can be wrong is checked by now
  compilation.cache_compilations()
  compilation.request_exact_products()
  answers = _equal_counts(kept_answers.respond_once(models, options, prompts))
  clusters = prompt_sets.prompt_clusters(prompts, options.cluster)
  results = _describe(options, models, prompts, answers, clusters)
  lines = [
    f'{len(prompts)} prompts in {len(set(clusters))} clusters, '
    f'{len(answers[0][0])} response(s) of each model'
  ]
  # kept, as judges are compared with each other at the end
  tables = {}
  for name in options.judge:
    table = verdict_sources.judge_answers(name, options, prompts, answers)
    tables[name] = table
    figures = comparison.compute_figures(table, names, clusters, baseline, options.difference)
    results['judges'][name] = figures
    lines += [
      f'\njudge: {name}',
      comparison.format_figures(figures, results['words']),
    ]
  # Only several judges can tell noise of judges from that of prompts.
  if len(tables) > 1:
    results['between_judges'] = comparison.compare_judges(tables)
    results['variance'] = _variance_over_judges(tables, names)
    lines += ['', *_between_lines(results)]
  if options.training:
    found = prompt_sets.count_overlap(prompts, options.training)
    results['overlap'] = found
    lines.append(
      f'overlap with training: {found["copies"]} of {found["prompts"]} prompts are copies, '
      f'{found["contained"]} are contained'
    )
  _write_answers(options, names, prompts, answers, tables)
  kept_answers.forget(options)
  return results, lines


def _equal_counts(answers: Sequence[Answers]) -> list[Answers]:
  """Takes the same number of responses of each model; files may hold more."""
  # With more samples a model's mean would be less noisy than another's.
  fewest = min(len(texts) for own in answers for texts in own)
  return [[texts[:fewest] for texts in own] for own in answers]


def _describe(
  options: argparse.Namespace,
  models: Sequence[contestants.Contestant],
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
  clusters: np.ndarray,
) -> dict[str, Any]:
  """Returns the results that do not depend on a judge."""
  words, manner = {}, {}
  for model, own in zip(models, answers, strict=True):
    measured = style.measure_style([text for texts in own for text in texts])
    manner[model.name] = {name: float(values.mean()) for name, values in measured.items()}
    words[model.name] = manner[model.name]['words']
  settings = (
    'prompts',
    'world',
    'limit',
    'samples',
    'max_new_tokens',
    'temperature',
    'seed',
  )
  return {
    'models': {model.name: model.place for model in models},
    'settings': {name: getattr(options, name) for name in settings},
    'prompts': len(prompts),
    'clusters': len(set(clusters)),
    'responses': len(answers[0][0]),
    'words': words,
    'style': manner,
    'judges': {},
  }


def _variance_over_judges(
  tables: Mapping[str, Verdicts], names: Sequence[str]
) -> dict[str, dict[str, float]]:
  """Returns 'a, b' → the variances of prompts, judges and the rest of a's wins over b."""
  found = {}
  for a, b in itertools.combinations(range(len(names)), 2):
    # every judge is one column of the analysis
    values, prompts, judges = [], [], []
    for number, table in enumerate(tables.values()):
      forward = (table.first == a) & (table.second == b)
      backward = (table.first == b) & (table.second == a)
      met = table.select(forward | backward).known()
      # as seen by a, whichever was shown first
      values.append(np.where(met.first == a, met.wins, 1 - met.wins))
      prompts.append(met.prompts)
      judges.append(np.full(len(met.prompts), number))
    columns = map(np.concatenate, (values, prompts, judges))
    found[f'{names[a]}, {names[b]}'] = precision.variance_components(*columns)
  return found


def _between_lines(results: Mapping[str, Any]) -> list[str]:
  """Returns lines on how far judges agree."""
  lines = [
    f'{pair}: the same outcome on {share:.1%}' for pair, share in results['between_judges'].items()
  ]
  for pair, parts in results['variance'].items():
    lines.append(_variance_line(pair, parts))
  return lines


def _variance_lines(figures: Mapping[str, Any]) -> list[str]:
  """Returns lines on the variance of people."""
  lines = []
  for pair in figures['pairs']:
    if 'variance' in pair:
      lines.append(_variance_line(f'{pair["ours"]}, {pair["theirs"]}', pair['variance']))
  return lines


def _variance_line(pair: str, parts: Mapping[str, float]) -> str:
  """Returns a line on where the variance of a verdict comes from."""
  if np.isnan(parts['judge']):
    return f'{pair}: no prompt was judged twice, so the variance of judges is unknown'
  total = sum(parts.values()) or 1.0
  shares = ', '.join(f'{name} {value / total:.0%}' for name, value in parts.items())
  return f'{pair}: of the variance of a verdict {shares}'


def _write_answers(
  options: argparse.Namespace,
  names: Sequence[str],
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
  tables: Mapping[str, Verdicts],
) -> None:
  """Writes all responses with the verdicts on them, a line for each prompt."""
  rows = []
  for number, prompt in enumerate(prompts):
    judged: dict[str, list[dict[str, Any]]] = {}
    for judge, table in tables.items():
      own = table.select(table.prompts == number)
      judged[judge] = [
        {
          'first': names[first],
          'second': names[second],
          'wins': None if np.isnan(wins) else float(wins),
        }
        for first, second, wins in zip(own.first, own.second, own.wins, strict=True)
      ]
    responses = {name: own[number] for name, own in zip(names, answers, strict=True)}
    # one line for each prompt, which can be read beside the figures
    rows.append(
      {
        'id': prompt.id,
        'messages': conversation(prompt),
        'responses_of': responses,
        'verdicts': judged,
      }
    )
  json_lines.write_values(options.output.with_suffix('.answers.jsonl'), rows)
