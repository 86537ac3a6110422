"""Measures how good a judge's labels are, before they are used.

Two questions are asked: do its verdicts stay the same when the responses are
shown in the other order, and do they agree with people's? All intervals are 95%
intervals: Wilson's for a share, a bootstrap over comparisons for kappa.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.records import Ranking
from rlhf_jax.errors import UserError
from rlhf_jax.options import Natural, Share
from rlhf_jax.text_table import format_rows


@dataclasses.dataclass(frozen=True)
class GateOptions:
  """The test that a judge must pass before it may label anything."""

  # Comparisons labelled by people, which the judge is asked first; 0 = no test.
  records: Natural = 200
  consistency: Share = 0.7  # minimum share of verdicts that stay when the order changes
  agreement: Share = 0.55  # minimum share of verdicts that agree with people
  override: bool = False  # continue with a judge that fails the test

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if self.records:
      return {}
    return dict.fromkeys(('consistency', 'agreement', 'override', 'data'), 'records is 0')


_NORMAL_QUANTILE = 1.959964  # of 97.5%: a two-sided 95% interval
_RESAMPLES = 1000  # bootstrap samples
_BINS = 10  # of the calibration error: equal parts of the confidences from 0.5 to 1


def wilson_interval(wins: float, count: int) -> tuple[float, float]:
  """Computes the 95% confidence interval of the share p = wins / count (Wilson 1927).

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

  Args:
    wins: how often the event happened; a tie may count as half.
    count: n, the number of trials.

  Returns:
    (lower bound, upper bound); (0, 1) where count is 0.
  """
  if not count:
    return 0.0, 1.0
  z = _NORMAL_QUANTILE
  share = wins / count
  middle = share + z * z / (2 * count)
  half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  scale = 1 + z * z / count
  low = float(max(0.0, (middle - half) / scale))
  high = float(min(1.0, (middle + half) / scale))
  return low, high


def cohens_kappa(
  verdicts: Sequence[bool] | np.ndarray,
  people: Sequence[bool] | np.ndarray,
) -> float:
  """Computes Cohen's kappa (1960), the agreement beyond chance.

    κ = (p_o − p_e) / (1 − p_e)

  where p_o is the share of equal verdicts, and p_e the share that independent
  verdicts with the same frequencies of True would have.

  Args:
    verdicts: [N] bool, the judge's.
    people: [N] bool, people's.

  Returns:
    κ; 0 where p_e is 1.
  """
  verdicts = np.asarray(verdicts, bool)
  people = np.asarray(people, bool)
  both_true = verdicts.mean() * people.mean()
  both_false = (1 - verdicts.mean()) * (1 - people.mean())
  chance = both_true + both_false
  if chance >= 1:
    return 0.0
  return float(((verdicts == people).mean() - chance) / (1 - chance))


def measure_position_bias(as_shown: np.ndarray) -> dict[str, Any]:
  """Measures how verdicts change when the responses are shown in the other order.

  Args:
    as_shown: [N, 2] float64, from judging.ask_both_orders.

  Returns:
    A dict with
      verdicts: the number of comparisons with a verdict in both orders;
      without: the number of the others;
      consistency: the share of comparisons in which the same response wins in both
        orders, and consistency_ci95, its interval;
      first: the share of verdicts for the response shown first (0.5 = no bias).
  """
  has_verdicts = ~np.isnan(as_shown).any(axis=1)
  shown = as_shown[has_verdicts]
  # The same response won in both orders where one column is above 0.5 and the other below.
  stays = (shown[:, 0] - 0.5) * (0.5 - shown[:, 1]) > 0
  consistency = 0.0
  first = 0.5
  if len(shown):
    consistency = float(stays.mean())
    first = float((shown > 0.5).mean())
  return {
    'verdicts': int(has_verdicts.sum()),
    'without': int((~has_verdicts).sum()),
    'consistency': consistency,
    'consistency_ci95': wilson_interval(stays.sum(), len(shown)),
    'first': first,
  }


def compare_with_people(
  probabilities: np.ndarray,
  people: Sequence[bool] | np.ndarray,
  lengths: Sequence[Sequence[int]] | np.ndarray,
) -> dict[str, Any]:
  """Compares a judge with people, over the comparisons on which it gave a verdict.

  Args:
    probabilities: [N] float64, of the first response being better; NaN = no
      verdict.
    people: [N] bool, whether people preferred the first response.
    lengths: [N, 2] int, the lengths of the two responses in characters.

  Returns:
    A dict with
      pairs: the number of comparisons with a verdict. Where it is 0, only
        `agreement` (0) and its interval (0, 1) are returned beside it;
      agreement, kappa: with people, and their intervals agreement_ci95, kappa_ci95;
      log_loss: of people's choices, in nats (always answering 0.5 gives ln 2 = 0.693);
      calibration_error: the expected calibration error over 10 bins;
      longer, people_longer: the shares of comparisons in which the judge, and people,
        prefer the longer response.
  """
  has_verdict = ~np.isnan(probabilities)
  p = np.asarray(probabilities)[has_verdict]
  people_first = np.asarray(people, bool)[has_verdict]
  pair_lengths = np.asarray(lengths)[has_verdict]
  if not len(p):
    return {'pairs': 0, 'agreement': 0.0, 'agreement_ci95': (0.0, 1.0)}
  prefers_first = p > 0.5
  agrees = np.where(p == 0.5, 0.5, prefers_first == people_first)  # a tie counts as half
  clipped = np.clip(p, 1e-6, 1 - 1e-6)  # keeps the loss finite where p is 0 or 1
  log_likelihood = np.where(people_first, np.log(clipped), np.log(1 - clipped))
  return {
    'pairs': len(p),
    'agreement': float(agrees.mean()),
    'agreement_ci95': wilson_interval(agrees.sum(), len(p)),
    'kappa': cohens_kappa(prefers_first, people_first),
    'kappa_ci95': _bootstrap_kappa(prefers_first, people_first),
    'log_loss': float(-np.mean(log_likelihood)),
    'calibration_error': _calibration_error(p, agrees),
    'longer': _share_longer(prefers_first, pair_lengths),
    'people_longer': _share_longer(people_first, pair_lengths),
  }


def _bootstrap_kappa(verdicts: np.ndarray, people: np.ndarray) -> tuple[float, ...]:
  """Returns the 95% bootstrap interval of kappa, over comparisons."""
  rng = np.random.default_rng(0)
  count = len(verdicts)
  kappas = []
  for _ in range(_RESAMPLES):
    drawn = rng.integers(0, count, count)
    kappas.append(cohens_kappa(verdicts[drawn], people[drawn]))
  return tuple(np.quantile(kappas, (0.025, 0.975)).tolist())


def _calibration_error(p: np.ndarray, agrees: np.ndarray) -> float:
  """Computes the expected calibration error (Guo et al. 2017, arXiv:1706.04599).

    Σ_bins  share of the bin · |mean confidence − mean agreement|

  Args:
    p: [N] float64, the probabilities that the first response is better.
    agrees: [N] float64, 1 where the verdict agrees with people, 0.5 for a tie.
  """
  confidence = np.maximum(p, 1 - p)
  places = ((confidence - 0.5) * 2 * _BINS).astype(int)
  bins = np.minimum(places, _BINS - 1)
  error = 0.0
  for number in set(bins):
    inside = bins == number
    gap = abs(confidence[inside].mean() - agrees[inside].mean())
    error += gap * inside.mean()
  return float(error)


def _share_longer(prefers_first: np.ndarray, lengths: np.ndarray) -> float:
  """Returns how often the longer response is preferred; 0.5 where all pairs are of equal length."""
  differ = lengths[:, 0] != lengths[:, 1]
  if not differ.any():
    return 0.5
  first_is_longer = (lengths[:, 0] > lengths[:, 1])[differ]
  return float((prefers_first[differ] == first_is_longer).mean())


def compare_judges(each: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Measures how often any two judges of a panel agree.

  Args:
    each: name → probabilities [N] float64, as in judging.Judgements.

  Returns:
    'a, b' → the share of equal verdicts, among the comparisons on which both
    judges gave one.
  """
  names = list(each)
  shares = {}
  for number, first in enumerate(names):
    for second in names[number + 1 :]:
      both = ~np.isnan(each[first] + each[second])
      same = (each[first] > 0.5) == (each[second] > 0.5)
      shares[f'{first}, {second}'] = float(same[both].mean())
  return shares


