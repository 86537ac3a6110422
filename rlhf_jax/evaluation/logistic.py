"""Logistic regression of verdicts, with bootstrap samples over clusters of prompts.

Controlled win rates (controlled_rate.py) and ratings of many models
(ratings.py) are both this regression; they differ in their terms. A row
is one verdict:

  P(the first response wins) = σ(Σ_f β_f x_f)

Letters: V verdicts, F terms, C clusters, B bootstrap samples.
"""

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # bootstrap samples

_MAX_NEWTON_STEPS = 30
_LONGEST_STEP = 1.0  # of a coefficient, so that no step jumps over the optimum
_TOLERANCE = 1e-8  # of the last step of the fit


class Fit(NamedTuple):
  """A fitted regression; `resample` needs the last two."""

  coefficients: np.ndarray  # [F] float64, β
  scores: np.ndarray  # [V, F] float64, the gradient of each row's log-likelihood
  information: np.ndarray  # [V, F, F] float64, minus the Hessian of each row


def fit(
  terms: np.ndarray,
  wins: np.ndarray,
  weights: np.ndarray,
  precision: np.ndarray,
) -> Fit:
  """Fits the regression by Newton's method.

  Args:
    terms: [V, F] float64, x.
    wins: [V] float64 in 0..1: 1 where the first response won, 0.5 for a
      tie.
    weights: [V] float64, how much each verdict counts.
    precision: [F] float64, of the Gaussian prior of each coefficient
      around 0; it keeps a model that wins everything finite.
  """
  # a Gaussian prior adds its precision to the Hessian
  prior = np.diag(np.asarray(precision, np.float64))
  coefficients = np.zeros(terms.shape[1])
  outer = terms[:, :, None] * terms[:, None, :]  # [V, F, F]
  for _ in range(_MAX_NEWTON_STEPS):
    # the gradient is Σ w (y − p) x, minus the Hessian Σ w p (1 − p) x xᵀ
    chances = sigmoid(terms @ coefficients)
    scores = (weights * (wins - chances))[:, None] * terms
    information = (weights * chances * (1 - chances))[:, None, None] * outer
    gradient = scores.sum(axis=0) - prior @ coefficients
    step = np.linalg.solve(information.sum(axis=0) + prior, gradient)
    coefficients = coefficients + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
    if np.abs(step).max() < _TOLERANCE:
      break
  return Fit(coefficients, scores, information)


def resample(
  fitted: Fit,
  precision: np.ndarray,
  clusters: np.ndarray,
  seed: int = 0,
  resamples: int = RESAMPLES,
) -> np.ndarray:
  """Draws the coefficients of bootstrap samples, of which each holds whole clusters.

  Each sample takes one Newton step from the fit of all rows, in place
  of a fit of its own (Davidson and MacKinnon 1999, "Bootstrap testing
  in nonlinear models").

  Args:
    fitted: the fit of all rows.
    precision: [F] float64, as in `fit`.
    clusters: [V], the cluster of each row, such as its prompt.
    seed: the seed of the draws.
    resamples: B.

  Returns:
    [B, F] float64.
  """
  _, members = np.unique(clusters, return_inverse=True)
  # C clusters; a sample draws C of them with replacement
  count = int(members.max()) + 1
  scores = np.zeros((count, *fitted.scores.shape[1:]))
  information = np.zeros((count, *fitted.information.shape[1:]))
  np.add.at(scores, members, fitted.scores)
  np.add.at(information, members, fitted.information)
  # how often each sample has each cluster
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(count, np.full(count, 1 / count), resamples)  # [B, C]
  prior = np.diag(np.asarray(precision, np.float64))
  gradients = draws @ scores - prior @ fitted.coefficients  # [B, F]
  # As a product of matrices, which is faster than a sum over three letters.
  flat = draws @ information.reshape(count, -1)  # [B, F · F]
  curvatures = flat.reshape(resamples, *prior.shape) + prior
  steps = np.linalg.solve(curvatures, gradients[..., None])[..., 0]
  return fitted.coefficients + steps


def sigmoid(x: np.ndarray | float) -> np.ndarray:
  """Computes 1 / (1 + exp(−x)) without overflow."""
  return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))
