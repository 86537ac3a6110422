"""The final table: a row for each model, all measured on the same held-out prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation import controlled_rate, winrate
from rlhf_jax.generation.responses import Responses
from rlhf_jax.text_table import format_blocks

_PERCENT = '{:.1%}'
_INTERVAL = ('95% interval', '{0[0]:.1%} – {0[1]:.1%}')

# Key in results.json → (heading, format of the value), in their order; z: no -0.00.
HEADINGS = {
  'helpful': ('helpful', _PERCENT),
  'honest': ('honest', _PERCENT),
  'harmless': ('harmless', _PERCENT),
  'bare_refusal': ('bare refusal', _PERCENT),
  'unfitting_offer': ('unfitting offer', _PERCENT),
  'ignorance': ('ignorance', _PERCENT),
  'unread': ('unread', _PERCENT),
  'utility': ('utility', '{:z.3f}'),
  'score': ('reward', '{:z.3f}'),
  'win_rate_vs_sft': ('win rate vs SFT', _PERCENT),
  'win_rate_vs_sft_ci95': _INTERVAL,
  'substance_win_rate_vs_sft': ('by substance', _PERCENT),
  'substance_win_rate_vs_sft_ci95': _INTERVAL,
  'win_rate_controlled': ('controlled', _PERCENT),
  'win_rate_controlled_ci95': _INTERVAL,
  'kl_to_sft': ('KL to SFT (nats)', '{:z.2f}'),
  'response_length': ('length', '{:.1f}'),
  'eos_rate': ('EOS', _PERCENT),
  'distinct': ('distinct', _PERCENT),
}
_WIN_RATE = 'win_rate_vs_'  # the beginning of the keys of win rates
_INTERVAL_END = '_ci95'  # the end of the keys of 95% intervals
# Measures of which the row has the difference from the baseline, which is known more exactly
# than either value.
GAINS = ('utility', 'helpful', 'honest', 'harmless')
_STYLE = ('polite', 'in_full')  # measures of the manner, which the controlled win rate controls

# Name of a measure → [N, S] float; NaN where the measure does not apply to the prompt.
Judged = Mapping[str, np.ndarray]


def make_row(
  responses: Responses,
  judged: Judged,
  baseline: Judged,
  others: Mapping[str, np.ndarray] | None = None,
  clusters: Sequence[str] | None = None,
  baseline_texts: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
  """Makes the row of one model in the final table.

  Args:
    responses: S responses of the model to each of N prompts.
    judged: the measures of these responses. The row has the mean of each with its interval.
      `utility` decides which response wins a comparison; `substance`, if present,
      decides it without regard to style.
    baseline: the measures of the baseline (SFT), with which all models are compared.
    others: name of another model → [N, S] float, its utility, for the column
      `win_rate_vs_NAME`.
    clusters: the cluster of each prompt, that is, its subject; intervals resample whole clusters.
    baseline_texts: the responses of the baseline; with them the row has the win
      rate by `utility` with length and style controlled (controlled_rate.py).

  Returns:
    Key → value, as plain floats, and as [low, high] for intervals. Keys of HEADINGS whose values
    are unknown are absent.
  """
  row: dict[str, Any] = {}

  def add(name: str, of_prompts: np.ndarray) -> None:
    row[name] = float(np.nanmean(of_prompts))
    row[name + _INTERVAL_END] = list(winrate.bootstrap(of_prompts, clusters))

  for name, values in judged.items():
    if not np.isnan(values).all():  # all NaN: the measure applies to none of the prompts
      add(name, values.mean(axis=1))
  for name in GAINS:
    if name in judged:
      # Paired, as both responded to the same prompts.
      add(f'{name}_gain', judged[name].mean(axis=1) - baseline[name].mean(axis=1))
  for name, utility in {'sft': baseline['utility'], **(others or {})}.items():
    add(_WIN_RATE + name, winrate.win_rate(judged['utility'], utility))
  if 'substance' in judged:
    wins = winrate.win_rate(judged['substance'], baseline['substance'])
    add(f'substance_{_WIN_RATE}sft', wins)
  if baseline_texts is not None:
    features = {'words': (_count_words(responses.texts), _count_words(baseline_texts))}
    features |= {name: (judged[name], baseline[name]) for name in _STYLE if name in judged}
    rate, interval = controlled_rate.controlled_win_rate(
      judged['utility'], baseline['utility'], features, clusters
    )
    row['win_rate_controlled'] = rate
    row['win_rate_controlled' + _INTERVAL_END] = list(interval)
  if responses.scores is not None:
    row['score'] = float(responses.scores.mean())
  if responses.kl is not None:
    row['kl_to_sft'] = float(responses.kl.mean())
  row['response_length'] = float(responses.lengths.mean())
  row['eos_rate'] = float(responses.ended.mean())
  texts = [text for of_prompt in responses.texts for text in of_prompt]
  row['distinct'] = len(set(texts)) / len(texts)
  return row


def _count_words(texts: Sequence[Sequence[str]]) -> np.ndarray:
  """Counts the words of S responses to each of N prompts, [N, S] float64."""
  return np.array([[len(text.split()) for text in of_prompt] for of_prompt in texts], np.float64)


def format_table(models: Mapping[str, Mapping[str, Any]], width: int = 0) -> str:
  """Formats the table as aligned text.

  Args:
    models: name of a model → its row, from make_row.
    width: columns of the terminal, for which a wide table is broken; 0 = it never is.
  """
  headings = _all_headings(models)
  known = []  # the columns in which some model has a value
  for key in headings:
    if any(key in row for row in models.values()):
      known.append(key)
  rows = [['model', *(headings[key][0] for key in known)]]
  for name, row in models.items():
    cells = [name]
    for key in known:
      _, value_format = headings[key]
      cells.append(value_format.format(row[key]) if key in row else '–')
    rows.append(cells)
  intervals = {number for number, key in enumerate(known, 1) if key.endswith(_INTERVAL_END)}
  return format_blocks(rows, width, joined=intervals)


def _all_headings(
  models: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[str, str]]:
  """Returns HEADINGS, followed by the headings of the comparisons with other models."""
  headings = dict(HEADINGS)
  for row in models.values():
    for key in row:
      if not key.startswith(_WIN_RATE):
        continue
      if key.endswith(_INTERVAL_END):
        headings.setdefault(key, _INTERVAL)
      else:
        opponent = key.removeprefix(_WIN_RATE)
        headings.setdefault(key, (f'vs {opponent}', _PERCENT))
  return headings
