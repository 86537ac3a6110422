"""A Plackett–Luce model of how good each response is and how reliable each person is.

  P(ranking of person p | θ, β) = Π_i exp(β_p θ_i) / Σ_{j = i or ranked below i}
  exp(β_p θ_j)

over the responses i that rank above at least one other response. The priors are
θ_i ~ N(0, 1) for the quality of every response and β_p ~ N(1.5, 1.5²) for the
reliability of every person. With β = 0 a person's orders are random, with β < 0
they are reversed. A tie carries no information, as in the reward model's loss
(objectives/ranking.py; Plackett 1975; Luce 1959). The orders of several people
are combined as in Chen et al. 2013 (crowd Bradley–Terry, for pairs), which this
model extends to rankings of K responses.

θ is integrated out: where few people rank an item, estimating θ together with β
would make everybody seem more reliable than they are. The integral is a mean
over quasi-random draws of θ. β is estimated by the mode of its posterior, and
its interval by the curvature there (Laplace approximation).
"""

from collections.abc import Sequence
import dataclasses

import numpy as np
from scipy import optimize
from scipy.stats import norm, qmc

PRIOR_MEAN = 1.5  # of β
PRIOR_DEVIATION = 1.5
_DRAWS = 1024  # draws of θ; Sobol's sequence is balanced for powers of two
_CHUNK = 4_000_000  # largest number of elements of an array, to bound the memory
_Z = 1.959964  # half-width of a 95% interval in standard deviations


@dataclasses.dataclass(frozen=True)
class Orders:
  """Rankings of items by people.

  Attributes:
    item: [R] int, the item whose responses each ranking orders.
    person: [R] int, the person who gave each ranking.
    ranks: R lists of K ranks, 1 = best, equal ranks = tie; K is the same within
      an item.
  """

  item: np.ndarray
  person: np.ndarray
  ranks: Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Fit:
  """The fitted model: reliabilities of people and posteriors of items.

  Attributes:
    reliability: [P] float64, β of each person.
    low: [P] float64, lower ends of the 95% intervals.
    high: [P] float64, upper ends.
    above: item → [K, K] float64, the probability that response i is better than
      j.
    means: item → [K] float64, posterior means of θ.
  """

  reliability: np.ndarray
  low: np.ndarray
  high: np.ndarray
  above: dict[int, np.ndarray]
  means: dict[int, np.ndarray]


def fit(orders: Orders, people: int) -> Fit:
  """Fits the reliability of every person and the posterior of every item.

  Args:
    orders: the rankings.
    people: P, the number of people; a person without a ranking has the prior.

  Returns:
    The fit.
  """
  groups = _group_by_count(orders)

  def objective(beta: np.ndarray) -> tuple[float, np.ndarray]:
    value, gradient, _ = _posterior(groups, beta)
    return -value, -gradient

  def curvature(beta: np.ndarray) -> np.ndarray:
    return -_posterior(groups, beta)[2]

  start = np.full(people, PRIOR_MEAN)
  found = optimize.minimize(
    objective,
    start,
    jac=True,
    hess=curvature,
    method='trust-exact',
    options={'gtol': 1e-3 * max(1.0, np.sqrt(len(orders.ranks)))},
  )
  covariance = np.linalg.inv(curvature(found.x))
  deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
  above: dict[int, np.ndarray] = {}
  means: dict[int, np.ndarray] = {}
  for group in groups:
    _add_items(group, found.x, above, means)
  return Fit(found.x, found.x - _Z * deviation, found.x + _Z * deviation, above, means)


def draw_ranking(utilities: np.ndarray, reliability: float, rng: np.random.Generator) -> list[int]:
  """Draws a ranking of K responses from the model.

  Args:
    utilities: [K] float, θ of the responses.
    reliability: β of the person.
    rng: source of the noise.

  Returns:
    K ranks, 1 = best.
  """
  # the order of Gumbel-noised scores is a Plackett–Luce draw (Yellott 1977)
  scores = reliability * utilities + rng.gumbel(size=len(utilities))
  ranks = np.empty(len(utilities), int)
  ranks[np.argsort(-scores)] = np.arange(1, len(utilities) + 1)
  return ranks.tolist()


