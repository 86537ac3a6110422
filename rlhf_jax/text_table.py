"""Aligned tables for terminals and result files."""

from collections.abc import Sequence


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
