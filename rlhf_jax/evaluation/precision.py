"""How sure a win rate is: where its variance comes from, and what more prompts would buy.

The verdict on prompt p by judge j is m + a_p + b_j + e_pj, with
variances of prompts (σ²_p), of judges (σ²_j) and of the rest (σ²_e).
The mean over P prompts and J judges then has the variance σ²_p / P +
σ²_j / J + σ²_e / (P J): more prompts do not help against a judge who
errs in the same way everywhere.
"""

import math

import numpy as np
from scipy import special

POWER = 0.8  # of the smallest detectable difference
LEVEL = 0.05  # of its two-sided test


def variance_components(
  values: np.ndarray, prompts: np.ndarray, judges: np.ndarray
) -> dict[str, float]:
  """Estimates the variances of prompts, of judges and of the rest.

  They are differences of means of products: of two verdicts on one
  prompt by different judges, on different prompts by one judge, and on
  different prompts by different judges. These means are unbiased
  whichever judge saw which prompts (the U-statistics behind Henderson
  1953, method 1). Estimates below 0 are set to 0.

  Args:
    values: [V] float, the verdicts.
    prompts: [V], the prompt of each.
    judges: [V], the judge of each; several verdicts of one judge on a
      prompt are averaged first.

  Returns:
    prompt, judge, rest. Without a prompt that two judges saw, the rest
    cannot be told from the prompts: `prompt` is both of them together,
    and `judge` and `rest` are NaN.
  """
  values, prompts, judges = _average_repeats(values, prompts, judges)
  mean = values.mean()
  centred = values - mean
  by_prompt = _sums(centred, prompts)
  by_judge = _sums(centred, judges)
  count = len(values)
  squares = float(np.sum(centred**2))
  # ordered pairs of two different verdicts on one prompt
  pairs_of_prompt = float(np.sum(np.bincount(prompts) ** 2) - count)
  pairs_of_judge = float(np.sum(np.bincount(judges) ** 2) - count)
  if not pairs_of_prompt:
    return {
      'prompt': squares / max(1, count - 1),
      'judge': math.nan,
      'rest': math.nan,
    }
  # (Σ x)² = Σ x² + Σ_{i≠k} x_i x_k gives the sum of all products at once
  same_prompt = (np.sum(by_prompt**2) - squares) / pairs_of_prompt
  same_judge = 0.0
  if pairs_of_judge:
    same_judge = (np.sum(by_judge**2) - squares) / pairs_of_judge
  # Of different prompts and judges: what is left of the square of the sum, which is 0.
  others = count**2 - count - pairs_of_prompt - pairs_of_judge
  neither = 0.0
  if others > 0:
    products = -np.sum(by_prompt**2) - np.sum(by_judge**2) + squares
    neither = products / others
  prompt = same_prompt - neither
  judge = same_judge - neither
  rest = squares / count - neither - prompt - judge
  return {name: max(0.0, float(v)) for name, v in zip(_COMPONENTS, (prompt, judge, rest))}


_COMPONENTS = ('prompt', 'judge', 'rest')


def detectable_difference(standard_error: float, power: float = POWER) -> float:
  """Computes the smallest difference of a mean that a two-sided test at 5% finds.

    δ = (z_{1 − α/2} + z_{power}) · standard error

  Args:
    standard_error: of the mean.
    power: the probability of finding a difference of this size.

  >>> round(detectable_difference(0.5 / 384**0.5), 3)
  0.071
  """
  return _sum_of_quantiles(power) * standard_error


def prompts_needed(
  standard_error: float,
  prompts: int,
  difference: float,
  power: float = POWER,
) -> int:
  """Computes how many prompts it takes to find a difference, if their spread stays the same.

  Args:
    standard_error: of the mean over the prompts at hand; that of a
      bootstrap over clusters includes that prompts of a cluster are
      alike.
    prompts: how many are at hand.
    difference: the wanted difference, such as 0.03 for three points.
    power: the probability of finding it.

  >>> prompts_needed(0.5 / 100**0.5, 100, 0.05)
  785
  """
  # of one prompt; the error falls with the root of their number
  variance = standard_error**2 * prompts
  return math.ceil(variance * (_sum_of_quantiles(power) / difference) ** 2)


def standard_error_of(
  interval: tuple[float, float] | list[float],
) -> float:
  """Returns the standard error that a 95% interval stands for: its width / (2 · 1.96)."""
  low, high = interval
  return (high - low) / (2 * special.ndtri(1 - LEVEL / 2))


def _sum_of_quantiles(power: float) -> float:
  """Returns z_{1 − α/2} + z_{power}."""
  return float(special.ndtri(1 - LEVEL / 2) + special.ndtri(power))


def _average_repeats(
  values: np.ndarray, prompts: np.ndarray, judges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Averages all verdicts of a judge on a prompt: (values, prompts, judges as numbers from 0)."""
  # numbers from 0, whatever the names were
  _, prompt_numbers = np.unique(prompts, return_inverse=True)
  _, judge_numbers = np.unique(judges, return_inverse=True)
  cells = np.stack([prompt_numbers, judge_numbers], axis=1)
  kinds, members = np.unique(cells, axis=0, return_inverse=True)
  members = members.ravel()
  means = _sums(np.asarray(values, np.float64), members) / np.bincount(members)
  return means, kinds[:, 0], kinds[:, 1]


def _sums(values: np.ndarray, members: np.ndarray) -> np.ndarray:
  """Adds up the values of each member."""
  return np.bincount(members, weights=values)
