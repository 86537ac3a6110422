import pytest

from rlhf_jax.report import charts
from rlhf_jax.report.charts import Series


def test_places_and_ticks():
  chart = charts.draw_chart('loss', '', 'step', [Series('a', [(0, 1.0), (10, 3.0)])])
  (drawn,) = chart.series
  assert drawn.path == 'M46 176L350 10'
  assert chart.y_ticks[0] == (176.0, '1') and chart.y_ticks[-1] == (10.0, '3')
  assert chart.x_ticks[0] == (46.0, '0') and chart.x_ticks[-1] == (350.0, '10')
  assert chart.summary == 'loss. a: from 1 to 3.'
  assert charts.draw_chart('loss', '', 'step', [Series('a', [])]) is None


@pytest.mark.parametrize('values', [[0.0], [5.0, 5.0], [1e-12, 2e-12], [-1e9, 1e9]])
def test_any_values_have_places(values):
  chart = charts.draw_chart('x', '', 'step', [Series('a', list(enumerate(values)))])
  places = [y for _, y, _ in chart.series[0].readings]
  assert all(0 <= y <= charts.HEIGHT for y in places) and 1 <= len(chart.y_ticks) <= 8


def test_runs_become_a_mean_and_a_range():
  series = charts.over_runs('a', [[(1, 1.0), (2, 5.0), (3, 0.0)], [(1, 3.0), (2, 5.0)]])
  assert series.points == [(1, 2.0), (2, 5.0)]
  assert series.band == [(1, 1.0, 3.0), (2, 5.0, 5.0)]


def test_a_long_line_is_averaged():
  chart = charts.draw_chart('x', '', 'step', [Series('a', [(n, n % 2) for n in range(1000)])])
  readings = chart.series[0].readings
  assert len(readings) <= charts.MAX_POINTS and not chart.series[0].marks


def test_histograms_share_an_axis():
  first, second = charts.draw_histograms([('a', [0.0, 0.0, 1.0]), ('b', [1.0]), ('c', [])])
  assert first.x_ticks == second.x_ticks and second.bars[0][0] > first.bars[0][0]
  assert sum(float(text.split('%')[0]) for *_, text in first.bars) == pytest.approx(100, abs=0.2)
