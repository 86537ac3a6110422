"""Features of the manner of a text, which a controlled win rate takes out of a judge's verdicts.

They are those of Li et al. 2024, "Does style matter? Disentangling
style and substance in Chatbot Arena": the length and the counts of
Markdown headings, lists and bold words, here with emphasis of any kind.
"""

from collections.abc import Callable, Sequence
import re

import numpy as np

_HEADING = re.compile(r'^ {0,3}#{1,6}[ \t]+\S', re.MULTILINE)
# '- text', '* text', '+ text', '1. text' or '1) text', at any indentation
_LIST_ITEM = re.compile(r'^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S', re.MULTILINE)
# **bold**, __bold__, *italic* or _italic_, around text without spaces at its edges
_EMPHASIS = re.compile(r'(?<![\w*_])(\*\*|__|\*|_)(?=[^\s*_])(?:[^\n*_]*?[^\s*_])?\1(?![\w*_])')


def count_words(text: str) -> int:
  """Counts the words of a text.

  >>> count_words('Trees give shade.')
  3
  """
  return len(text.split())


def count_headings(text: str) -> int:
  r"""Counts Markdown headings.

  >>> count_headings('# One\ntext # two')
  1
  """
  return len(_HEADING.findall(text))


def count_list_items(text: str) -> int:
  r"""Counts the items of bulleted and numbered lists.

  >>> count_list_items('Two reasons:\n- shade\n2. fruit')
  2
  """
  return len(_LIST_ITEM.findall(text))


def count_emphasis(text: str) -> int:
  """Counts words or phrases in bold or italics.

  >>> count_emphasis('**Never** do *this* with 2 * 3 * 4 or snake_case_names')
  2
  """
  return len(_EMPHASIS.findall(text))


# what a controlled win rate controls unless told otherwise
FEATURES: dict[str, Callable[[str], int]] = {
  'words': count_words,
  'headings': count_headings,
  'lists': count_list_items,
  'emphasis': count_emphasis,
}


def measure_style(texts: Sequence[str]) -> dict[str, np.ndarray]:
  """Measures all features of N texts: name → [N] float64."""
  measured = {}
  for name, count in FEATURES.items():
    measured[name] = np.array([count(text) for text in texts], np.float64)
  return measured
