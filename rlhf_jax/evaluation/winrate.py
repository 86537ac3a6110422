"""Honest comparison of two models on the same prompts."""

import numpy as np
from numpy.typing import ArrayLike

_DECIMALS = 6  # of utilities that are compared: rounding errors are no wins


def win_rate(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
  """Computes wins plus half the ties, for each prompt.

  Args:
    ours: [N, S] float, the judge's utility of S responses to each of N prompts.
    theirs: the same of the other model; response s meets response s.

  Returns:
    [N] float64 in 0..1.
  """
  difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
  wins = 0.5 + 0.5 * np.sign(np.round(difference, _DECIMALS))  # 1, 0.5 or 0
  return wins.mean(axis=1)


def bootstrap(values: ArrayLike, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
  """Computes the 95% bootstrap interval of a mean (Efron 1979).

  Prompts are what is drawn again, all responses to a prompt together: responses to
  one prompt are not independent.

  Args:
    values: [N] float, one for each prompt.
    seed: of the draws.
    resamples: how many times N prompts are drawn.

  Returns:
    The 2.5% and the 97.5% quantile of the means.
  """
  values = np.asarray(values, np.float64)
  count = len(values)
  rng = np.random.default_rng(seed)
  # Each row of draws is a set of prompts, some twice, some not at all.
  draws = rng.integers(0, count, (resamples, count))
  means = values[draws].mean(axis=1)
  low, high = np.quantile(means, [0.025, 0.975])
  return float(low), float(high)
