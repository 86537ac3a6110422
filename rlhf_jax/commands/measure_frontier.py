"""Implements `evaluate frontier`: gold and proxy reward against the KL from a reference.

Letters: N prompts, K samples of a policy, M samples of the reference.
"""

import argparse
from collections.abc import Mapping, Sequence
import sys
from typing import Any

import jax
import numpy as np

from rlhf_jax.commands import (
  collect_models,
  contestants,
  lines,
  prompt_sets,
  results_file,
)
from rlhf_jax.commands.contestants import Answers
from rlhf_jax.data.records import conversation, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import oracle_judge, overoptimisation, winrate
from rlhf_jax.generation import responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.runtime import compilation
from rlhf_jax.text_table import format_rows

_ORACLE = 'oracle'
_SHARPNESS = tuple(np.exp(np.linspace(-3.0, 3.0, 25)).tolist())  # 1/β of the tilted reference


def measure(options: argparse.Namespace) -> None:
  """Writes --output and prints the table.

  Raises:
    UserError: a model or the prompts are missing, or the gold cannot
      judge them.
  """
  policies = contestants.parse_contestants(options.models)
  reference = contestants.find_stage(options.reference)
  proxy = contestants.find_stage(options.proxy)
  for policy in policies:
    contestants.check_model(policy.place, head=False)
  contestants.check_model(reference, head=False)
  contestants.check_model(proxy, head=True)
  if options.gold != _ORACLE:
    contestants.check_model(contestants.find_stage(options.gold), head=True)
  elif not prompt_sets.is_world(options):
    raise UserError('--gold=oracle: it knows TinyWorld only; expected --prompts=tinyworld')
  if options.pool < 2:
    raise UserError(f'--pool: expected 2 or more, got {options.pool}')
  prompts = prompt_sets.read_prompts(options)
  clusters = [*prompt_sets.prompt_clusters(prompts, options.cluster)]
  compilation.cache_compilations()
  compilation.request_exact_products()
  judges = _Judges(options, prompts, proxy)
  # one pool serves best-of-n, the tilts and the reference itself
  pool, _ = _respond(options, reference, reference, prompts, options.pool)
  proxies, golds = judges.score(pool)
  results = _measure_pool(proxies, golds, clusters)
  results['policies'] = {}
  for policy in policies:
    texts, kl = _respond(options, policy.place, reference, prompts, options.samples)
    own_proxy, own_gold = judges.score(texts)
    row = _measure_policy(own_proxy, own_gold, kl, clusters, results)
    results['policies'][policy.name] = row
  results_file.write_results(options.output, results)
  print(_format(results))
  print(f'{options.output}: all figures', file=sys.stderr)


