"""Marks in what a text differs from another, word by word."""

import difflib
import re

_WORDS = re.compile(r'\s+|\w+|[^\w\s]')
MAX_WORDS = 1500  # of a text; a longer one is not compared

Piece = tuple[str, bool]  # (text, whether the other text lacks it)


def mark_differences(text: str, other: str) -> list[Piece]:
  """Splits a text into what another text has too, and what it lacks.

  Args:
    text: is split; the pieces joined are the text.
    other: what it is compared with.

  Returns:
    The pieces in order.

  >>> mark_differences('It is red.', 'It is blue.')
  [('It is ', False), ('red', True), ('.', False)]
  """
  words, others = _WORDS.findall(text), _WORDS.findall(other)
  # The comparison takes the product of both lengths.
  if max(len(words), len(others)) > MAX_WORDS:
    return [(text, False)]
  # autojunk would ignore words that are frequent in a long text.
  matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
  pieces = []
  for kind, _, _, begin, end in matcher.get_opcodes():
    if end > begin:
      pieces.append((''.join(words[begin:end]), kind != 'equal'))
  return _join_marked(pieces)


def _join_marked(pieces: list[Piece]) -> list[Piece]:
  """Joins what is marked on both sides of a space, so that marks are whole phrases."""
  joined: list[Piece] = []
  for number, (text, differs) in enumerate(pieces):
    is_between = 0 < number < len(pieces) - 1 and pieces[number + 1][1] and pieces[number - 1][1]
    marked = differs or (is_between and not text.strip())
    if joined and joined[-1][1] == marked:
      joined[-1] = (joined[-1][0] + text, marked)
    else:
      joined.append((text, marked))
  return joined