@dataclasses.dataclass(frozen=True)
class _Group:
  """The rankings of all items with K responses: R rankings of N items, with S draws of θ.

  Attributes:
    items: [N] int, the numbers of the items.
    place: [R] int, ascending; the index in `items` of each ranking's item.
    starts: [N] int, the index of the first ranking of each item.
    person: [R] int, the person who gave each ranking.
    contest: [R, K, K] float32. [r, i, j] is 1 where j is i or ranks below i;
      row i is all 0 where no response ranks below i.
    theta: [S, K] float32, draws from the prior.
  """

  items: np.ndarray
  place: np.ndarray
  starts: np.ndarray
  person: np.ndarray
  contest: np.ndarray
  theta: np.ndarray


def _group_by_count(orders: Orders) -> list[_Group]:
  """Groups the rankings by the number of responses."""
  counts = np.array([len(ranks) for ranks in orders.ranks], int)
  groups = []
  for count in np.unique(counts):
    chosen = np.flatnonzero(counts == count)
    chosen = chosen[np.argsort(orders.item[chosen], kind='stable')]
    items, starts, place = np.unique(orders.item[chosen], return_index=True, return_inverse=True)
    ranks = np.array([orders.ranks[row] for row in chosen.tolist()])  # [R, K]
    below = np.less(ranks[:, :, None], ranks[:, None, :])  # [R, i, j]: j stands below i
    contest = below | (np.eye(count, dtype=bool) & below.any(2)[:, :, None])
    groups.append(
      _Group(
        items=items,
        place=place,
        starts=starts,
        person=orders.person[chosen],
        contest=contest.astype(np.float32),
        theta=_draw_theta(int(count)),
      )
    )
  return groups


def _draw_theta(count: int) -> np.ndarray:
  """Draws S quasi-random points of a standard normal distribution: [S, K] float32."""
  uniform = qmc.Sobol(count, scramble=True, rng=np.random.default_rng(0)).random(_DRAWS)
  return norm.ppf(np.clip(uniform, 1e-6, 1 - 1e-6)).astype(np.float32)


def _likelihoods(group: _Group, beta: np.ndarray, rows: slice) -> tuple[np.ndarray, ...]:
  """Computes log P(ranking | θ, β) and its first two derivatives with respect to β.

  Args:
    group: the rankings.
    beta: [P], the reliabilities.
    rows: the slice of the rankings to compute, r of them.

  Returns:
    (value, first, second), each [r, S] float32.
  """
  contest = group.contest[rows]  # [r, K, K]
  own = np.einsum('rii->ri', contest)  # 1 where some response ranks below i
  theta = group.theta[None]  # [1, S, K]
  scores = beta[group.person[rows], None, None].astype(np.float32) * theta  # [r, S, K]
  highest = scores.max(-1, keepdims=True)
  weight = np.exp(scores - highest)
  rivals = contest.transpose(0, 2, 1)  # [r, j, i]
  # sums over the responses that compete with i; the total is 1 where there are none
  total = weight @ rivals + (1 - own[:, None])
  mean = (weight * theta) @ rivals / total
  square = (weight * theta**2) @ rivals / total
  value = ((scores - highest - np.log(total)) * own[:, None]).sum(-1)
  first = ((theta - mean) * own[:, None]).sum(-1)
  second = -((square - mean**2) * own[:, None]).sum(-1)
  return value, first, second


