"""What a model gains, and loses, by the kind of prompt: a mean over all of them can hide either."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.evaluation import winrate
from rlhf_jax.evaluation.table import Judged


def make_rows(
  kinds: Sequence[str],
  judged: Judged,
  baseline: Judged,
  clusters: Sequence[str],
) -> dict[str, dict[str, Any]]:
  """Makes a row for each kind of prompt.

  Args:
    kinds: the kind of each of N prompts.
    judged: `helpful` and `substance` of S responses to each prompt, [N, S] float.
    baseline: the same of the baseline, [N, R] float.
    clusters: the cluster of each prompt; intervals resample whole clusters.

  Returns:
    Kind → {prompts, helpful, substance_win_rate_vs_sft}: the number of prompts of that
    kind, the rate and the win rate against the baseline, these with their 95%
    interval as [low, high] under …_ci95. Kinds are in the order of the alphabet.
  """
  helpful = np.asarray(judged['helpful']).mean(axis=1)
  wins = winrate.win_rate(judged['substance'], baseline['substance'])
  rows: dict[str, dict[str, Any]] = {}
  for kind in sorted({*kinds}):
    numbers = [number for number, other in enumerate(kinds) if other == kind]
    own_clusters = [clusters[number] for number in numbers]
    row: dict[str, Any] = {'prompts': len(numbers)}
    for name, values in {'helpful': helpful, 'substance_win_rate_vs_sft': wins}.items():
      row[name] = float(values[numbers].mean())
      row[f'{name}_ci95'] = list(winrate.bootstrap(values[numbers], own_clusters))
    rows[kind] = row
  return rows
