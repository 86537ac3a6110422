"""Win rates with length and style controlled: how often a model would win if it wrote as SFT does.

A judge that likes long or polite responses lets a model win by its
manner alone. A logistic regression over all pairs of responses
separates the two:

  P(ours wins) = σ(θ + Σ_f φ_f tanh(Δ_f / std(Δ_f)) + ψ o)

Δ_f is the difference of a feature, such as the length, between our
response and theirs; o is 1 where ours was shown first, −1 where theirs
was, and 0 to a judge who knows no order. The controlled win rate is
σ(θ): what is left where no feature differs and no place is better. This
is the smallest form of Dubois et al. 2024 (arXiv:2404.04475, section 3)
with features of style beside the length (style.py); its terms for the
difficulty of each prompt are left out.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_jax.evaluation import logistic

_PRIOR_PRECISION = 1.0  # of each φ, so that features which decide every pair stay finite
_INTERCEPT_PRECISION = 1e-3  # of θ, for models that win every pair
_ORDER_PRECISION = 1e-2  # of ψ: weak, so that a judge who sees places only decides nothing
_DECIMALS = 6  # utilities are compared to this precision, as in winrate.py

Interval = tuple[float, float]


def controlled_win_rate(
  ours: np.ndarray,
  theirs: np.ndarray,
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
  clusters: Sequence[str] | None = None,
  seed: int = 0,
) -> tuple[float, Interval]:
  """Computes σ(θ) and its 95% bootstrap interval from a judge's utilities.

  Args:
    ours: [N, S] float, the judge's utility of S responses to each of N
      prompts.
    theirs: [N, R] float, of the other model; each of ours is compared
      with each of theirs.
    features: name → (of ours [N, S], of theirs [N, R]), what is
      controlled.
    clusters: the cluster of each prompt; whole clusters are resampled.
      None = each prompt is one.
    seed: the seed of the draws.

  Returns:
    (the rate in 0..1, (the 2.5% and the 97.5% quantile over the
    bootstrap samples)).
  """
  wins = 0.5 + 0.5 * np.sign(np.round(_differences(ours, theirs), _DECIMALS))  # 1, 0.5 or 0
  num_prompts, num_pairs = wins.shape
  names = np.arange(num_prompts) if clusters is None else np.asarray(clusters)
  differences = {name: _differences(*values).ravel() for name, values in features.items()}
  return control_verdicts(
    wins.ravel(),
    differences,
    np.repeat(names, num_pairs),
    weights=np.full(wins.size, 1 / num_pairs),  # every prompt has the weight 1
    seed=seed,
  )


def control_verdicts(
  wins: np.ndarray,
  differences: Mapping[str, np.ndarray],
  clusters: np.ndarray,
  order: np.ndarray | None = None,
  weights: np.ndarray | None = None,
  seed: int = 0,
) -> tuple[float, Interval]:
  """Computes σ(θ) and its 95% bootstrap interval from single verdicts.

  Args:
    wins: [V] float in 0..1: 1 where our response won, 0.5 for a tie.
    differences: name → [V] float, the feature of ours minus that of
      theirs.
    clusters: [V], the cluster of each verdict, such as its prompt.
    order: [V] float, 1 = ours was shown first, −1 = theirs; None =
      there is no order.
    weights: [V] float, how much each verdict counts; None = 1 each.
    seed: the seed of the draws.

  Returns:
    (the rate in 0..1, (the 2.5% and the 97.5% quantile over the
    bootstrap samples)).
  """
  wins = np.asarray(wins, np.float64)
  # θ first: the rest of the code takes coefficient 0
  manner = standardise(differences)
  terms = [np.ones_like(wins), *manner]
  if order is not None and np.any(order):
    terms.append(np.asarray(order, np.float64))
  columns = np.stack(terms, axis=-1)
  # in units of verdicts of weight 1
  precision = np.full(columns.shape[1], _PRIOR_PRECISION)
  precision[0] = _INTERCEPT_PRECISION
  if len(terms) > 1 + len(manner):
    precision[-1] = _ORDER_PRECISION
  fitted = logistic.fit(
    columns, wins, np.ones_like(wins) if weights is None else weights, precision
  )
  draws = logistic.resample(fitted, precision, clusters, seed)
  low, high = np.quantile(logistic.sigmoid(draws[:, 0]), [0.025, 0.975])
  return float(logistic.sigmoid(fitted.coefficients[0])), (float(low), float(high))


def standardise(differences: Mapping[str, np.ndarray]) -> list[np.ndarray]:
  """Returns tanh(Δ / std(Δ)) of each feature; one in which nothing differs is left out."""
  terms = []
  for difference in differences.values():
    scale = np.std(difference)
    if scale > 0:
      terms.append(np.tanh(difference / scale))
  return terms


def _differences(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
  """Subtracts each of theirs from each of ours: [N, S], [N, R] → [N, S * R] float64."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  return (ours[:, :, None] - theirs[:, None, :]).reshape(len(ours), -1)
