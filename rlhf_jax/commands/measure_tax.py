"""Implements `evaluate tax`: what alignment costs in held-out loss and in tasks."""

import argparse
from collections.abc import Mapping, Sequence
import functools
import sys
from typing import Any

import jax
import numpy as np

from rlhf_jax.commands import (
  contestants,
  lines,
  prompt_sets,
  results_file,
  score_lines,
)
from rlhf_jax.data import sources
from rlhf_jax.data.records import conversation, Document, Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge, winrate
from rlhf_jax.rewards import sources as reward_sources
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.runtime import compilation
from rlhf_jax.text_table import format_rows

_ORACLE = 'oracle'


def measure(options: argparse.Namespace) -> None:
  """Writes --output and prints the table; the first model is the one before.

  Raises:
    UserError: a model, documents, prompts or the task are missing.
  """
  models = contestants.parse_contestants(options.models)
  for model in models:
    contestants.check_contestant(model)
  if not options.documents and not options.task:
    raise UserError('expected --documents, or --task with --prompts')
  results: dict[str, Any] = {'models': {model.name: {} for model in models}}
  documents = _read_documents(options) if options.documents else []
  prompts = prompt_sets.read_prompts(options) if options.task else []
  compilation.cache_compilations()
  compilation.request_exact_products()
  for model in models:
    row = results['models'][model.name]
    if documents:
      row['losses'] = _losses(model.place, documents, options.batch_size)
    if prompts:
      row['right'] = _right(model, options, prompts)
  _summarise(results, prompt_sets.prompt_clusters(prompts, options.cluster))
  results_file.write_results(options.output, results)
  print(_format(results))
  print(f'{options.output}: all figures', file=sys.stderr)


def _read_documents(options: argparse.Namespace) -> list[Document]:
  """Reads held-out documents."""
  data = DataOptions(seed=options.world)
  if options.documents != 'tinyworld':
    data = DataOptions(source='jsonl', path=(options.documents,))
  rows = list(sources.load_records(data, 'document', 'validation'))
  return sources.spread_evenly(rows, options.limit) if options.limit else rows


def _losses(place: str, documents: Sequence[Document], batch_size: int) -> np.ndarray:
  """Returns (nats, tokens, characters) of each document, [N, 3] float64."""
  words = argparse.Namespace(model=place, mesh='', batch_size=batch_size, dtype='float32')
  opened = lines.open_model(words)
  if opened.tokenizer is None or opened.model.config.head:
    raise UserError(f'{place}: expected a language model with a tokenizer')
  longest = opened.model.config.max_length
  # a document is cut to what the model reads; both models read the same
  ids = [opened.tokenizer.text(document.text)[:longest] for document in documents]
  read = jax.jit(functools.partial(score_lines.read_tokens, opened.model))
  nats = np.zeros((len(ids), 3))
  by_length = sorted(range(len(ids)), key=list(map(len, ids)).__getitem__)
  for first in range(0, len(ids), batch_size):
    batch = by_length[first : first + batch_size]
    length = lines.bucket_length(len(ids[batch[-1]]))
    lengths = [0] * len(ids)  # no token is a response's
    rows = score_lines.score_batch(
      opened,
      read,
      batch_size,
      ids,
      lengths,
      batch,
      length,
      jax.random.key(0),
    )
    for number, row in zip(batch, rows, strict=True):
      characters = len(opened.tokenizer.decode(ids[number]))
      nats[number] = (
        -sum(row['logprobs']),
        len(row['logprobs']),
        characters,
      )
  return nats


def _right(
  model: contestants.Contestant,
  options: argparse.Namespace,
  prompts: Sequence[Prompt],
) -> np.ndarray:
  """Returns the share of right responses to each prompt, [N] float64."""
  answers = contestants.respond(model, options, prompts)
  if options.task == _ORACLE:
    if not prompt_sets.is_world(options):
      raise UserError('--task=oracle: it knows TinyWorld only; expected --prompts=tinyworld')
    return oracle_judge.judge_with_oracle(prompts, answers)['helpful'].mean(axis=1)
  source = reward_sources.parse_reward_source(options.task)
  if source.on_device or not source.scores_texts:
    raise UserError(f'--task: expected oracle or a function, got {options.task!r}')
  score = reward_sources.open_reward_source(source, RewardSourceOptions(), _no_model)
  rows = [prompt for prompt, texts in zip(prompts, answers, strict=True) for _ in texts]
  texts = [text for own in answers for text in own]
  values, _ = score([conversation(row) for row in rows], texts, rows)
  return np.asarray(values, np.float64).reshape(len(prompts), -1).mean(axis=1)


def _no_model(name: str) -> Any:
  raise UserError(f'--task: {name!r} is a model; expected a function')


def _summarise(results: dict[str, Any], clusters: np.ndarray) -> None:
  """Replaces the values of documents and prompts by means, and differences to the first model."""
  # the first model's values, against which all are paired
  before: dict[str, Any] = {}
  for row in results['models'].values():
    before = before or dict(row)
    if 'losses' in row:
      losses, base = row.pop('losses'), before['losses']
      row['documents'] = len(losses)
      row['nats_per_token'] = losses[:, 0].sum() / losses[:, 1].sum()
      row['nats_per_character'] = losses[:, 0].sum() / losses[:, 2].sum()
      # A paired difference of documents, weighted by their tokens.
      change = losses[:, 0] - base[:, 0]
      row['loss_change'] = change.sum() / losses[:, 1].sum()
      row['loss_change_ci95'] = _ratio_interval(change, losses[:, 1])
    if 'right' in row:
      right, own = row.pop('right'), before['right']
      row['accuracy'] = float(right.mean())
      row['accuracy_ci95'] = list(winrate.bootstrap(right, [*clusters]))
      row['accuracy_change'] = float((right - own).mean())
      row['accuracy_change_ci95'] = list(winrate.bootstrap(right - own, [*clusters]))


def _ratio_interval(totals: np.ndarray, sizes: np.ndarray, resamples: int = 2000) -> list[float]:
  """Returns the 95% bootstrap interval of Σ totals / Σ sizes, over documents."""
  rng = np.random.default_rng(0)
  draws = rng.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), resamples)
  ratios = (draws @ totals) / (draws @ sizes)
  return np.quantile(ratios, [0.025, 0.975]).tolist()


def _format(results: Mapping[str, Any]) -> str:
  """Returns the table."""
  rows = [
    [
      'model',
      'nats/token',
      'change',
      '95% interval',
      'accuracy',
      'change',
      '95% interval',
    ]
  ]
  for name, row in results['models'].items():
    cells = [name]
    if 'nats_per_token' in row:
      low, high = row['loss_change_ci95']
      cells += [
        f'{row["nats_per_token"]:.4f}',
        f'{row["loss_change"]:+.4f}',
      ]
      cells += [f'{low:+.4f} – {high:+.4f}']
    else:
      cells += ['–'] * 3
    if 'accuracy' in row:
      low, high = row['accuracy_change_ci95']
      cells += [
        f'{row["accuracy"]:.1%}',
        f'{row["accuracy_change"]:+.1%}',
      ]
      cells += [f'{low:+.1%} – {high:+.1%}']
    else:
      cells += ['–'] * 3
    rows.append(cells)
  return format_rows(rows)
