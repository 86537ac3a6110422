"""Plots for the lead's page, as SVG whose colours suit light and dark backgrounds."""

import datetime
import io
from typing import Any

import numpy as np

from rlhf_jax.collect.quality import PersonReport

_INK = '#7d8799'  # readable on white and on black
_COLOUR = '#5b78e6'
_MOST_PEOPLE = 40  # people in one plot


def draw_progress(times: list[float]) -> bytes:
  """Draws the cumulative number of judgements over time.

  Args:
    times: when each judgement was given, in seconds since 1970, ascending.
  """
  figure, axis = _make_figure('Judgements')
  moments: list[Any] = [datetime.datetime.fromtimestamp(time) for time in times]
  axis.step(moments, np.arange(1, len(times) + 1), where='post', color=_COLOUR)
  axis.tick_params(axis='x', rotation=25)
  return _save(figure)


def draw_reliability(people: list[PersonReport]) -> bytes:
  """Draws the reliability of each person with its 95% interval; 0 means random orders.

  Where there are more than 40 people, only the 40 most reliable ones are drawn.
  """
  figure, axis = _make_figure('Reliability (0 = random)')
  chosen = sorted(people, key=_reliability)[-_MOST_PEOPLE:]
  rows = np.arange(len(chosen))
  centres = np.array([each.reliability for each in chosen])
  below = centres - np.array([each.low for each in chosen])
  above = np.array([each.high for each in chosen]) - centres
  axis.errorbar(centres, rows, xerr=np.stack([below, above]), fmt='o', color=_COLOUR)
  axis.axvline(0, color=_INK, linewidth=1)
  axis.set_yticks(rows, [each.person for each in chosen])
  return _save(figure)


def draw_times(seconds: list[float]) -> bytes:
  """Draws a histogram of the seconds that people took for an item."""
  figure, axis = _make_figure('Seconds for an item')
  # longer times count as the 95% quantile: they are mostly pauses and would stretch the axis
  longest = float(np.quantile(seconds, 0.95)) if seconds else 1.0
  axis.hist(np.minimum(seconds, longest), bins=24, color=_COLOUR)
  return _save(figure)


def draw_confidence(values: list[float]) -> bytes:
  """Draws a histogram of the confidence of each item's ranking."""
  figure, axis = _make_figure('Items by confidence of their ranking')
  axis.hist(values, bins=20, range=(0.5, 1.0), color=_COLOUR)
  return _save(figure)


def _reliability(report: PersonReport) -> float:
  """Returns the value by which people are sorted."""
  return report.reliability


def _make_figure(title: str) -> tuple[Any, Any]:
  """Returns a figure and its axis; made without pyplot, which is not thread-safe."""
  from matplotlib.figure import Figure  # slow to import

  figure = Figure(figsize=(5.2, 3.1), layout='constrained')
  figure.patch.set_alpha(0)
  axis = figure.add_subplot()
  axis.patch.set_alpha(0)
  axis.set_title(title, color=_INK, fontsize=11)
  axis.tick_params(colors=_INK, labelsize=8)
  for spine in axis.spines.values():
    spine.set_color(_INK)
  axis.spines[['top', 'right']].set_visible(False)
  return figure, axis


def _save(figure: Any) -> bytes:
  """Returns a figure as SVG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', transparent=True)
  return buffer.getvalue()
