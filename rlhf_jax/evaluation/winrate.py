"""Honest comparison of two models on the same prompts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_DECIMALS = 6  # of utilities that are compared: rounding errors are no wins


def win_rate(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
  """Computes wins plus half the ties, for each prompt.

  Args:
    ours: [N, S] float, the judge's utility of S responses to each of N prompts.
    theirs: [N, R] float, the same of the other model; every response meets every one.

  Returns:
    [N] float64 in 0..1.
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  difference = ours[:, :, None] - theirs[:, None, :]
  wins = 0.5 + 0.5 * np.sign(np.round(difference, _DECIMALS))  # 1, 0.5 or 0
  return wins.mean(axis=(1, 2))


def bootstrap(
  values: ArrayLike,
  clusters: Sequence[str] | None = None,
  seed: int = 0,
  resamples: int = 2000,
) -> tuple[float, float]:
  """Computes the 95% bootstrap interval of a mean (Efron 1979).

  Whole clusters are drawn again, of prompts that are about the same: responses to them are not
  independent.

  Args:
    values: [N] float, one for each prompt; NaN where it says nothing.
    clusters: the cluster of each prompt; None = each prompt is its own.
    seed: of the draws.
    resamples: how many times as many clusters as there are are drawn.

  Returns:
    The 2.5% and the 97.5% quantile of the means.
  """
  every = np.asarray(values, np.float64)
  known = ~np.isnan(every)
  counted = every[known]
  if clusters is None:
    members = np.arange(len(counted))
  else:
    _, members = np.unique(np.asarray(clusters)[known], return_inverse=True)
  sums = np.bincount(members, weights=counted)
  sizes = np.bincount(members)
  rng = np.random.default_rng(seed)
  # Each row of draws is a set of clusters, some twice, some not at all.
  draws = rng.integers(0, len(sizes), (resamples, len(sizes)))
  means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)
