"""Quality of judgements: how well people agree with each other and with known answers.

Everything is computed from orders of responses, one for each judgement and
axis.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import operator
from typing import Any

import numpy as np

from rlhf_jax.collect import person_model
from rlhf_jax.collect.answers import ordered_pairs

_RESAMPLES = 1000  # bootstrap samples of the items, for intervals
_FEWEST = 2  # people who must have ranked an item for measures of agreement to use it


@dataclasses.dataclass(frozen=True)
class Order:
  """One person's order of an item's responses.

  Attributes:
    item: the number of the item; each turn of a conversation is an item of its
      own.
    person: the person's pseudonym.
    ranks: [K], 1 = best, equal ranks = tie.
    shown: [K], the numbers of the responses, in the order on the page.
    lengths: [K], the characters of each response.
    gold: [K], the known ranks; None where they are not known.
    seconds: the time from the delivery of the page to the answer.
    pastes: the number of pastes that the page noticed.
  """

  item: int
  person: str
  ranks: Sequence[int]
  shown: Sequence[int] = ()
  lengths: Sequence[int] = ()
  gold: Sequence[int] | None = None
  seconds: float = 0.0
  pastes: int = 0


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of pairs with its 95% interval; NaN where there are no pairs."""

  value: float
  low: float
  high: float
  pairs: int


@dataclasses.dataclass(frozen=True)
class PersonReport:
  """The measures of one person's judgements; see `measure_people`."""

  person: str
  judgements: int
  consensus: float  # share of pairs that the person orders as the majority of the others do
  gold: float  # share of the pairs of known answers that the person orders alike
  first_shown: float  # share of pairs in which the person prefers the response shown earlier
  longer: float  # share of pairs in which the person prefers the longer response
  seconds: float  # median for an item
  pastes: int
  reliability: float  # β of person_model
  low: float  # lower end of its 95% interval
  high: float  # upper end


@dataclasses.dataclass(frozen=True)
class Report:
  """The measures of all judgements.

  Attributes:
    alpha: Krippendorff's α of the ranks, with the ordinal metric.
    kendall: the mean of Kendall's W over the items, weighted by the number of
      their people.
    agreement: the share of pairs of responses that two people order alike.
    people: the report of each person.
    confidence: item → the mean probability that its pairs are ordered
      correctly.
    disputed: (item, share of pairs that the more reliable people order alike),
      the most disputed item first.
  """

  alpha: float
  kendall: float
  agreement: Share
  people: list[PersonReport]
  confidence: dict[int, float]
  disputed: list[tuple[int, float]]


def measure(orders: Sequence[Order]) -> Report:
  """Measures the agreement, each person and each item.

  Args:
    orders: the orders on one axis from the judgements that stand.

  Returns:
    The report.
  """
  fitted, names = fit_people(orders)
  return Report(
    alpha=krippendorff_alpha(orders),
    kendall=mean_kendall(orders),
    agreement=pairwise_agreement(orders),
    people=measure_people(orders, fitted, names),
    confidence={item: mean_confidence(table) for item, table in fitted.above.items()},
    disputed=find_disputed(orders, fitted, names),
  )


def fit_people(orders: Sequence[Order]) -> tuple[person_model.Fit, list[str]]:
  """Fits the model of people.

  Returns:
    (the fit, the pseudonyms of its people in the order of `fit.reliability`).
  """
  names = sorted({order.person for order in orders})
  numbers = {name: number for number, name in enumerate(names)}
  model_orders = person_model.Orders(
    item=np.array([order.item for order in orders], int),
    person=np.array([numbers[order.person] for order in orders], int),
    ranks=[order.ranks for order in orders],
  )
  return person_model.fit(model_orders, len(names)), names


def mean_confidence(above: np.ndarray) -> float:
  """Returns the mean over the pairs of the probability of the likelier order.

  Args:
    above: [K, K] float, the probability that response i is better than j.
  """
  count = len(above)
  upper = above[np.triu_indices(count, 1)]
  return float(np.maximum(upper, 1 - upper).mean())


