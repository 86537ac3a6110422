"""Against figures that the package `rewardbench` 0.1.4 itself computed from the same scores."""

import json
from pathlib import Path

import pytest

from rlhf_jax.evaluation import reward_bench

RECORDED = json.loads((Path(__file__).parent / 'data' / 'rewardbench.json').read_text())


def test_pairs():
  recorded = RECORDED['pairs']
  found = reward_bench.score_pairs(recorded['chosen'], recorded['rejected'], recorded['subsets'])
  assert found['subsets'] == pytest.approx(recorded['accuracy'])
  sections = dict(found['sections'])
  assert sections.pop('score') == pytest.approx(sum(recorded['sections'].values()) / 4)
  assert sections == pytest.approx(recorded['sections'])
  # A section of which only a part is there is the mean of that part.
  part = reward_bench.score_pairs([1.0, 0.0], [0.0, 0.0], ['hep-go', 'mt-bench-easy'])
  assert part['sections'] == {'Chat': 0.0, 'Reasoning': 1.0, 'score': 0.5}


def test_best_of_four():
  recorded = RECORDED['best_of']
  found = [reward_bench.score_best_of(scores) for scores in recorded['scores']]
  assert found == pytest.approx(recorded['results'])
  assert 0.5 in found  # a tie for the best


def test_ties():
  rows = [(row['id'], row['scores'], row['num_correct']) for row in RECORDED['ties']['rows']]
  assert reward_bench.score_ties(rows) == pytest.approx(RECORDED['ties']['score'], abs=1e-12)
