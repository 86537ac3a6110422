"""How good a judge's labels are, measured before they are used: against the order of the answers, against people.

Intervals are 95%: Wilson's for a share, the bootstrap over comparisons for kappa.
"""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.errors import UserError

DEFAULTS = dict(
    records=200,  # comparisons labelled by people that are asked first; 0 = no gate
    consistency=0.7,  # a judge is fit if at least this share of its verdicts stays when the answers change places,
    agreement=0.55,  # and at least this share of them are people's
    override=False,  # go on with a judge that is not fit
)


def wilson(wins: float, count: int) -> tuple[float, float]:
  """95% interval of a share, wins / count (Wilson 1927)."""
  if not count:
    return 0.0, 1.0
  z, share = 1.959964, wins / count
  middle = share + z * z / (2 * count)
  half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
  scale = 1 + z * z / count
  return float(max(0.0, (middle - half) / scale)), float(min(1.0, (middle + half) / scale))


def kappa(said, people) -> float:
  """Cohen's kappa of two lists of verdicts [N] bool: agreement beyond what their shares of True would give."""
  said, people = np.asarray(said, bool), np.asarray(people, bool)
  chance = said.mean() * people.mean() + (1 - said.mean()) * (1 - people.mean())
  return float(((said == people).mean() - chance) / (1 - chance)) if chance < 1 else 0.0


def position(as_shown) -> dict:
  """What changing places does to verdicts.

  Args:
    as_shown: [N, 2] float, of judging.both_orders.

  Returns:
    verdicts: comparisons with a verdict in both orders; without: the others; consistency (share of verdicts that stay
    with the answer) and its interval; first (share of all verdicts for the answer shown first; 0.5 = no habit).
  """
  given = ~np.isnan(as_shown).any(axis=1)
  shown = as_shown[given]
  stays = (shown[:, 0] - 0.5) * (0.5 - shown[:, 1]) > 0
  return {'verdicts': int(given.sum()), 'without': int((~given).sum()),
          'consistency': float(stays.mean()) if len(shown) else 0.0,
          'consistency_ci95': wilson(stays.sum(), len(shown)),
          'first': float((shown > 0.5).mean()) if len(shown) else 0.5}


def against_people(probabilities, people, lengths) -> dict:
  """A judge's verdicts beside people's, over comparisons with a verdict.

  Args:
    probabilities: [N] float, that the first answer is better; NaN = none.
    people: [N] bool, whether people preferred the first.
    lengths: [N, 2] int, characters of the two answers.

  Returns:
    pairs; agreement and kappa with intervals; log_loss (nats; ln 2 = 0.693 knows nothing); calibration_error (expected,
    10 bins of the preferred answer's probability); longer and people_longer: how often each prefers the longer answer.
  """
  given = ~np.isnan(probabilities)
  p, people, lengths = np.asarray(probabilities)[given], np.asarray(people, bool)[given], np.asarray(lengths)[given]
  if not len(p):
    return {'pairs': 0, 'agreement': 0.0, 'agreement_ci95': (0.0, 1.0)}
  right = np.where(p == 0.5, 0.5, (p > 0.5) == people)
  rng = np.random.default_rng(0)
  drawn = [rng.integers(0, len(p), len(p)) for _ in range(1000)]
  confidence = np.maximum(p, 1 - p)
  bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
  error = sum(abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
  differ = lengths[:, 0] != lengths[:, 1]
  longer = (lengths[:, 0] > lengths[:, 1])[differ]
  share = lambda first: float((first[differ] == longer).mean()) if differ.any() else 0.5
  clipped = np.clip(p, 1e-6, 1 - 1e-6)
  return {'pairs': len(p), 'agreement': float(right.mean()), 'agreement_ci95': wilson(right.sum(), len(p)),
          'kappa': kappa(p > 0.5, people),
          'kappa_ci95': tuple(np.quantile([kappa((p > 0.5)[i], people[i]) for i in drawn], (0.025, 0.975)).tolist()),
          'log_loss': float(-np.mean(np.where(people, np.log(clipped), np.log(1 - clipped)))),
          'calibration_error': float(error), 'longer': share(p > 0.5), 'people_longer': share(people)}


def between(each: dict) -> dict:
  """How often each two judges of a panel agree: 'a, b' → share of comparisons on which both gave a verdict."""
  names = list(each)
  return {f'{a}, {b}': float(((each[a] > 0.5) == (each[b] > 0.5))[~np.isnan(each[a] + each[b])].mean())
          for i, a in enumerate(names) for b in names[i + 1:]}


def unfit(report: dict, limits) -> str:
  """Why a judge is not fit by the limits (like DEFAULTS), '' if it is.

  Args:
    report: {'position': position(…), 'people': against_people(…) or None}.
  """
  reasons = []
  if report['position']['consistency'] < limits.consistency:
    reasons.append(f'only {report["position"]["consistency"]:.0%} of its verdicts stay when the answers change places '
                   f'(expected {limits.consistency:.0%})')
  if report.get('people') and report['people']['agreement'] < limits.agreement:
    reasons.append(f'it agrees with people on {report["people"]["agreement"]:.0%} of {report["people"]["pairs"]} pairs '
                   f'(expected {limits.agreement:.0%})')
  return '; '.join(reasons)


def text(rows: dict[str, dict]) -> str:
  """The agreement of a judge with people as an aligned table, a line for each source (of against_people)."""
  lines = [('source', 'pairs', 'agreement', '95% interval', 'kappa', 'log-loss', 'longer', 'people longer')]
  for name, row in rows.items():
    cells = [name, str(row['pairs']), *['–'] * 6]
    if row['pairs']:
      low, high = row['agreement_ci95']
      cells[2:] = [f'{row["agreement"]:.1%}', f'{low:.1%} – {high:.1%}', f'{row["kappa"]:.2f}', f'{row["log_loss"]:.3f}',
                   f'{row["longer"]:.0%}', f'{row["people_longer"]:.0%}']
    lines.append(tuple(cells))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.rjust(width) if i else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(line, widths))) for line in lines)


def pairs(rankings: Sequence, count: int, rng: np.random.Generator) -> list:
  """(record, first, second) of at most `count` rankings: two answers that people did not call equal, drawn at random,
  in random order.

  Raises:
    UserError: there are no such two.
  """
  chosen = []
  for row in (rankings[i] for i in rng.permutation(len(rankings))):
    known = [(i, j) for i, a in enumerate(row.ranks) for j, b in enumerate(row.ranks) if a != b]
    if known and len(chosen) < count:
      chosen.append((row, *known[int(rng.integers(len(known)))]))
  if not chosen:
    raise UserError('no ranking has two answers of different ranks')
  return chosen
