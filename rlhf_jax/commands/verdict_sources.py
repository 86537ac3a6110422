"""Who says which response is better: each kind of judge gives a table of verdicts.

Letters: M models, N prompts, K responses of a model to a prompt.
"""

import argparse
from collections.abc import Mapping, Sequence
import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.commands import (
  collect_models,
  contestants,
  lines,
  prompt_sets,
)
from rlhf_jax.commands.contestants import Answers
from rlhf_jax.data import row_files
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge, style
from rlhf_jax.evaluation.verdicts import Verdicts
from rlhf_jax.feedback import function_judge, judges, judging
from rlhf_jax.feedback.endpoint import EndpointOptions
from rlhf_jax.feedback.http_requests import is_address
from rlhf_jax.feedback.judging import Comparison
from rlhf_jax.feedback.language_judge import JudgeOptions, LanguageModel
from rlhf_jax.named_functions import is_function_name

ORACLE = 'oracle'
REWARD = 'reward:'
PEOPLE = 'people:'

_MANNER = (
  'polite',
  'in_full',
)  # what the oracle knows of the manner, beside style.py
_DECIMALS = 6  # utilities and probabilities are compared to this precision
_TIE = 0.5


def check_judge(name: str, options: argparse.Namespace) -> None:
  """Checks that a judge exists, without reading its parameters.

  Raises:
    UserError: it does not, or cannot judge these prompts.
  """
  if name == ORACLE:
    if not prompt_sets.is_world(options):
      raise UserError('--judge=oracle: it knows TinyWorld only; expected --prompts=tinyworld')
  elif name.startswith(REWARD):
    contestants.check_model(contestants.find_stage(name.removeprefix(REWARD)), head=True)
  elif name.startswith(PEOPLE):
    if not Path(name.removeprefix(PEOPLE)).is_file():
      raise UserError(f'--judge: there is no file {name.removeprefix(PEOPLE)}')
  elif is_address(name):
    contestants.split_address(name)
  elif _is_function(name):
    function_judge.build_function_judge(name)
  else:
    contestants.check_model(contestants.find_stage(name), head=False)


def judge_answers(
  name: str,
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
) -> Verdicts:
  """Judges all pairs of models.

  Args:
    name: the judge, any but people.
    options: the command's words.
    prompts: N prompts.
    answers: of M models, N lists of K texts each.

  Returns:
    A row for each pair of responses; for judges who see an order, two.
  """
  # what is controlled, whoever judges
  manner = _measure_manner(options, prompts, answers)
  if name == ORACLE or name.startswith(REWARD):
    utilities = _utilities(name, options, prompts, answers)
    return _compare_utilities(utilities, manner)
  judge = judges.open_judge(_judge_place(name), _resources(name, options))
  return _ask_judge(judge, options, prompts, answers, manner)


def read_people(name: str, models: Sequence[str]) -> tuple[Verdicts, list[str]]:
  """Reads the rankings that people made of the responses of models.

  Args:
    name: people:FILE, a file that `collect` exported.
    models: the names of models in the file.

  Returns:
    (the verdicts, with a judge for each person; the prompts, as texts).

  Raises:
    UserError: a row is no such ranking, or a model is not in the file.
  """
  path = name.removeprefix(PEOPLE)
  # models in the file that are not compared are left out
  numbers = {model: number for number, model in enumerate(models)}
  prompts: dict[str, int] = {}
  people: dict[str, int] = {}
  rows = []
  pairs_of_texts = []
  seen: set[str] = set()
  is_order_known = True
  for place, row in row_files.read_rows(path):
    responses, ranks, authors = _ranked(row, place)
    seen.update(authors)
    places = _places_on_page(row, len(ranks), place)
    is_order_known &= places is not None
    prompt = prompts.setdefault(prompt_sets.prompt_key(row['messages']), len(prompts))
    person = people.setdefault(str(row.get('annotator', '')), len(people))
    # The response that stood first on the page comes first.
    order = sorted(range(len(ranks)), key=(places or range(len(ranks))).__getitem__)
    for i, j in itertools.combinations(order, 2):
      sides = numbers.get(authors[i]), numbers.get(authors[j])
      if None in sides or sides[0] == sides[1]:
        continue
      wins = _TIE + _TIE * np.sign(ranks[j] - ranks[i])
      rows.append((prompt, *sides, wins, person))
      pairs_of_texts.append((responses[i], responses[j]))
  for model in models:
    if model not in seen:
      known = ', '.join(sorted(seen)) or 'none'
      raise UserError(f'{path}: no response of {model!r}; it has those of {known}')
  if not rows:
    raise UserError(f'{path}: nobody ranked two of these models')
  columns = [np.array(column) for column in zip(*rows, strict=True)]
  ours, theirs = (style.measure_style(texts) for texts in zip(*pairs_of_texts, strict=True))
  differences = {feature: ours[feature] - theirs[feature] for feature in ours}
  # in the order of `rows`
  table = Verdicts(
    prompts=columns[0],
    first=columns[1],
    second=columns[2],
    wins=columns[3],
    judges=columns[4],
    differences=differences,
    ordered=is_order_known,
    both_orders=False,
  )
  return table, [*prompts]


