"""Aligned tables for terminals and result files."""

from typing import Sequence


def format_rows(rows: Sequence[Sequence[str]], indent: str = '') -> str:
  """Aligns cells in columns: the first to the left, all others to the right.

  Args:
    rows: lines of cells, every line as long as the first; headings are a line too.
    indent: what every line begins with.

  Returns:
    The lines, without blanks at their ends.

  >>> print(format_rows([('model', 'helpful'), ('sft', '42.2%')]))
  model  helpful
  sft      42.2%
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    first = row[0].ljust(widths[0])
    others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
    lines.append((indent + '  '.join([first, *others])).rstrip())
  return '\n'.join(lines)
