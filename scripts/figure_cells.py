"""Formats what scripts/fill_figures.py writes: paragraphs, tables and the cells of tables."""

from collections.abc import Sequence
import textwrap
from typing import Any

DECODINGS = {'sampled': 'Sampled at temperature 1', 'greedy': 'Greedy'}
SUBSTANCE = 'substance_win_rate_vs_sft'  # of the rows in results.json

Row = dict[str, Any]  # the values of one model in one decoding
Run = dict[str, Any]  # one file of docs/results


def fill_lines(text: str) -> str:
  """Breaks a paragraph into lines of at most 100 characters."""
  return textwrap.fill(' '.join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Makes a Markdown table."""
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def format_rate(row: Row, rate: str) -> str:
  """Formats a rate in percent."""
  return f'{100 * row[rate]:.1f}%'


def format_with_interval(row: Row, rate: str) -> str:
  """Formats a rate with its 95% interval, in percent."""
  low, high = row[rate + '_ci95']
  return f'{format_rate(row, rate)} ({100 * low:.1f} – {100 * high:.1f})'


def format_decodings(decodings: dict[str, Row], rate: str) -> str:
  """Formats a rate of each decoding, sampled / greedy; – where there is none."""
  return ' / '.join(
    format_rate(decodings[name], rate) if name in decodings else '–' for name in DECODINGS
  )