class _Judges:
  """The proxy and the gold, opened once."""

  def __init__(
    self,
    options: argparse.Namespace,
    prompts: Sequence[Prompt],
    proxy: str,
  ):
    self._prompts = prompts
    self._conversations = [conversation(prompt) for prompt in prompts]
    self._proxy = collect_models.open_score(proxy, options.batch_size)
    self._gold = None
    if options.gold != _ORACLE:
      place = contestants.find_stage(options.gold)
      self._gold = collect_models.open_score(place, options.batch_size)

  def score(self, texts: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Returns the proxy and the gold reward of N lists of K texts, [N, K] float64 each."""
    proxy = np.stack(self._proxy(self._conversations, texts))
    if self._gold is None:
      return proxy, oracle_judge.judge_with_oracle(self._prompts, texts)['utility']
    return proxy, np.stack(self._gold(self._conversations, texts))


def _respond(
  options: argparse.Namespace,
  place: str,
  reference: str,
  prompts: Sequence[Prompt],
  count: int,
) -> tuple[Answers, np.ndarray]:
  """Samples responses: (N lists of K texts, their KL from the reference, [N, K])."""
  opened = _open(options, place)
  other = opened if place == reference else _open(options, reference)
  if opened.tokenizer is None:
    raise UserError(f'{place} has no tokenizer')
  tokenizer = opened.tokenizer
  sampling = SamplingOptions(
    max_new_tokens=options.max_new_tokens,
    temperature=options.temperature,
  )
  respond = responses.build_responder(
    opened.model, sampling, tokenizer, opened.layout, count, other.model
  )
  ids = [tokenizer.prompt(conversation(prompt)) for prompt in prompts]
  made = responses.complete_prompts(
    respond,
    opened.params,
    ids,
    options.batch_size,
    tokenizer.pad_id,
    jax.random.key(options.seed),
    other.params,
  )
  assert made.kl is not None
  return made.texts, made.kl


def _open(options: argparse.Namespace, place: str) -> lines.OpenedModel:
  """Opens a language model."""
  words = argparse.Namespace(model=place, mesh='', batch_size=options.batch_size, dtype='float32')
  return lines.open_model(words)


def _measure_pool(
  proxies: np.ndarray, golds: np.ndarray, clusters: Sequence[str]
) -> dict[str, Any]:
  """Returns the reference, its best-of-n, its tilts, and the fit of best-of-n."""
  size = proxies.shape[1]
  # powers of two, and the whole pool
  counts = sorted({*(2**k for k in range(size.bit_length()) if 2**k <= size), size})
  best = overoptimisation.best_of_n(proxies, golds, counts)
  base = {'proxy': float(proxies.mean()), 'gold': float(golds.mean())}
  rows = []
  for place, count in enumerate(counts):
    row = {'n': count, 'kl': float(best['kl'][place])}
    for name in ('proxy', 'gold'):
      of_prompts = best[f'{name}_of_prompts'][place]
      row[name] = float(of_prompts.mean())
      row[f'{name}_ci95'] = list(winrate.bootstrap(of_prompts, clusters))
    rows.append(row)
  tilted = overoptimisation.tilt(proxies, golds, _SHARPNESS)
  return {
    'reference': base,
    'best_of_n': rows,
    'tilt': [dict(zip(tilted, map(float, row), strict=True)) for row in zip(*tilted.values())],
    'fit_best_of_n': overoptimisation.fit_form(
      best['kl'], best['gold'] - base['gold'], 'best_of_n'
    ),
  }


def _measure_policy(
  proxy: np.ndarray,
  gold: np.ndarray,
  kl: np.ndarray,
  clusters: Sequence[str],
  pool: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the point of one policy, and how far below the tilted reference it is."""
  row: dict[str, Any] = {}
  for name, values in (('kl', kl), ('proxy', proxy), ('gold', gold)):
    of_prompts = values.mean(axis=1)
    row[name] = float(of_prompts.mean())
    row[f'{name}_ci95'] = list(winrate.bootstrap(of_prompts, clusters))
  # what the reference could reach at the policy's KL
  for curve in ('tilt', 'best_of_n'):
    kls = np.array([point['kl'] for point in pool[curve]])
    for name in ('proxy', 'gold'):
      values = np.array([point[name] for point in pool[curve]])
      row[f'{name}_of_{curve}'] = overoptimisation.reward_at(row['kl'], kls, values)
  return row


def _format(results: Mapping[str, Any]) -> str:
  """Returns the table of policies, best-of-n and the fit."""
  rows = [
    [
      '',
      'KL',
      'proxy',
      'gold',
      '95% interval',
      'proxy of tilt',
      'gold of tilt',
    ]
  ]
  for row in results['best_of_n']:
    low, high = row['gold_ci95']
    cells = [
      f'best of {row["n"]}',
      f'{row["kl"]:.2f}',
      f'{row["proxy"]:.3f}',
    ]
    rows.append(
      [
        *cells,
        f'{row["gold"]:.3f}',
        f'{low:.3f} – {high:.3f}',
        '–',
        '–',
      ]
    )
  for name, row in results['policies'].items():
    low, high = row['gold_ci95']
    cells = [
      name,
      f'{row["kl"]:.2f}',
      f'{row["proxy"]:.3f}',
      f'{row["gold"]:.3f}',
    ]
    cells += [f'{low:.3f} – {high:.3f}']
    rows.append(
      [
        *cells,
        f'{row["proxy_of_tilt"]:.3f}',
        f'{row["gold_of_tilt"]:.3f}',
      ]
    )
  fit = results['fit_best_of_n']
  return (
    f'{format_rows(rows)}\ngold of best-of-n ≈ d (α − β d), d = √KL: α {fit["alpha"]:.3f}, '
    f'β {fit["beta"]:.3f}, R² {fit["r_squared"]:.3f}'
  )
