"""A table of verdicts on pairs of responses, from whatever judge, and the figures that it gives.

Each row is one verdict: which two models met on which prompt, who was
shown first, and how often the first one won. The oracle and reward
models know no order; of other judges a pair has a row for each order.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.evaluation import controlled_rate, winrate


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """V verdicts on the responses of several models.

  Attributes:
    prompts: [V] int, the number of the prompt.
    first: [V] int, the number of the model whose response was shown
      first.
    second: [V] int, that of the other.
    wins: [V] float64 in 0..1, 1 = the first won, 0.5 = a tie; NaN = no
      verdict.
    judges: [V] int, the number of the judge, or of the person.
    differences: name → [V] float64, a feature of the first minus that
      of the second.
    ordered: whether the order in which responses are shown can matter
      to the judge.
    both_orders: whether a judge to whom it can matter saw each pair in
      both orders; people see it in one.
  """

  prompts: np.ndarray
  first: np.ndarray
  second: np.ndarray
  wins: np.ndarray
  judges: np.ndarray
  differences: Mapping[str, np.ndarray]
  ordered: bool
  both_orders: bool = True

  def select(self, chosen: np.ndarray) -> 'Verdicts':
    """Returns some of the verdicts; `chosen` is [V] bool or a list of row numbers."""
    return dataclasses.replace(
      self,
      prompts=self.prompts[chosen],
      first=self.first[chosen],
      second=self.second[chosen],
      wins=self.wins[chosen],
      judges=self.judges[chosen],
      differences={name: values[chosen] for name, values in self.differences.items()},
    )

  def known(self) -> 'Verdicts':
    """Returns the rows that have a verdict."""
    return self.select(~np.isnan(self.wins))


def take_side(verdicts: Verdicts, ours: int, theirs: int) -> tuple[Verdicts, np.ndarray]:
  """Returns the known verdicts between two models, turned to the side of one of them.

  Args:
    verdicts: of any models.
    ours: the number of the model that comes first in the result.
    theirs: that of the other.

  Returns:
    (the verdicts with `wins` and `differences` as seen by ours; [V]
    float64, 1 where ours was shown first and −1 where it was shown
    second).
  """
  # a pair may have been shown either way round
  forward = (verdicts.first == ours) & (verdicts.second == theirs)
  backward = (verdicts.first == theirs) & (verdicts.second == ours)
  met = verdicts.select(forward | backward).known()
  order = np.where(met.first == ours, 1.0, -1.0)
  # a win of the second is a loss of ours
  turned = dataclasses.replace(
    met,
    first=np.full(len(order), ours),
    second=np.full(len(order), theirs),
    wins=np.where(order > 0, met.wins, 1 - met.wins),
    differences={name: order * values for name, values in met.differences.items()},
  )
  return turned, order


def compare_two(
  verdicts: Verdicts,
  ours: int,
  theirs: int,
  clusters: np.ndarray,
) -> dict[str, Any]:
  """Compares two models on the prompts on which they met.

  Args:
    verdicts: of any models.
    ours: the number of the model whose rate of wins is computed.
    theirs: that of the other.
    clusters: [N], the cluster of each prompt; intervals resample whole
      clusters.

  Returns:
    A dict with verdicts, prompts: how many there are; win_rate,
      win_rate_ci95: the mean over prompts, a tie is half a win; ties:
      the share of verdicts that are ties, or of pairs that each order
      gives to another; controlled, controlled_ci95: with the features
      and the order controlled.
    Where the two never met, only the counts, which are 0.
  """
  met, order = take_side(verdicts, ours, theirs)
  if not len(order):
    return {'verdicts': 0, 'prompts': 0}
  # the prompt is the unit: its verdicts are not independent
  prompts, means = mean_of_prompts(met)
  rate, interval = controlled_rate.control_verdicts(
    met.wins,
    met.differences,
    clusters[met.prompts],
    order if verdicts.ordered else None,
    weights=prompt_weights(met),
  )
  return {
    'verdicts': len(order),
    'prompts': len(prompts),
    'win_rate': float(means.mean()),
    'win_rate_ci95': list(winrate.bootstrap(means, [*clusters[prompts]])),
    'ties': float(np.mean(met.wins == 0.5)),
    'controlled': rate,
    'controlled_ci95': list(interval),
  }


def mean_of_prompts(met: Verdicts) -> tuple[np.ndarray, np.ndarray]:
  """Averages the wins of each prompt: (its number [P] int, the mean [P] float64)."""
  prompts, members = np.unique(met.prompts, return_inverse=True)
  means = np.bincount(members, weights=met.wins) / np.bincount(members)
  return prompts, means


def prompt_weights(met: Verdicts) -> np.ndarray:
  """Returns the weights, [V] float64, with which all verdicts on a prompt count as one."""
  return 1 / np.bincount(met.prompts)[met.prompts].astype(np.float64)


def measure_order(verdicts: Verdicts) -> dict[str, float]:
  """Measures what the order of responses does to the verdicts of a judge.

  Returns:
    pairs: how many were seen in both orders with a verdict each;
    consistency: the share of them in which the same model won twice, or
      tied twice;
    first: the mean of the wins of what was shown first (0.5 = no bias).
    Of a judge who saw each pair in one order only `first`; empty for a
    judge who knows no order.
  """
  if not verdicts.ordered:
    return {}
  known = verdicts.known()
  if not verdicts.both_orders:
    return {'first': float(known.wins.mean())}
  # prompt, judge and models → the wins of the lower model, where it was shown first and second
  by_pair: dict[tuple[int, ...], tuple[list[float], list[float]]] = {}
  rows = zip(
    known.prompts,
    known.judges,
    known.first,
    known.second,
    known.wins,
    strict=True,
  )
  for prompt, judge, first, second, wins in rows:
    key = (
      int(prompt),
      int(judge),
      int(min(first, second)),
      int(max(first, second)),
    )
    seen = by_pair.setdefault(key, ([], []))
    seen[int(first > second)].append(float(wins if first < second else 1 - wins))
  # The k-th pair of responses stands k-th in both orders.
  twice = [both for seen in by_pair.values() for both in zip(*seen)]
  if not twice:
    return {'pairs': 0}
  # the same sign: the same model won, or both were ties
  signs = np.sign(np.array(twice) - 0.5)
  return {
    'pairs': len(twice),
    'consistency': float(np.mean(signs[:, 0] == signs[:, 1])),
    'first': float(known.wins.mean()),
  }
