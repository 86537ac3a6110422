"""The figures of docs/collect.md are those of the results files."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

DOCS = Path(__file__).parents[2] / 'docs'


@pytest.mark.parametrize('seed', [0, 1])
def test_selection_beats_one_collection_as_the_page_says(seed):
  repeats = json.loads((DOCS / f'results/selection_seed{seed}.json').read_text())['repeats']
  values = {arm: np.array([row[arm] for row in repeats]) for arm in repeats[0]}
  cells = [f'{100 * values["once"].mean():.1f}%']
  for arm in ('single', 'ensemble'):
    gains = 100 * (values[arm] - values['once'])
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    assert gains.mean() > half
    cells.append(f'{100 * values[arm].mean():.1f}% ({gains.mean():+.2f} ± {half:.2f})')
  assert f'| seed {seed} | {" | ".join(cells)} |' in (DOCS / 'collect.md').read_text()
