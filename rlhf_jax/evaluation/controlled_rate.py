"""Win rates with length and style controlled: how often a model would win if it wrote as SFT does.

A judge that likes long or polite responses lets a model win by its manner alone. A logistic
regression over all pairs of responses separates the two:

  P(ours wins) = σ(θ + Σ_f φ_f tanh(Δ_f / std(Δ_f)))

Δ_f is the difference of a feature, such as the length, between our response and
theirs. The controlled win rate is σ(θ): what is left where no feature differs.
This is the smallest form of Dubois et al. 2024 (arXiv:2404.04475, section 3) with
features of style beside the length; its terms for the difficulty of each prompt
are left out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_PRIOR_PRECISION = 1.0  # of each φ, so that features which decide every pair stay finite
_INTERCEPT_PRECISION = 1e-3  # of θ, for models that win every pair
_MAX_NEWTON_STEPS = 30
_TOLERANCE = 1e-8  # of the last step of the fit
_RESAMPLES = 2000
_DECIMALS = 6  # utilities are compared to this precision, as in winrate.py


class Fit(NamedTuple):
  """A logistic regression over pairs of responses."""

  coefficients: np.ndarray  # [1 + F] float64: θ and φ
  scores: np.ndarray  # [N, 1 + F] float64, of each prompt: the gradient of its log-likelihood
  information: np.ndarray  # [N, 1 + F, 1 + F] float64, of each prompt: minus the Hessian


def controlled_win_rate(
  ours: np.ndarray,
  theirs: np.ndarray,
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
  clusters: Sequence[str] | None = None,
  seed: int = 0,
) -> tuple[float, tuple[float, float]]:
  """Computes σ(θ) and its 95% bootstrap interval.

  Args:
    ours: [N, S] float, the judge's utility of S responses to each of N prompts.
    theirs: [N, R] float, of the other model; each of ours is compared with each of theirs.
    features: name → (of ours [N, S], of theirs [N, R]), what is controlled.
    clusters: the cluster of each prompt; whole clusters are resampled. None = each prompt is one.
    seed: the seed of the draws.

  Returns:
    (the rate in 0..1, (the 2.5% and the 97.5% quantile over the bootstrap samples)).
  """
  wins = 0.5 + 0.5 * np.sign(np.round(_differences(ours, theirs), _DECIMALS))  # 1, 0.5 or 0
  terms = [np.ones_like(wins)]
  for own, other in features.values():
    difference = _differences(own, other)
    scale = difference.std()
    if scale > 0:  # a feature in which nothing differs explains nothing
      terms.append(np.tanh(difference / scale))
  fit = fit_pairs(np.stack(terms, axis=-1), wins)
  resampled = _resample_intercept(fit, clusters, seed)
  low, high = np.quantile(_sigmoid(resampled), [0.025, 0.975])
  return float(_sigmoid(fit.coefficients[0])), (float(low), float(high))


def fit_pairs(terms: np.ndarray, wins: np.ndarray) -> Fit:
  """Fits the logistic regression by Newton's method; every prompt has the weight 1.

  Args:
    terms: [N, P, 1 + F] float64 of P pairs for each prompt; the first term is 1.
    wins: [N, P] float64 in 0..1.
  """
  _, num_pairs, num_terms = terms.shape
  prior = _prior(num_terms)
  coefficients = np.zeros(num_terms)
  for _ in range(_MAX_NEWTON_STEPS):
    chances = _sigmoid(terms @ coefficients)  # [N, P]
    scores = np.einsum('np,npf->nf', wins - chances, terms) / num_pairs
    weights = chances * (1 - chances) / num_pairs
    information = np.einsum('np,npf,npg->nfg', weights, terms, terms, optimize=True)
    gradient = scores.sum(axis=0) - prior @ coefficients
    curvature = information.sum(axis=0) + prior
    step = np.linalg.solve(curvature, gradient)
    coefficients = coefficients + np.clip(step, -1.0, 1.0)
    if np.abs(step).max() < _TOLERANCE:
      break
  return Fit(coefficients, scores, information)


def _resample_intercept(fit: Fit, clusters: Sequence[str] | None, seed: int) -> np.ndarray:
  """Draws θ of bootstrap samples, [B] float64.

  Each sample takes one Newton step from the fit of all prompts, in place of a fit of its own
  (Davidson and MacKinnon 1999, "Bootstrap testing in nonlinear models").
  """
  names = np.arange(len(fit.scores)) if clusters is None else np.asarray(clusters)
  _, members = np.unique(names, return_inverse=True)
  count = int(members.max()) + 1
  scores = np.zeros((count, *fit.scores.shape[1:]))
  information = np.zeros((count, *fit.information.shape[1:]))
  np.add.at(scores, members, fit.scores)
  np.add.at(information, members, fit.information)
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES)  # [B, C]
  prior = _prior(len(fit.coefficients))
  gradients = draws @ scores - prior @ fit.coefficients  # [B, 1 + F]
  curvatures = np.einsum('bc,cfg->bfg', draws, information) + prior
  steps = np.linalg.solve(curvatures, gradients[..., None])[..., 0]
  return fit.coefficients[0] + steps[:, 0]


def _prior(num_terms: int) -> np.ndarray:
  """Returns the precision of the Gaussian prior of θ and φ, a diagonal matrix."""
  return np.diag([_INTERCEPT_PRECISION] + [_PRIOR_PRECISION] * (num_terms - 1))


def _differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Subtracts each of theirs from each of ours: [N, S], [N, R] → [N, S * R] float64."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return (ours[:, :, None] - theirs[:, None, :]).reshape(len(ours), -1)


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
  """Computes 1 / (1 + exp(−x)) without overflow."""
  return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))
