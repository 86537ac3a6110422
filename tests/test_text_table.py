import doctest

import pytest

from rlhf_jax import text_table


def test_the_example():
  assert doctest.testmod(text_table).failed == 0


def test_columns_are_aligned_and_lines_have_no_blanks_at_their_ends():
  rows = [('a', 'long'), ('bcd', '')]
  assert text_table.format_rows(rows, indent='  ') == '  a    long\n  bcd'


def test_rows_of_unequal_length_are_refused():
  with pytest.raises(ValueError):
    text_table.format_rows([('a', 'b'), ('c',)])
