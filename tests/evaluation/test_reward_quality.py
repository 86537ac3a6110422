import numpy as np
import pytest

from rlhf_jax.evaluation import reward_quality
from rlhf_jax.evaluation.reward_quality import JudgedPairs


def pairs(count, longer=0.5, sources=('a', 'b')):
  return JudgedPairs(
    longer=np.full(count, longer),
    sources=np.array(sources)[np.arange(count) % len(sources)],
    clusters=np.arange(count).astype(str),
  )


def test_accuracy_by_source_beside_the_length():
  margins = np.array([1.0, -1.0, 2.0, 0.0])  # of sources a, b, a, b
  table = reward_quality.measure_accuracy(margins, pairs(4, longer=1.0))
  assert table['a']['accuracy'] == 1.0 and table['b']['accuracy'] == 0.25
  assert table['all']['accuracy'] == 0.625 and table['all']['gain'] == -0.375
  assert table['all']['log_loss'] == pytest.approx(np.log1p(np.exp(-margins)).mean())


def test_a_calibrated_model_is_found_calibrated_and_a_bold_one_not():
  rng = np.random.default_rng(0)
  margins = rng.normal(0, 1.5, 20_000)
  # The labels are drawn with the probabilities of the margins.
  better = rng.random(len(margins)) < 1 / (1 + np.exp(-margins))
  margins = np.where(better, margins, -margins)
  calibrated = reward_quality.measure_calibration(margins)
  assert calibrated['expected_error'] < 0.015
  assert sum(row['pairs'] for row in calibrated['bins']) == len(margins)
  for row in calibrated['bins']:
    assert row['low'] <= row['confidence'] <= row['high']
  bold = reward_quality.measure_calibration(3 * margins)
  assert bold['expected_error'] > 0.1 and bold['brier'] > calibrated['brier']


def test_models_that_err_alone_agree_by_chance_and_their_mean_is_better():
  rng = np.random.default_rng(0)
  truth = np.abs(rng.normal(0.3, 0.5, 4000))
  models = truth + rng.normal(0, 1, (5, 4000))
  [pair] = reward_quality.compare_models({'a': models[0], 'b': models[1]}).values()
  assert pair['same'] == pytest.approx(pair['expected'], abs=0.05)
  ensemble = reward_quality.measure_ensemble(models, pairs(4000))
  assert ensemble['accuracy'] > (models[0] > 0).mean() + 0.1
  assert ensemble['disagreement'] == pytest.approx(0.84, abs=0.02)  # of 5 normal variables


def test_the_worst_errors_come_first():
  assert reward_quality.list_errors(np.array([1.0, -0.1, -3.0, 0.0]), 2) == [2, 1]