def explain_unfit(report: Mapping[str, Any], limits: GateOptions) -> str:
  """Returns the reasons why a judge fails the test, as text; '' where it passes.

  Args:
    report: 'position' → the result of measure_position_bias; 'people' → that of
      compare_with_people, or None.
    limits: the test.
  """
  reasons = []
  consistency = report['position']['consistency']
  if consistency < limits.consistency:
    reasons.append(
      f'only {consistency:.0%} of its verdicts stay when the responses change places'
      f' (expected at least {limits.consistency:.0%})'
    )
  people = report.get('people')
  if people and people['agreement'] < limits.agreement:
    reasons.append(
      f'it agrees with people on {people["agreement"]:.0%} of {people["pairs"]} pairs'
      f' (expected at least {limits.agreement:.0%})'
    )
  return '; '.join(reasons)


def format_agreement(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats a judge's agreement with people as an aligned table.

  Args:
    rows: name of the data → the result of compare_with_people.
  """
  headings = (
    'source',
    'pairs',
    'agreement',
    '95% interval',
    'kappa',
    'log-loss',
    'longer',
    'people longer',
  )
  table: list[tuple[str, ...]] = [headings]
  for name, row in rows.items():
    table.append((name, str(row['pairs']), *_agreement_cells(row)))
  return format_rows(table)


def _agreement_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns the cells of a row that follow the number of pairs."""
  if not row['pairs']:
    return ('–',) * 6
  low, high = row['agreement_ci95']
  return (
    f'{row["agreement"]:.1%}',
    f'{low:.1%} – {high:.1%}',
    f'{row["kappa"]:.2f}',
    f'{row["log_loss"]:.3f}',
    f'{row["longer"]:.0%}',
    f'{row["people_longer"]:.0%}',
  )


def draw_pairs(
  rankings: Sequence[Ranking], count: int, rng: np.random.Generator
) -> list[tuple[Ranking, int, int]]:
  """Draws pairs of responses to which people gave different ranks.

  Args:
    rankings: what people ranked.
    count: the maximum number of pairs; each is drawn from a different ranking.
    rng: chooses the rankings, a pair of each, and the order in the pair.

  Returns:
    (ranking, index of the first response, index of the second response).

  Raises:
    UserError: no ranking has two responses of different ranks.
  """
  chosen: list[tuple[Ranking, int, int]] = []
  for index in rng.permutation(len(rankings)):
    ranking = rankings[index]
    pairs = []
    for i, first_rank in enumerate(ranking.ranks):
      for j, second_rank in enumerate(ranking.ranks):
        if first_rank != second_rank:
          pairs.append((i, j))
    if pairs and len(chosen) < count:
      first, second = pairs[int(rng.integers(len(pairs)))]
      chosen.append((ranking, first, second))
  if not chosen:
    raise UserError('no ranking has two responses of different ranks')
  return chosen