def _ranked(row: Any, place: str) -> tuple[list[str], list[int], list[str]]:
  """Returns the responses of an exported ranking, their ranks and their models."""
  if not isinstance(row, dict) or 'messages' not in row:
    raise UserError(f'{place}: expected a ranking that collect exported')
  parts = [row.get(name) for name in ('responses', 'ranks', 'models')]
  lengths = {len(part) if isinstance(part, list) else -1 for part in parts}
  if len(lengths) != 1 or -1 in lengths:
    raise UserError(f'{place}: expected responses, ranks and models, lists of one length')
  return parts[0], parts[1], parts[2]  # type: ignore[return-value]  # lists, as checked


def _places_on_page(row: Mapping[str, Any], count: int, place: str) -> list[int] | None:
  """Returns where each response stood on the page; None where an older export does not say."""
  shown = row.get('shown')
  if shown is None:
    return None
  if not isinstance(shown, list) or sorted(map(repr, shown)) != sorted(map(repr, range(count))):
    raise UserError(f'{place}: shown: expected the numbers 0 to {count - 1} in some order')
  return [shown.index(number) for number in range(count)]


# Judges who give each response a utility.


def _utilities(
  name: str,
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
) -> list[np.ndarray]:
  """Returns the utilities of each model's responses, M times [N, K] float64."""
  if name == ORACLE:
    judged = [oracle_judge.judge_with_oracle(prompts, own) for own in answers]
    return [values['utility'] for values in judged]
  place = contestants.find_stage(name.removeprefix(REWARD))
  score = collect_models.open_score(place, options.batch_size)
  conversations = [conversation(prompt) for prompt in prompts]
  return [np.stack(score(conversations, own)) for own in answers]


def _compare_utilities(
  utilities: Sequence[np.ndarray],
  manner: Mapping[str, Sequence[np.ndarray]],
) -> Verdicts:
  """Compares each response of a model with each one of another to the same prompt."""
  # utilities are cheap: all K · K pairs of two models
  parts = []
  for a, b in itertools.combinations(range(len(utilities)), 2):
    # rounding errors are no wins
    difference = _differences(utilities[a], utilities[b])  # [N, K · K]
    wins = _TIE + _TIE * np.sign(np.round(difference, _DECIMALS))
    differences = {
      name: _differences(values[a], values[b]).ravel() for name, values in manner.items()
    }
    prompts = np.repeat(np.arange(len(wins)), wins.shape[1])
    parts.append(_table(prompts, a, b, wins.ravel(), differences, ordered=False))
  return join_tables(parts)


