"""Honest comparison of two models on the same prompts."""

import numpy as np


def win_rate(ours, theirs):
  """Wins plus half the ties, for each prompt.

  Args:
    ours, theirs: [N, S] float, the judge's utility of S answers to each of N prompts; answer s meets answer s.

  Returns:
    [N] float64 in [0, 1].
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return (0.5 + 0.5 * np.sign(np.round(ours - theirs, 6))).mean(axis=1)


def bootstrap(values, seed: int = 0, resamples: int = 2000):
  """95% interval of the mean, prompts being what is drawn again (all answers to a prompt together).

  Args:
    values: [N] float, one for each prompt.

  Returns:
    (low, high).
  """
  values = np.asarray(values, np.float64)
  draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
  low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
  return float(low), float(high)