def krippendorff_alpha(orders: Sequence[Order]) -> float:
  """Computes Krippendorff's α of the ranks with the ordinal metric; a unit is a response.

  Krippendorff 2011, 'Computing Krippendorff's alpha-reliability', as the
  library `krippendorff` computes it. NaN where no two people ranked the same
  item, or where all ranks are equal.
  """
  import krippendorff  # from the extra `collect`, which not every user of this module installs

  people = sorted({order.person for order in orders})
  units: dict[tuple[int, int], int] = {}
  for order in orders:
    for response in range(len(order.ranks)):
      units.setdefault((order.item, response), len(units))
  table = np.full((len(people), len(units)), np.nan)
  for order in orders:
    row = people.index(order.person)
    for response, rank in enumerate(order.ranks):
      table[row, units[order.item, response]] = rank
  paired = (~np.isnan(table)).sum(0) >= _FEWEST
  values = table[:, paired]
  if not paired.any() or len(np.unique(values[~np.isnan(values)])) < 2:
    return math.nan
  return float(krippendorff.alpha(values, level_of_measurement='ordinal'))


def kendall_w(rankings: Sequence[Sequence[int]]) -> float:
  """Computes Kendall's W of m rankings of n responses, corrected for ties.

  W = 12 S / (m² (n³ − n) − m Σ_j T_j), with S the squared deviations of the
  rank sums and T_j = Σ (t³ − t) over the ties of ranking j (Kendall & Gibbons
  1990, ch. 6).

  Args:
    rankings: [m, n] ranks, equal ranks = tie.

  Returns:
    W, 0 to 1; NaN where every ranking ties all responses.

  >>> kendall_w([[1, 2, 3], [1, 2, 3]])
  1.0
  """
  mean_ranks = np.array([_mean_ranks(ranking) for ranking in rankings])  # [m, n]
  raters, count = mean_ranks.shape
  sums = mean_ranks.sum(0)
  squares = float(((sums - sums.mean()) ** 2).sum())
  ties = 0
  for ranking in rankings:
    _, sizes = np.unique(ranking, return_counts=True)
    ties += int((sizes**3 - sizes).sum())
  most = raters**2 * (count**3 - count) - raters * ties
  return 12 * squares / most if most else math.nan


def mean_kendall(orders: Sequence[Order]) -> float:
  """Returns the mean of Kendall's W over items, each weighted by its number of people."""
  total = 0.0
  weight = 0
  for group in _by_item(orders).values():
    if len(group) < _FEWEST:
      continue
    value = kendall_w([order.ranks for order in group])
    if not math.isnan(value):
      total += len(group) * value
      weight += len(group)
  return total / weight if weight else math.nan


def pairwise_agreement(orders: Sequence[Order]) -> Share:
  """Computes the share of pairs of responses that two people order alike.

  A pair that one of the two people ties is left out. The interval comes from a
  bootstrap over items, because the pairs of one item are not independent.
  """
  alike: list[int] = []
  pairs: list[int] = []
  for group in _by_item(orders).values():
    same, both = _count_alike(group)
    if both:
      alike.append(same)
      pairs.append(both)
  if not pairs:
    return Share(math.nan, math.nan, math.nan, 0)
  same_of_item, both_of_item = np.array(alike), np.array(pairs)
  rng = np.random.default_rng(0)
  chosen = rng.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
  shares = same_of_item[chosen].sum(1) / both_of_item[chosen].sum(1)
  low, high = np.quantile(shares, (0.025, 0.975))
  value = same_of_item.sum() / both_of_item.sum()
  return Share(float(value), float(low), float(high), int(both_of_item.sum()))


def labels_for(share: Share, half_width: float, labels: int) -> int:
  """Estimates how many more labels are needed to narrow an interval to ± half_width.

  The width of an interval is taken to fall with the square root of the number
  of labels. The result is 0 where the interval is narrow enough already.

  >>> labels_for(Share(0.7, 0.6, 0.8, 100), 0.05, labels=100)
  300
  """
  now = (share.high - share.low) / 2
  if math.isnan(now) or now <= half_width:
    return 0
  return math.ceil(labels * (now / half_width) ** 2 - labels - 1e-9)


