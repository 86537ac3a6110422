"""Win rates of one model against another on the same prompts, and bootstrap intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_DECIMALS = 6  # utilities are compared to this precision, so that rounding errors are not wins


def win_rate(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
  """Computes the share of wins plus half the share of ties, for each prompt.

  Args:
    ours: [N, S] float, the judge's utility of S responses to each of N prompts.
    theirs: [N, R] float, the utility of R responses of the other model. Each of ours is compared
      with each of theirs.

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

  Whole clusters of prompts are resampled, because responses to prompts about the
  same subject are not independent.

  Args:
    values: [N] float, one for each prompt; prompts with NaN are left out.
    clusters: the cluster of each prompt; None = each prompt is a cluster of its own.
    seed: the seed of the draws.
    resamples: the number of bootstrap samples; each draws as many clusters as there are.

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
  # Each row of draws is one bootstrap sample, with some clusters several times
  # and some not at all.
  draws = rng.integers(0, len(sizes), (resamples, len(sizes)))
  means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)
