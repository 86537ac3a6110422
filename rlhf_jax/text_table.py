"""Aligned tables for terminals and result files, and lines that fit a terminal."""

from collections.abc import Collection, Sequence
import shutil
import textwrap
from typing import TextIO


def format_rows(rows: Sequence[Sequence[str]], indent: str = '') -> str:
  """Formats rows as an aligned table: the first column to the left, all others to the right.

  Args:
    rows: the cells of each row, the same number in every row; headings are a row too.
    indent: the beginning of every line.

  Returns:
    The lines, without trailing spaces.

  >>> print(format_rows([('model', 'helpful'), ('sft', '42.2%')]))
  model  helpful
  sft      42.2%
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    first = row[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    line = indent + '  '.join([first, *others])
    lines.append(line.rstrip())
  return '\n'.join(lines)


def format_blocks(rows: Sequence[Sequence[str]], width: int, joined: Collection[int] = ()) -> str:
  """Formats rows as tables of some columns each, one below the other, that fit a terminal.

  Each of them has the first column. A column that is too wide alone stays as it is.

  Args:
    rows: the cells of each row, as for `format_rows`.
    width: columns of the terminal; 0 = of any width, so that there is one table.
    joined: the numbers of columns that stay beside the one before them.

  >>> print(format_blocks([('model', 'helpful', 'honest'), ('sft', '42%', '9%')], 16))
  model  helpful
  sft        42%
  <BLANKLINE>
  model  honest
  sft        9%
  """
  if not width:
    return format_rows(rows)
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  blocks: list[list[int]] = []
  used = 0
  for number in range(1, len(widths)):
    if number in joined:
      continue
    unit = [number]
    while unit[-1] + 1 in joined:
      unit.append(unit[-1] + 1)
    needed = sum(2 + widths[column] for column in unit)
    if not blocks or used + needed > width:
      blocks.append([])
      used = widths[0]
    blocks[-1] += unit
    used += needed
  tables = []
  for block in blocks or [[]]:
    tables.append(format_rows([[row[0], *(row[column] for column in block)] for row in rows]))
  return '\n\n'.join(tables)


def wrap_lines(text: str, width: int) -> str:
  """Breaks lines that are wider than a terminal between words, and indents what follows.

  >>> print(wrap_lines('  seen: fit 58%, harm 50%', 16))
    seen: fit 58%,
      harm 50%
  """
  lines = []
  for line in text.split('\n'):
    if len(line) > width:
      indent = ' ' * (len(line) - len(line.lstrip()) + 2)
      # Paths stay whole, so that they can be copied.
      line = textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
      )
    lines.append(line)
  return '\n'.join(lines)


def terminal_width(stream: TextIO) -> int:
  """Returns the columns of the terminal that a stream goes to; 0 where it goes to none."""
  return shutil.get_terminal_size().columns if stream.isatty() else 0


def fit_terminal(text: str, stream: TextIO) -> str:
  """Breaks the lines of a text that are wider than the terminal that a stream goes to."""
  width = terminal_width(stream)
  return wrap_lines(text, width) if width else text