def measure_people(
  orders: Sequence[Order],
  fitted: person_model.Fit,
  names: Sequence[str],
) -> list[PersonReport]:
  """Measures each person's agreement with others, habits and time.

  Args:
    orders: the orders of all people.
    fitted: the fitted model, from `fit_people`.
    names: the pseudonyms in the order of the model's reliabilities, from
      `fit_people`.
  """
  by_item = _by_item(orders)
  own: dict[str, list[Order]] = defaultdict(list)
  for order in orders:
    own[order.person].append(order)
  reports = []
  for number, name in enumerate(names):
    mine = own[name]
    gold = (_agreement(order.ranks, order.gold) for order in mine if order.gold is not None)
    reports.append(
      PersonReport(
        person=name,
        judgements=len(mine),
        consensus=_ratio(_against_others(order, by_item[order.item]) for order in mine),
        gold=_ratio(gold),
        first_shown=_ratio(_habit(order, _places(order)) for order in mine),
        longer=_ratio(_habit(order, [-length for length in order.lengths]) for order in mine),
        seconds=float(np.median([order.seconds for order in mine])),
        pastes=sum(order.pastes for order in mine),
        reliability=float(fitted.reliability[number]),
        low=float(fitted.low[number]),
        high=float(fitted.high[number]),
      )
    )
  return reports


def find_disputed(
  orders: Sequence[Order],
  fitted: person_model.Fit,
  names: Sequence[str],
  count: int = 20,
) -> list[tuple[int, float]]:
  """Finds the items on which the more reliable half of the people disagree.

  Such an item often points to a gap in the guidelines.

  Returns:
    At most `count` pairs (item, share of pairs of responses that two of these
    people order alike), the lowest share first.
  """
  if not len(names):
    return []
  middle = np.median(fitted.reliability)
  reliable = {name for name, value in zip(names, fitted.reliability) if value >= middle}
  disputed = []
  for item, group in _by_item(orders).items():
    same, both = _count_alike([order for order in group if order.person in reliable])
    if both and same < both:
      disputed.append((item, same / both))
  disputed.sort(key=operator.itemgetter(1))  # by the share
  return disputed[:count]


def majority_order(rankings: Sequence[Sequence[int]]) -> tuple[list[int], float]:
  """Combines rankings by Copeland's rule.

  Each pair of responses is decided by the majority of people. A response is
  ranked by the number of pairs that it wins, minus those that it loses.

  Args:
    rankings: [m, K] ranks.

  Returns:
    (K ranks, the mean share of the votes that agree with the order of each
    pair).

  >>> majority_order([[1, 2], [1, 2], [2, 1]])
  ([1, 2], 0.6666666666666666)
  """
  table = np.array(rankings)  # [m, K]
  votes = (table[:, :, None] < table[:, None, :]).sum(0)  # [i, j]: i better than j
  wins = np.sign(votes - votes.T).sum(1)
  levels = sorted(set(wins.tolist()), reverse=True)
  ranks = [levels.index(win) + 1 for win in wins.tolist()]
  shares = []
  for better, worse in ordered_pairs(ranks):
    both = votes[better, worse] + votes[worse, better]
    shares.append(votes[better, worse] / both if both else 0.5)
  return ranks, float(np.mean(shares)) if shares else 1.0


def order_of_means(means: np.ndarray) -> list[int]:
  """Returns ranks 1 … K by posterior means [K], the highest first."""
  ranks = np.empty(len(means), int)
  ranks[np.argsort(-means, kind='stable')] = np.arange(1, len(means) + 1)
  return ranks.tolist()


def _by_item(orders: Iterable[Order]) -> dict[int, list[Order]]:
  """Groups orders by item."""
  groups: dict[int, list[Order]] = defaultdict(list)
  for order in orders:
    groups[order.item].append(order)
  return groups


