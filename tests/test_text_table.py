import doctest
import io

import pytest

from rlhf_jax import text_table


def test_the_example():
  assert doctest.testmod(text_table).failed == 0


def test_columns_are_aligned_and_lines_have_no_blanks_at_their_ends():
  rows = [('a', 'long'), ('bcd', '')]
  assert text_table.format_rows(rows, indent='  ') == '  a    long\n  bcd'


def test_a_table_that_is_too_wide_becomes_several():
  """An interval stays beside its rate; nothing is lost, nothing wider than the terminal."""
  rows = [('model', 'rate', 'interval', 'KL'), ('a', '5%', '1% – 9%', '0.10')]
  narrow = text_table.format_blocks(rows, 22, joined={2})
  assert narrow.split('\n\n') == [
    'model  rate  interval\na        5%   1% – 9%',
    'model    KL\na      0.10',
  ]
  assert max(map(len, narrow.splitlines())) <= 22
  for width in (0, 80):
    assert text_table.format_blocks(rows, width, joined={2}) == text_table.format_rows(rows)
  # One that no terminal of this width can show stays whole.
  assert text_table.format_blocks(rows[:1], 5).count('model') == 3


def test_long_lines_are_broken_for_terminals_only():
  """No word of them is lost, and a path stays whole."""
  text = 'stage: step 2: ' + 'eval/loss 0.5, ' * 9 + '\n  short\nno /tmp/a-path/' + 'x' * 40
  for width in (20, 80):
    wrapped = text_table.wrap_lines(text, width)
    assert wrapped.split() == text.split()
    wide = [line for line in wrapped.split('\n') if len(line) > width]
    assert wide == ([] if width > 40 else ['  /tmp/a-path/' + 'x' * 40])
  assert text_table.fit_terminal(text, io.StringIO()) == text


def test_rows_of_unequal_length_are_refused():
  with pytest.raises(ValueError):
    text_table.format_rows([('a', 'b'), ('c',)])