def _posterior(
  groups: Sequence[_Group],
  beta: np.ndarray,
) -> tuple[float, np.ndarray, np.ndarray]:
  """Computes log P(β | rankings) up to a constant, its gradient [P] and Hessian [P, P]."""
  from_prior = (beta - PRIOR_MEAN) / PRIOR_DEVIATION**2
  value = -0.5 * float(np.sum(from_prior * (beta - PRIOR_MEAN)))
  gradient = -from_prior
  hessian = -np.eye(len(beta)) / PRIOR_DEVIATION**2
  for group in groups:
    for rows, weights, logs, first, second in _each_chunk(group, beta):
      value += float(logs.sum())
      person = group.person[rows]
      place = group.place[rows] - group.place[rows.start]
      weight = weights[place]  # [r, S], posterior weights of the draws for each ranking's item
      slopes = (weight * first).sum(1)  # [r], d log P(item) / dβ
      np.add.at(gradient, person, slopes)
      np.add.at(hessian, (person, person), (weight * second).sum(1))
      _add_covariances(hessian, person, place, weight, first, slopes)
  return value, gradient, hessian


def _each_chunk(group: _Group, beta: np.ndarray):
  """Yields the likelihoods of a group in chunks of whole items: r rankings of n items.

  Yields:
    (rows, the slice of the r rankings; [n, S] posterior weights of the draws
    for each item; [n] log P of each item's rankings; first and second
    derivatives as in `_likelihoods`, each [r, S]).
  """
  ends = np.append(group.starts[1:], len(group.place))
  per_ranking = group.theta.size
  limit = max(1, _CHUNK // per_ranking)
  begin = 0
  while begin < len(group.items):
    # as many items as fit into _CHUNK, but at least one
    end = int(np.searchsorted(ends, group.starts[begin] + limit, side='right'))
    end = max(end, begin + 1)
    rows = slice(int(group.starts[begin]), int(ends[end - 1]))
    value, first, second = _likelihoods(group, beta, rows)
    joint = np.add.reduceat(value, group.starts[begin:end] - rows.start, axis=0)  # [n, S]
    highest = joint.max(1, keepdims=True)
    weights = np.exp(joint - highest)
    total = weights.sum(1, keepdims=True)
    logs = (highest + np.log(total / weights.shape[1]))[:, 0]
    yield rows, weights / total, logs.astype(np.float64), first, second
    begin = end


def _add_covariances(
  hessian: np.ndarray,
  person: np.ndarray,
  place: np.ndarray,
  weight: np.ndarray,
  first: np.ndarray,
  slopes: np.ndarray,
) -> None:
  """Adds the covariances of the rankings' slopes to the Hessian.

  For all pairs (r, q) of rankings of the same item it adds Cov(dℓ_r / dβ, dℓ_q
  / dβ) under the posterior of the item's θ.
  """
  begins = np.flatnonzero(np.diff(place, prepend=-1))
  ends = np.append(begins[1:], len(place))
  for begin, end in zip(begins, ends):
    rows = slice(begin, end)
    centred = first[rows] - slopes[rows, None]
    covariance = (weight[rows] * centred) @ centred.T  # all rows have the weights of their item
    np.add.at(hessian, np.ix_(person[rows], person[rows]), covariance)


def _add_items(
  group: _Group,
  beta: np.ndarray,
  above: dict[int, np.ndarray],
  means: dict[int, np.ndarray],
) -> None:
  """Adds the posteriors of a group's items to the dicts `above` and `means`, see `Fit`."""
  count = group.theta.shape[1]
  better = (group.theta[:, :, None] > group.theta[:, None, :]).reshape(_DRAWS, -1)
  better = better.astype(np.float32)
  for rows, weights, *_ in _each_chunk(group, beta):
    first_item = group.place[rows.start]
    tables = (weights @ better).reshape(-1, count, count)
    centres = weights @ group.theta
    for offset in range(len(weights)):
      item = int(group.items[first_item + offset])
      above[item] = tables[offset].astype(np.float64)
      means[item] = centres[offset].astype(np.float64)
