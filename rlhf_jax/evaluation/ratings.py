"""Ratings of many models from verdicts on pairs (Bradley and Terry 1952), with intervals.

  P(first beats second) = σ(s_first − s_second + Σ_f φ_f tanh(Δ_f /
  std(Δ_f)) + ψ)

s are the ratings in nats; ψ is the worth of being shown first. A rating
on Elo's scale is 400 / ln 10 times as large. Ratings are known up to a
shift, so that of the anchor is 0. A weak prior around equality keeps a
model that wins everything finite; ties count as half a win for each
side.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from rlhf_jax.evaluation import controlled_rate, logistic
from rlhf_jax.evaluation.verdicts import prompt_weights, Verdicts

ELO = 400 / math.log(10)  # points for each nat

_RATING_PRECISION = 0.05  # of the prior, in units of verdicts
_ORDER_PRECISION = 0.01  # of ψ
_STYLE_PRECISION = 1.0  # of each φ


def rate_models(
  verdicts: Verdicts,
  names: Sequence[str],
  clusters: np.ndarray,
  anchor: int = 0,
  controlled: bool = False,
  seed: int = 0,
) -> list[dict[str, Any]]:
  """Rates models by all their verdicts together.

  Args:
    verdicts: V of them; those without an outcome are left out.
    names: of the M models.
    clusters: [N], the cluster of each prompt; intervals resample whole
      clusters.
    anchor: the number of the model whose rating is 0.
    controlled: whether the features of `verdicts.differences` are
      controlled.
    seed: the seed of the draws.

  Returns:
    For each model, from the best to the worst: name; rating and
    rating_ci95, in nats above the anchor; elo and elo_ci95, the same in
    Elo's points; rank_ci95, [best, worst] rank in 95% of the bootstrap
    samples.
  """
  known = verdicts.known()
  count = len(names)
  # all M ratings are free; the prior fixes their shift
  terms = [_sides(known, count)]
  if known.ordered:
    terms.append(np.ones((len(known.wins), 1)))  # the worth of being first
  if controlled:
    terms += [column[:, None] for column in controlled_rate.standardise(known.differences)]
  columns = np.concatenate(terms, axis=1)
  precision = np.full(columns.shape[1], _STYLE_PRECISION)
  precision[:count] = _RATING_PRECISION
  if known.ordered:
    precision[count] = _ORDER_PRECISION
  weights = prompt_weights(known)
  weights *= len(weights) / weights.sum()  # in the mean a verdict has the weight 1
  fitted = logistic.fit(columns, known.wins, weights, precision)
  draws = logistic.resample(fitted, precision, clusters[known.prompts], seed)[:, :count]
  # the shift cancels in differences to the anchor
  ratings = fitted.coefficients[:count]
  ranks = np.argsort(np.argsort(-draws, axis=1), axis=1) + 1  # [B, M]
  above = draws - draws[:, anchor : anchor + 1]
  rows = []
  # from the best to the worst
  for number in np.argsort(-ratings, kind='stable'):
    interval = np.quantile(above[:, number], [0.025, 0.975])
    rating = float(ratings[number] - ratings[anchor])
    rows.append(
      {
        'name': names[number],
        'rating': rating,
        'rating_ci95': interval.tolist(),
        'elo': ELO * rating,
        'elo_ci95': (ELO * interval).tolist(),
        'rank_ci95': np.quantile(ranks[:, number], [0.025, 0.975]).round().astype(int).tolist(),
      }
    )
  return rows


def _sides(verdicts: Verdicts, count: int) -> np.ndarray:
  """Returns [V, M] float64: 1 at the first model of each verdict, −1 at the second."""
  sides = np.zeros((len(verdicts.wins), count))
  rows = np.arange(len(sides))
  sides[rows, verdicts.first] = 1.0
  sides[rows, verdicts.second] = -1.0
  return sides