def _differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Subtracts each of theirs from each of ours: [N, K], [N, L] → [N, K · L]."""
  return (ours[:, :, None] - theirs[:, None, :]).reshape(len(ours), -1)


# Judges who compare two responses.


def _ask_judge(
  judge: judging.Judge,
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
  manner: Mapping[str, Sequence[np.ndarray]],
) -> Verdicts:
  """Asks a judge about the k-th responses of each two models, in both orders."""
  # judges cost money or time: the k-th against the k-th only
  comparisons, rows = [], []
  for a, b in itertools.combinations(range(len(answers)), 2):
    for number, prompt in enumerate(prompts):
      pairs = zip(answers[a][number], answers[b][number], strict=False)
      for sample, (ours, theirs) in enumerate(pairs):
        comparisons.append(Comparison(conversation(prompt), ours, theirs, options.principle))
        rows.append((number, a, b, sample))
  is_same = np.array([pair.first == pair.second for pair in comparisons])
  as_shown = np.full((len(rows), 2), _TIE)  # equal texts are a tie that nobody is asked about
  asked = [pair for pair, same in zip(comparisons, is_same, strict=True) if not same]
  # NaN where the judge gave no verdict in an order
  if asked:
    _, as_shown[~is_same] = judging.ask_both_orders(judge)(asked)
  if np.isnan(as_shown).all():
    raise UserError('the judge gave no verdict on any pair')
  # NaN stays NaN.
  wins = _TIE + _TIE * np.sign(np.round(as_shown - _TIE, _DECIMALS))
  numbers, first, second, samples = map(np.array, zip(*rows, strict=True))
  differences = {}
  for name, values in manner.items():
    stacked = np.stack(values)  # [M, N, K]
    differences[name] = stacked[first, numbers, samples] - stacked[second, numbers, samples]
  # the two orders are rows of their own, so that the order can be controlled
  forward = _table(numbers, first, second, wins[:, 0], differences, ordered=True)
  opposite = {name: -values for name, values in differences.items()}
  backward = _table(numbers, second, first, wins[:, 1], opposite, ordered=True)
  return join_tables([forward, backward])


def _judge_place(name: str) -> str:
  """Returns a judge's name as judges.open_judge takes it."""
  if is_address(name):
    return contestants.split_address(name)[0]
  return name if _is_function(name) else contestants.find_stage(name)


def _is_function(name: str) -> bool:
  """Says whether a judge is module:function, and not WORKDIR:STAGE."""
  return is_function_name(name) and not Path(contestants.find_stage(name)).is_dir()


def _resources(name: str, options: argparse.Namespace) -> judges.JudgeResources:
  """Returns what judges are opened with."""
  # the cache stands beside the output: nothing is asked twice
  model = contestants.split_address(name)[1] if is_address(name) else ''
  return judges.JudgeResources(
    judge=JudgeOptions(batch_size=options.batch_size),
    endpoint=EndpointOptions(model=model, key_env=options.key_env),
    cache=options.output.with_suffix('.judge.jsonl'),
    open_language_model=functools.partial(_open_reader, options),
  )


def _open_reader(options: argparse.Namespace, place: str) -> LanguageModel:
  """Opens a language model that judges."""
  words = argparse.Namespace(model=place, mesh='', batch_size=options.batch_size, dtype='float32')
  opened = lines.open_model(words)
  if opened.tokenizer is None:
    raise UserError(f'--judge: {place} has no tokenizer')
  return LanguageModel(opened.model, opened.params, opened.tokenizer, opened.layout)


# Tables.


def _table(
  prompts: np.ndarray,
  first: np.ndarray | int,
  second: np.ndarray | int,
  wins: np.ndarray,
  differences: Mapping[str, np.ndarray],
  ordered: bool,
) -> Verdicts:
  """Makes the table of one judge."""
  count = len(prompts)
  return Verdicts(
    prompts=prompts,
    first=np.broadcast_to(first, count),
    second=np.broadcast_to(second, count),
    wins=wins,
    judges=np.zeros(count, int),
    differences=differences,
    ordered=ordered,
  )


def join_tables(tables: Sequence[Verdicts]) -> Verdicts:
  """Joins tables with the same features into one."""
  differences = {}
  for name in tables[0].differences:
    differences[name] = np.concatenate([table.differences[name] for table in tables])
  return Verdicts(
    prompts=np.concatenate([table.prompts for table in tables]),
    first=np.concatenate([table.first for table in tables]),
    second=np.concatenate([table.second for table in tables]),
    wins=np.concatenate([table.wins for table in tables]),
    judges=np.concatenate([table.judges for table in tables]),
    differences=differences,
    ordered=tables[0].ordered,
  )


def _measure_manner(
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
  answers: Sequence[Answers],
) -> dict[str, list[np.ndarray]]:
  """Returns the features of style of each model's responses: name → M times [N, K] float64."""
  manner: dict[str, list[np.ndarray]] = {}
  for own in answers:
    texts = [text for of_prompt in own for text in of_prompt]
    measured = style.measure_style(texts)
    # back from all texts in a row to [N, K]
    shape = (len(own), -1)
    features = {name: values.reshape(shape) for name, values in measured.items()}
    if prompt_sets.is_world(options):
      judged = oracle_judge.judge_with_oracle(prompts, own)
      features |= {name: judged[name] for name in _MANNER}
    for name, values in features.items():
      manner.setdefault(name, []).append(values)
  return manner