def _count_alike(group: Sequence[Order]) -> tuple[int, int]:
  """Counts pairs of responses, summed over all pairs of people.

  Returns:
    (number of pairs that both people order alike, number of pairs that neither
    of them ties).
  """
  same = 0
  both = 0
  signs = [_signs(order.ranks) for order in group]
  for number, first in enumerate(signs):
    for second in signs[:number]:
      product = first * second
      same += int((product > 0).sum())
      both += int((product != 0).sum())
  return same, both


def _signs(ranks: Sequence[int]) -> np.ndarray:
  """Returns for each pair i < j: 1 where i is better, −1 where j is, 0 for a tie."""
  array = np.asarray(ranks)
  rows, columns = np.triu_indices(len(array), 1)
  return np.sign(array[columns] - array[rows])


def _against_others(order: Order, group: Sequence[Order]) -> tuple[float, int]:
  """Compares a person's order with the majority of the other people.

  Returns:
    (number of pairs that the person orders as the majority does, number of
    pairs that both the person and the majority order).
  """
  others = [_signs(other.ranks) for other in group if other.person != order.person]
  if not others:
    return 0.0, 0
  consensus = np.sign(np.sum(others, axis=0))
  product = consensus * _signs(order.ranks)
  return float((product > 0).sum()), int((product != 0).sum())


def _agreement(ranks: Sequence[int], gold: Sequence[int]) -> tuple[float, int]:
  """Compares ranks with known ranks.

  Returns:
    (number of pairs that are ordered as in the known ranks, where a tie counts
    one half; number of pairs that the known ranks order).
  """
  expected = _signs(gold)
  product = expected * _signs(ranks)
  right = float((product > 0).sum()) + 0.5 * float(((product == 0) & (expected != 0)).sum())
  return right, int((expected != 0).sum())


def _habit(order: Order, values: Sequence[int]) -> tuple[float, int]:
  """Counts how often a person prefers the response with the smaller value.

  Returns:
    (number of pairs in which the better response has the smaller value, number
    of pairs that differ in both rank and value).
  """
  if len(values) != len(order.ranks):
    return 0.0, 0
  product = _signs(values) * _signs(order.ranks)
  return float((product > 0).sum()), int((product != 0).sum())


def _places(order: Order) -> list[int]:
  """Returns the place of each response on the page, 0 for the first."""
  places = [0] * len(order.shown)
  for place, number in enumerate(order.shown):
    places[number] = place
  return places


def _ratio(counts: Iterable[tuple[float, int]]) -> float:
  """Returns Σ right / Σ pairs over counts (right, pairs); NaN where there are no pairs."""
  right = 0.0
  pairs = 0
  for part, number in counts:
    right += part
    pairs += number
  return right / pairs if pairs else math.nan


def _mean_ranks(ranks: Sequence[int]) -> np.ndarray:
  """Returns ranks in which tied responses have the mean of the ranks that they share."""
  array = np.asarray(ranks, float)
  better = (array[None, :] < array[:, None]).sum(1)
  equal = (array[None, :] == array[:, None]).sum(1)
  return better + (equal + 1) / 2


def orders_from_rows(
  rows: Iterable[Any], turns: Mapping[tuple[int, int], Any], axis: str
) -> list[Order]:
  """Makes the orders on one axis from rows of judgements; rows without such an order are left out.

  Args:
    rows: the judgements, from `judgements.list_judgements`.
    turns: the turns of conversations, from `judgements.read_turns`.
    axis: the name of the axis.
  """
  orders = []
  for row in rows:
    ranks = row.answer.get('orders', {}).get(axis)
    if ranks is None:
      continue
    responses = row.responses
    item = row.item_id
    if row.task == 'converse':
      turn = turns[row.lease_id, row.number]
      responses = turn.responses
      item = -turn.id  # below 0, so that no item has the same number
    orders.append(
      Order(
        item=item,
        person=row.pseudonym,
        ranks=ranks,
        shown=row.shown,
        lengths=[len(response['text']) for response in responses],
        gold=(row.gold or {}).get(axis),
        seconds=row.seconds,
        pastes=int(row.pasted.get('pastes', 0)),
      )
    )
  return orders
