"""How good a reward model is: accuracy by source, calibration, agreement, ensembles.

Letters: P pairs, of which people prefer one; M models.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.evaluation import winrate

NUM_BINS = 10  # of the calibration


@dataclasses.dataclass(frozen=True)
class JudgedPairs:
  """P pairs of responses that people ordered.

  Attributes:
    longer: [P] float in {0, ½, 1}, whether the better one is the longer
      one.
    sources: [P] str, the data set.
    clusters: [P] str, what intervals resample together, such as the
      prompt.
  """

  longer: np.ndarray
  sources: np.ndarray
  clusters: np.ndarray


def measure_accuracy(margins: np.ndarray, pairs: JudgedPairs) -> dict[str, dict[str, Any]]:
  """Measures how often a model agrees with people, by source.

  Args:
    margins: [P] float, the score of the better response minus that of
      the worse one.
    pairs: what is known of the pairs.

  Returns:
    Source, and 'all' → pairs; accuracy and accuracy_ci95, where equal
    scores count half; length_accuracy, of always preferring the longer
    response, and gain, what the model is above it, gain_ci95 (paired,
    so narrower than both would suggest); log_loss of −log σ(margin).
  """
  # 1, 0, or ½ where both score the same
  right = 0.5 + 0.5 * np.sign(margins)
  table = {}
  for name in ['all', *np.unique(pairs.sources)]:
    inside = np.full(len(right), True) if name == 'all' else pairs.sources == name
    clusters = [*pairs.clusters[inside]]
    gain = right[inside] - pairs.longer[inside]
    table[str(name)] = {
      'pairs': int(inside.sum()),
      'accuracy': float(right[inside].mean()),
      'accuracy_ci95': list(winrate.bootstrap(right[inside], clusters)),
      'length_accuracy': float(pairs.longer[inside].mean()),
      'gain': float(gain.mean()),
      'gain_ci95': list(winrate.bootstrap(gain, clusters)),
      'log_loss': float(np.logaddexp(0, -margins[inside]).mean()),
    }
  return table


def measure_calibration(margins: np.ndarray, num_bins: int = NUM_BINS) -> dict[str, Any]:
  """Measures whether σ(|margin|) is how often the model is right.

  Args:
    margins: [P] float, the score of the better response minus that of
      the worse one.
    num_bins: equal parts of the confidences from ½ to 1.

  Returns:
    bins: for each that has pairs, low, high, pairs, confidence,
      accuracy and accuracy_ci95, for a
    reliability plot; expected_error, Σ share · |confidence − accuracy|
    (Guo et al. 2017, arXiv:1706.04599, equation 3); brier, the mean of
    (confidence − right)².
  """
  margins = np.asarray(margins, np.float64)
  # σ(|margin|), of the response that the model prefers
  confidence = 0.5 + 0.5 * np.tanh(0.5 * np.abs(margins))
  right = 0.5 + 0.5 * np.sign(margins)
  edges = np.linspace(0.5, 1.0, num_bins + 1)
  places = np.clip(np.digitize(confidence, edges) - 1, 0, num_bins - 1)
  bins = []
  error = 0.0
  for number in np.unique(places):
    inside = places == number
    row: dict[str, Any] = {
      'low': float(edges[number]),
      'high': float(edges[number + 1]),
      'pairs': int(inside.sum()),
      'confidence': float(confidence[inside].mean()),
      'accuracy': float(right[inside].mean()),
      'accuracy_ci95': list(winrate.bootstrap(right[inside])),
    }
    bins.append(row)
    error += inside.mean() * abs(row['confidence'] - row['accuracy'])
  return {
    'bins': bins,
    'expected_error': float(error),
    'brier': float(np.mean((confidence - right) ** 2)),
  }


def compare_models(
  margins: Mapping[str, np.ndarray],
) -> dict[str, dict[str, float]]:
  """Measures how far models agree on pairs, as those trained on two halves of the data.

  Args:
    margins: name of a model → [P] float.

  Returns:
    'a, b' → same, the share of pairs in which both prefer the same
    response; expected, the share if they erred independently;
    correlation, of their margins.
  """
  found = {}
  names = [*margins]
  for place, first in enumerate(names):
    for second in names[place + 1 :]:
      a, b = margins[first], margins[second]
      # two models that are right nine times in ten agree on 82% by chance
      right_a, right_b = np.mean(a > 0), np.mean(b > 0)
      found[f'{first}, {second}'] = {
        'same': float(np.mean(np.sign(a) == np.sign(b))),
        'expected': float(right_a * right_b + (1 - right_a) * (1 - right_b)),
        'correlation': float(np.corrcoef(a, b)[0, 1]),
      }
  return found


def measure_ensemble(margins: np.ndarray, pairs: JudgedPairs) -> dict[str, Any]:
  """Measures an ensemble of reward models and what their disagreement says.

  Args:
    margins: [M, P] float, of M models.
    pairs: what is known of the pairs.

  Returns:
    accuracy and accuracy_ci95 of the mean margin; disagreement, the
    mean over pairs of the standard deviation over models;
    by_disagreement, the accuracy in the quarters of the pairs from the
    least to the most disagreement.
  """
  mean = margins.mean(axis=0)
  right = 0.5 + 0.5 * np.sign(mean)
  spread = margins.std(axis=0)
  # a useful disagreement is large where the mean is wrong
  quarters = np.array_split(np.argsort(spread, kind='stable'), 4)
  return {
    'models': len(margins),
    'accuracy': float(right.mean()),
    'accuracy_ci95': list(winrate.bootstrap(right, [*pairs.clusters])),
    'disagreement': float(spread.mean()),
    'by_disagreement': [float(right[part].mean()) for part in quarters if len(part)],
  }


def list_errors(margins: np.ndarray, count: int) -> Sequence[int]:
  """Returns the numbers of the pairs that a model gets wrong, the most confident ones first."""
  # a tie is an error, too: the model sees no difference
  wrong = np.flatnonzero(margins <= 0)
  return wrong[np.argsort(margins[wrong], kind='stable')][:count].tolist()
