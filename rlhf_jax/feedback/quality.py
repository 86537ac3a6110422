"""How good a judge's labels are, measured before they are used.

A judge is held against the order in which responses are shown, and against people.
Intervals are 95%: Wilson's for a share, the bootstrap over comparisons for kappa.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.records import Ranking
from rlhf_jax.errors import UserError
from rlhf_jax.text_table import format_rows


@dataclasses.dataclass(frozen=True)
class GateOptions:
  """What a judge must show before it may label anything."""

  records: int = 200  # comparisons labelled by people to ask first; 0 = no gate
  consistency: float = 0.7  # least share of verdicts that stay when the order changes
  agreement: float = 0.55  # least share of verdicts that agree with people
  override: bool = False  # go on with a judge that is not fit


_NORMAL_QUANTILE = 1.959964  # of 97.5%: a two-sided 95% interval
_RESAMPLES = 1000  # of the bootstrap
_BINS = 10  # of the calibration error, between 0.5 and 1


def wilson_interval(wins: float, count: int) -> tuple[float, float]:
  """Computes the 95% interval of a share, wins / count (Wilson 1927).

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

  Args:
    wins: may be fractional, as a tie is half a win.
    count: n; with 0 the interval is (0, 1).
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

    κ = (p_o − p_e) / (1 − p_e),   p_o = share of equal verdicts,
                                   p_e = what their shares of True alone would give

  Args:
    verdicts: [N] bool.
    people: [N] bool.

  Returns:
    κ; 0 where chance alone explains everything.
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
  """Measures what showing the responses in the other order does to verdicts.

  Args:
    as_shown: [N, 2] float64, of judging.ask_both_orders.

  Returns:
    verdicts: comparisons with a verdict in both orders; without: the others;
    consistency: the share of verdicts that stay with the response, and
    consistency_ci95, its interval; first: the share of all verdicts for the
    response that was shown first (0.5 = no bias).
  """
  has_verdicts = ~np.isnan(as_shown).any(axis=1)
  shown = as_shown[has_verdicts]
  # Of opposite sign about 0.5: the verdict went to the same response both times.
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
    probabilities: [N] float64, that the first response is better; NaN = no verdict.
    people: [N] bool, whether people preferred the first.
    lengths: [N, 2] int, characters of the two responses.

  Returns:
    pairs: their number; agreement and kappa with intervals; log_loss: nats (a judge
    that knows nothing has ln 2 = 0.693); calibration_error: the expected one, over
    10 bins of the preferred response's probability; longer and people_longer: how
    often the judge and people prefer the longer response.
  """
  has_verdict = ~np.isnan(probabilities)
  p = np.asarray(probabilities)[has_verdict]
  people_first = np.asarray(people, bool)[has_verdict]
  pair_lengths = np.asarray(lengths)[has_verdict]
  if not len(p):
    return {'pairs': 0, 'agreement': 0.0, 'agreement_ci95': (0.0, 1.0)}
  prefers_first = p > 0.5
  agrees = np.where(p == 0.5, 0.5, prefers_first == people_first)  # a tie is half right
  clipped = np.clip(p, 1e-6, 1 - 1e-6)  # a sure judge that errs has a finite loss
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
  """Returns how often the longer response is preferred, 0.5 without different ones."""
  differ = lengths[:, 0] != lengths[:, 1]
  if not differ.any():
    return 0.5
  first_is_longer = (lengths[:, 0] > lengths[:, 1])[differ]
  return float((prefers_first[differ] == first_is_longer).mean())


def compare_judges(each: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Measures how often each two judges of a panel agree.

  Args:
    each: name → [N] float64, of judging.Judgements.

  Returns:
    'a, b' → the share of comparisons on which both gave a verdict and the same one.
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
  """Says why a judge is not fit; '' if it is.

  Args:
    report: {'position': of measure_position_bias, 'people': of compare_with_people,
      or None}.
    limits: what it must show.
  """
  reasons = []
  consistency = report['position']['consistency']
  if consistency < limits.consistency:
    reasons.append(
      f'only {consistency:.0%} of its verdicts stay when the answers change places'
      f' (expected {limits.consistency:.0%})'
    )
  people = report.get('people')
  if people and people['agreement'] < limits.agreement:
    reasons.append(
      f'it agrees with people on {people["agreement"]:.0%} of {people["pairs"]} pairs'
      f' (expected {limits.agreement:.0%})'
    )
  return '; '.join(reasons)


def format_agreement(rows: Mapping[str, Mapping[str, Any]]) -> str:
  """Formats how a judge agrees with people as an aligned table.

  Args:
    rows: source of the comparisons → what compare_with_people returned.
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
  """Returns the cells of a row behind its number of pairs."""
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
  """Draws comparisons that people made: two responses that they did not call equal.

  Args:
    rankings: what people ranked.
    count: how many to draw at most, each of another ranking.
    rng: decides which rankings, which pair of each, and its order.

  Returns:
    (ranking, place of the first response, place of the second).

  Raises:
    UserError: no ranking has two responses of different ranks.
  """
  chosen: list[tuple[Ranking, int, int]] = []
  for place in rng.permutation(len(rankings)):
    ranking = rankings[place]
    pairs = []
    for i, first_rank in enumerate(ranking.ranks):
      for j, second_rank in enumerate(ranking.ranks):
        if first_rank != second_rank:
          pairs.append((i, j))
    if pairs and len(chosen) < count:
      first, second = pairs[int(rng.integers(len(pairs)))]
      chosen.append((ranking, first, second))
  if not chosen:
    raise UserError('no ranking has two answers of different ranks')
  return chosen
