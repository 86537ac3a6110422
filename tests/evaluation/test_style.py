import numpy as np

from rlhf_jax.evaluation import style

TEXT = """# Reasons
Plant **a tree**, it is *good* and __cheap__:
 - shade
 * fruit
1. It is 2 * 3 * 4 = 24, not 2 ** 3 ** 4.
2) see file_name_here, a_b and C# or #hashtag
-not an item
"""


def test_marks_are_told_from_signs_that_look_like_them():
  measured = style.measure_style([TEXT, 'Plain words only.', ''])
  assert {name: values.tolist() for name, values in measured.items()} == {
    'words': [len(TEXT.split()), 3, 0],
    'headings': [1, 0, 0],
    'lists': [4, 0, 0],
    'emphasis': [3, 0, 0],
  }


def test_a_line_of_stars_ends_soon():
  hostile = '*a' * 20_000 + '_' * 20_000 + '# ' * 10_000
  assert np.isfinite(style.measure_style([hostile])['emphasis']).all()
