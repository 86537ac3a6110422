"""Linear models of which of two texts people prefer, measured by k-fold cross-validation.

A head fitted to the features of a frozen model stands beside two baselines that know no
language: the length, and a bag of words and bigrams. All are logistic regressions on differences,

  minimise Σ_pairs w [−p log σ(Δ) − (1 − p) log σ(−Δ)] + ridge/2 Σw |β|²
  Δ = β·(f_better − f_worse)

and all see the same folds. A fold holds whole clusters: all comparisons of one
conversation's opener are measured by models that never saw it.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any
import zlib

import numpy as np
from scipy import optimize, sparse

from rlhf_jax.evaluation import winrate

RIDGES = (0.001, 0.01, 0.1, 1.0)  # of which each fold chooses one, by a part of its training pairs

_MAX_ITERATIONS = 200
_NUM_BUCKETS = 2**16  # of the checksums of words and bigrams

Matrix = Any  # np.ndarray, or a sparse matrix of scipy, which has no types


@dataclasses.dataclass(frozen=True)
class Pairs:
  """P pairs of texts, of which people prefer one.

  Attributes:
    better: [P] int, the row of the preferred text in a matrix of features.
    worse: [P] int, the row of the other.
    weights: [P] float, how much each pair counts in a fit; those of one ranking add up to 1.
    confidence: [P] float in 0.5..1, the probability that the better one is better.
    clusters: [P] str, what belongs together.
    sources: [P] str, the data set.
  """

  better: np.ndarray
  worse: np.ndarray
  weights: np.ndarray
  confidence: np.ndarray
  clusters: np.ndarray
  sources: np.ndarray

  def select(self, chosen: np.ndarray) -> 'Pairs':
    """Returns some of the pairs; `chosen` is [P] bool or [Q] int."""
    return Pairs(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

  def renumber(self) -> tuple[np.ndarray, 'Pairs']:
    """Returns the texts that are compared, [M] int, and the pairs of their places among these."""
    used, places = np.unique(np.concatenate([self.better, self.worse]), return_inverse=True)
    better, worse = np.split(places, 2)
    return used, dataclasses.replace(self, better=better, worse=worse)


def fit(features: Matrix, pairs: Pairs, ridge: float) -> np.ndarray:
  """Fits the logistic regression by L-BFGS.

  Args:
    features: [N, F] float64, a row for each text.
    pairs: which rows are compared.
    ridge: the penalty, in units of the weight of all pairs.

  Returns:
    β, [F] float64.
  """
  differences = features[pairs.better] - features[pairs.worse]  # [P, F]
  total = pairs.weights.sum()
  weights = pairs.weights / total

  def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
    margins = differences @ coefficients
    chances = 0.5 + 0.5 * np.tanh(0.5 * margins)
    # −p log σ(Δ) − (1 − p) log σ(−Δ) = log(1 + e^−Δ) + (1 − p) Δ
    losses = np.logaddexp(0, -margins) + (1 - pairs.confidence) * margins
    slopes = weights * (chances - pairs.confidence)
    penalty = 0.5 * ridge * float(coefficients @ coefficients)
    value = float(weights @ losses) + penalty
    return value, differences.T @ slopes + ridge * coefficients

  start = np.zeros(features.shape[1])
  options = {'maxiter': _MAX_ITERATIONS}
  return optimize.minimize(loss, start, jac=True, method='L-BFGS-B', options=options).x


def correctness(features: Matrix, pairs: Pairs, coefficients: np.ndarray) -> np.ndarray:
  """Says of each pair whether the preferred text scores higher: 1, 0, or 0.5 for a tie; [P]."""
  margins = (features[pairs.better] - features[pairs.worse]) @ coefficients
  return 0.5 + 0.5 * np.sign(np.round(margins, 9))


def assign_folds(clusters: np.ndarray, num_folds: int) -> np.ndarray:
  """Distributes whole clusters over folds of nearly equal size; [P] int."""
  names, members, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
  fold_of_cluster = np.zeros(len(names), int)
  filled = np.zeros(num_folds, int)
  # The largest first; of equal ones in the order of a checksum, not of the alphabet.
  checksums = np.array([zlib.crc32(str(name).encode()) for name in names])
  for cluster in np.lexsort((checksums, -sizes)):
    fold = int(np.argmin(filled))
    fold_of_cluster[cluster] = fold
    filled[fold] += sizes[cluster]
  return fold_of_cluster[members]


def cross_validate(
  features: Matrix, pairs: Pairs, folds: np.ndarray, ridges: Sequence[float] = RIDGES
) -> np.ndarray:
  """Measures every pair by a model that was fitted to the other folds.

  The ridge of each fold is chosen by the accuracy on the next fold of a model fitted to the rest.

  Args:
    features: [N, F] float64.
    pairs: P of them.
    folds: [P] int, the fold of each pair.
    ridges: to choose from; a single one is taken as it is.

  Returns:
    [P] float64 in {0, 0.5, 1}: whether the preferred text scores higher.
  """
  right = np.full(len(folds), np.nan)
  numbers = np.unique(folds)
  for place, fold in enumerate(numbers):
    others = pairs.select(folds != fold)
    ridge = ridges[0]
    if len(ridges) > 1 and len(numbers) > 2:
      is_chooser = folds[folds != fold] == numbers[(place + 1) % len(numbers)]
      ridge = choose_ridge(features, others, is_chooser, ridges)
    coefficients = fit(features, others, ridge)
    measured = pairs.select(folds == fold)
    right[folds == fold] = correctness(features, measured, coefficients)
  return right


def choose_ridge(
  features: Matrix, pairs: Pairs, is_chooser: np.ndarray, ridges: Sequence[float]
) -> float:
  """Chooses the ridge with which a fit to some pairs is most accurate on the others.

  Args:
    features: [N, F] float64.
    pairs: P of them.
    is_chooser: [P] bool, the pairs by which is chosen.
    ridges: to choose from.
  """
  rates = []
  for ridge in ridges:
    coefficients = fit(features, pairs.select(~is_chooser), ridge)
    rates.append(correctness(features, pairs.select(is_chooser), coefficients).mean())
  # Of equally good ones the strongest, which is the simplest model.
  best = max(range(len(ridges)), key=lambda place: (rates[place], ridges[place]))
  return ridges[best]


def bags_of_bigrams(texts: Sequence[str]) -> sparse.csr_matrix:
  """Counts the words and the bigrams of texts: log(1 + count), [N, buckets] float64, sparse."""
  rows: list[int] = []
  columns: list[int] = []
  for number, text in enumerate(texts):
    words = re.findall(r"[\w']+|[^\w\s]", text.lower())
    terms = words + [f'{first} {second}' for first, second in zip(words, words[1:], strict=False)]
    columns += [zlib.crc32(term.encode()) % _NUM_BUCKETS for term in terms]
    rows += [number] * len(terms)
  shape = (len(texts), _NUM_BUCKETS)
  counts = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape)
  return counts.log1p()


def rotate(features: sparse.csr_matrix) -> np.ndarray:
  """Returns the coordinates of N texts in the space that their features span, [N, N] float64.

  All products of features are the same, so a fit with a ridge is, too; but it has
  N coefficients, and not as many as there are words.
  """
  products = (features @ features.T).toarray()
  values, vectors = np.linalg.eigh(products)
  return vectors * np.sqrt(np.maximum(values, 0.0))


def compare_models(
  right: dict[str, np.ndarray], pairs: Pairs, model: str
) -> dict[str, dict[str, object]]:
  """Compares the accuracy of a model with that of others on the same pairs.

  Args:
    right: name of a model → [P] whether it is right, see `cross_validate`.
    pairs: the P pairs.
    model: the name of the model that is compared with the others.

  Returns:
    'accuracy' and 'gain' → name → the mean, and name + '_ci95' → its 95% bootstrap interval over
    clusters. The gain is that of `model` over another one: paired, so its interval is narrower
    than those of both would suggest.
  """
  table: dict[str, dict[str, object]] = {'accuracy': {}, 'gain': {}}
  for name, values in right.items():
    table['accuracy'][name] = float(values.mean())
    table['accuracy'][f'{name}_ci95'] = list(winrate.bootstrap(values, [*pairs.clusters]))
    if name != model:
      gains = right[model] - values
      table['gain'][name] = float(gains.mean())
      table['gain'][f'{name}_ci95'] = list(winrate.bootstrap(gains, [*pairs.clusters]))
  return table
