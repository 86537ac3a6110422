"""How far the reward models of a run agree, as those that were trained on two halves of the data.

It is computed from the scores that every reward stage keeps of its held-out responses, so
that no model is read again.
"""

from collections.abc import Mapping, Sequence
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.evaluation import reward_quality
from rlhf_jax.evaluation.reward_quality import JudgedPairs
from rlhf_jax.report import kept_responses
from rlhf_jax.report.kept_responses import GIVEN, Kept

Key = tuple[str, str, int, str]  # (prompt_id, prompt, sample, response)


def measure(workdir: Path, names: Sequence[str]) -> dict[str, Any]:
  """Compares the reward models of a run on the held-out pairs that all of them scored.

  Args:
    workdir: of the run.
    names: of its reward stages.

  Returns:
    pairs; agreement, from reward_quality.compare_models; ensemble, of their mean, from
    reward_quality.measure_ensemble. {} for fewer than two models, or without common pairs.
  """
  if len(names) < 2:
    return {}
  rows = [row for row in kept_responses.read(workdir) if row.decoding == GIVEN]
  scored = {name: _last_scores(rows, name) for name in names}
  common = set.intersection(*(set(own) for own in scored.values()))
  pairs = _list_pairs([row for row in scored[names[0]].values() if _key(row) in common])
  if not pairs:
    return {}
  margins = {}
  for name, own in scored.items():
    values = [_score(own, better) - _score(own, worse) for better, worse in pairs]
    margins[name] = np.array(values)
  lengths = np.array([len(better.response) - len(worse.response) for better, worse in pairs])
  judged = JudgedPairs(
    longer=0.5 + 0.5 * np.sign(lengths),
    sources=np.full(len(pairs), ''),
    clusters=np.array([f'{better.prompt_id} {better.prompt}' for better, _ in pairs]),
  )
  return {
    'pairs': len(pairs),
    'agreement': reward_quality.compare_models(margins),
    'ensemble': reward_quality.measure_ensemble(np.stack([*margins.values()]), judged),
  }


def format_agreement(found: Mapping[str, Any]) -> list[str]:
  """Formats what `measure` returns, as lines of text."""
  lines = []
  for names, row in found.get('agreement', {}).items():
    lines.append(
      f'{names}: the same preference on {row["same"]:.1%} of {found["pairs"]} pairs '
      f'(by chance {row["expected"]:.1%})'
    )
  if found:
    row = found['ensemble']
    parts = ', '.join(f'{value:.0%}' for value in row['by_disagreement'])
    lines.append(
      f'their mean: {row["accuracy"]:.1%}; by quarters from the least disagreement {parts}'
    )
  return lines


def _key(row: Kept) -> Key:
  return (row.prompt_id, row.prompt, row.sample, row.response)


def _score(scored: Mapping[Key, Kept], row: Kept) -> float:
  """Returns the score that one model gave to a response."""
  score = scored[_key(row)].score
  assert score is not None  # every GIVEN row has one
  return score


def _last_scores(rows: Sequence[Kept], name: str) -> dict[Key, Kept]:
  """Returns the rows of the last evaluation of a stage."""
  own = [row for row in rows if row.stage == name]
  last = max((row.step or 0 for row in own), default=0)
  return {_key(row): row for row in own if row.step == last}


def _list_pairs(rows: Sequence[Kept]) -> list[tuple[Kept, Kept]]:
  """Lists (better, worse) of every pair of responses to a prompt that people ordered."""
  by_prompt: dict[tuple[str, str], list[Kept]] = {}
  for row in rows:
    by_prompt.setdefault((row.prompt_id, row.prompt), []).append(row)
  pairs = []
  for own in by_prompt.values():
    for better, worse in itertools.permutations(own, 2):
      if better.verdict['rank'] < worse.verdict['rank']:
        pairs.append((better, worse))
  return pairs
