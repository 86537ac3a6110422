"""Over-optimisation: gold and proxy reward against the KL from the reference.

Letters: N prompts, M samples of the reference for each.

With d = √KL, Gao et al. 2022 (arXiv:2210.10760, equations 1 and 2) fit

  best-of-n:  R(d) = d (α − β d)        RL:  R(d) = d (α − β log d)

to the gold reward, in which R(0) = 0 by the choice of its zero.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np
from scipy import special

from rlhf_jax.objectives import divergence

FORMS = ('best_of_n', 'rl')
_SMALLEST = 0.5  # d from which the form of RL holds; its slope at 0 is infinite


def best_of_n(proxy: np.ndarray, gold: np.ndarray, counts: Sequence[int]) -> dict[str, np.ndarray]:
  """Estimates the proxy and gold reward of best-of-n, without bias, from M samples.

  Of the samples sorted by the proxy, the i-th is the best of n drawn
  without replacement with probability C(i − 1, n − 1) / C(M, n) (Gao et
  al. 2022, appendix I; Nakano et al. 2021). Equal scores share their
  probability.

  Args:
    proxy: [N, M] float, by which the best is chosen.
    gold: [N, M] float.
    counts: the n, from 1 to M.

  Returns:
    n; kl, log n − (n − 1)/n; proxy, gold: [counts] the means over
    prompts; proxy_of_prompts,
    gold_of_prompts: [counts, N].
  """
  # ascending, so that rank i is the best of its subset
  order = np.argsort(proxy, axis=1, kind='stable')
  sorted_proxy = np.take_along_axis(proxy, order, axis=1)
  sorted_gold = _average_ties(sorted_proxy, np.take_along_axis(gold, order, axis=1))
  size = proxy.shape[1]
  ranks = np.arange(1, size + 1)
  # of rank i: the other n − 1 of the subset are below it
  weights = []
  for count in counts:
    chances = _log_choose(ranks - 1, count - 1) - _log_choose(np.array(size), count)
    weights.append(np.where(ranks >= count, np.exp(chances), 0.0))
  stacked = np.stack(weights)  # [counts, M]
  of_proxy = stacked @ sorted_proxy.T  # [counts, N]
  of_gold = stacked @ sorted_gold.T
  return {
    'n': np.array(counts),
    'kl': np.array([divergence.best_of_n_kl(count) for count in counts]),
    'proxy': of_proxy.mean(axis=1),
    'gold': of_gold.mean(axis=1),
    'proxy_of_prompts': of_proxy,
    'gold_of_prompts': of_gold,
  }


def tilt(proxy: np.ndarray, gold: np.ndarray, sharpness: Sequence[float]) -> dict[str, np.ndarray]:
  """Estimates the reference tilted by the proxy, π ∝ π_ref exp(r / β), from M samples.

  It is the optimum of the reward minus β times the KL. With M samples
  it cannot reach a KL near log M; points beyond half of that are too
  low.

  Args:
    proxy: [N, M] float, r.
    gold: [N, M] float.
    sharpness: the 1/β.

  Returns:
    sharpness, kl, proxy, gold: [len(sharpness)] float64, means over the
      prompts.
  """
  rows = []
  for value in sharpness:
    # self-normalised weights of samples of the reference
    log_weights = special.log_softmax(value * proxy, axis=1)
    weights = np.exp(log_weights)
    kl = (weights * (log_weights + math.log(proxy.shape[1]))).sum(axis=1)
    rows.append(
      (
        value,
        kl.mean(),
        *((weights * r).sum(axis=1).mean() for r in (proxy, gold)),
      )
    )
  names = ('sharpness', 'kl', 'proxy', 'gold')
  return dict(zip(names, np.array(rows).T, strict=True))


def tilted_reward(
  reference_logprobs: np.ndarray,
  rewards: np.ndarray,
  coefficient: float,
) -> tuple[np.ndarray, float]:
  """Computes the optimum where all responses are known: log π* and β log Z.

  Args:
    reference_logprobs: [S] float, log π_ref of all S responses.
    rewards: [S] float.
    coefficient: β.

  Returns:
    ([S] float64, log π*; the optimal reward minus β KL). A policy is
    below this optimum by β KL(π ‖ π*) (Ziegler et al. 2019; Korbak et
    al. 2022, arXiv:2205.11275).
  """
  # log π* = log π_ref + r / β − log Z
  logits = (
    np.asarray(reference_logprobs, np.float64) + np.asarray(rewards, np.float64) / coefficient
  )
  total = float(special.logsumexp(logits))
  return logits - total, coefficient * total


def fit_form(kl: np.ndarray, gold: np.ndarray, form: str) -> dict[str, Any]:
  """Fits a form of Gao et al. by least squares; it is linear in α and β.

  Args:
    kl: [P] float, nats; for RL, points with √KL below ½ are left out.
    gold: [P] float, above the gold reward of the reference.
    form: one of FORMS.

  Returns:
    alpha, beta, r_squared, points; and where the fitted gold is
    largest, peak_kl and peak_gold, NaN where the fit does not turn. All
    NaN where there are fewer than three points.
  """
  d = np.sqrt(np.maximum(np.asarray(kl, np.float64), 0.0))
  used = d > (_SMALLEST if form == 'rl' else 0.0)
  d, values = d[used], np.asarray(gold, np.float64)[used]
  if len(d) < 3:
    names = ('alpha', 'beta', 'r_squared', 'peak_kl', 'peak_gold')
    return {'points': len(d), **dict.fromkeys(names, math.nan)}
  # R = α d − β bend
  bend = d * np.log(d) if form == 'rl' else d * d
  terms = np.stack([d, -bend], axis=1)
  (alpha, beta), *_ = np.linalg.lstsq(terms, values, rcond=None)
  residual = values - terms @ [alpha, beta]
  spread = np.sum((values - values.mean()) ** 2)
  peak = _peak(float(alpha), float(beta), form)
  return {
    'points': len(d),
    'alpha': float(alpha),
    'beta': float(beta),
    'r_squared': float(1 - residual @ residual / spread) if spread else math.nan,
    'peak_kl': peak[0],
    'peak_gold': peak[1],
  }


def _peak(alpha: float, beta: float, form: str) -> tuple[float, float]:
  """Returns (KL, gold) at the maximum of a fitted form; NaN without one."""
  if alpha <= 0 or beta <= 0:
    return math.nan, math.nan
  if form == 'rl':
    d = math.exp(min(alpha / beta - 1, 300.0))
    return d * d, beta * d
  # where the derivative α − 2 β d is 0
  d = alpha / (2 * beta)
  return d * d, alpha * d / 2


def reward_at(kl: float, curve_kl: np.ndarray, curve_reward: np.ndarray) -> float:
  """Interpolates a frontier at a KL, in √KL; NaN beyond its end."""
  if kl > curve_kl.max():
    return math.nan
  # rewards are nearly linear in √KL, so that is what is interpolated in
  order = np.argsort(curve_kl)
  return float(
    np.interp(
      math.sqrt(max(kl, 0.0)),
      np.sqrt(curve_kl[order]),
      curve_reward[order],
    )
  )


def _average_ties(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Replaces the values of each run of equal keys by their mean; both are [N, M], keys sorted."""
  averaged = np.array(values, np.float64)
  for row, (own_keys, own) in enumerate(zip(keys, values, strict=True)):
    _, members = np.unique(own_keys, return_inverse=True)
    means = np.bincount(members, weights=own) / np.bincount(members)
    averaged[row] = means[members]
  return averaged


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
  """Computes log C(n, k); only where n ≥ k."""
  # values below k are masked by the caller
  top = np.maximum(n, k)
  return special.gammaln(top + 1) - special.gammaln(k + 1) - special.gammaln(top - k + 1)
