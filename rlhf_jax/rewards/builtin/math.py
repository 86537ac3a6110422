r"""Rewards for questions with one right answer: 1.0 where a response ends with it, else 0.0.

Left out: credit for the reasoning or the format, mixed numbers (1 1/2),
scientific notation (1e5), units.
"""

from collections.abc import Sequence
from fractions import Fraction
import logging
import re

from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError

_MARK = '####'  # precedes the final answer in GSM8K
_BOX = r'\boxed{'

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
# A number with its sign ('-5'; but '10-5' is 10 and 5), optionally with a
# denominator ('3/4', but not the date '3/4/21').
_NUMBER = re.compile(rf'(?<![\w)])(?<!\d\.)(-?(?:{_DIGITS}))(?:\s?/\s?(\d+)(?![\d/]))?')
_REWRITES = (  # (pattern, replacement), applied before numbers are searched for
  (r'[−–]', '-'),
  (r'\{,\}', ','),  # TeX: 1{,}000
  (r'\\[,!]', ''),  # TeX: 1\,000
  (r'(-?)\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}', r' \1\2/\3'),
  (r'((?<![\w)])-)?\\?[$€£]', r' \1'),  # -$5 is -5
)


def final_number(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Prompt],
) -> list[float]:
  r"""Gives 1.0 where the response's final number equals `meta['final']`, else 0.0.

  The final number is the first one on the line of the last '####' (Cobbe et al.
  2021, arXiv:2110.14168, the form of GSM8K's answers), else the first in the last
  \boxed{…}, else the last one in the response. A '####' or \boxed{…} without a
  number is no answer. Numbers are compared exactly: 1,000 = 1000.0 and 1/2 =
  0.50; currency and percent signs are ignored.

  Args:
    prompts: not used.
    responses: N texts.
    records: N prompts, whose meta has `final`.

  Raises:
    UserError: a record has no `meta['final']`, or it is not a number.
  """
  values = []
  for response, record in zip(responses, records, strict=True):
    values.append(float(_final_value(response) == _right_value(record)))
  return values


def verified(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Prompt],
) -> list[float]:
  r"""Gives 1.0 where `math-verify` finds the answer equal to `meta['final']`, else 0.0.

  `meta['final']` may be any TeX expression. The library looks for the answer on
  the line of the last '####' if there is one, else in the whole response, where
  it prefers \boxed{…}. What it cannot parse or compare scores 0. Its own
  timeouts, which use signals, are switched off, as they would interfere with the
  worker process; the worker's time limit applies instead (an answer such as
  9^9^9^9 exceeds it).

  Args:
    prompts: not used.
    responses: N texts.
    records: N prompts, whose meta has `final`.

  Raises:
    UserError: math-verify is not installed, or a record has no `meta['final']`, or one
      that math-verify cannot parse.
  """
  try:
    import math_verify
  except ImportError:
    raise UserError(
      'rewards.builtin.math:verified: math-verify is not installed, run: pip install rlhf_jax[math]'
    ) from None
  # It would warn on each call that its timeouts are off.
  logging.getLogger('math_verify').setLevel(logging.ERROR)
  values = []
  for response, record in zip(responses, records, strict=True):
    final = _read_final(record)
    gold = math_verify.parse(
      rf'\boxed{{{final}}}',
      parsing_timeout=None,
      fallback_mode='no_fallback',
    )
    if not gold:
      raise UserError(f'record {record.id}: meta "final": math-verify cannot read {final!r:.60}')
    text = _line_after_mark(response) if _MARK in response else response
    answer = math_verify.parse(text, parsing_timeout=None)
    values.append(float(math_verify.verify(gold, answer, timeout_seconds=None)))
  return values


def _final_value(response: str) -> Fraction | None:
  """Returns the final number of a response; None if there is none."""
  if _MARK in response:
    numbers = _find_numbers(_line_after_mark(response))
  elif _BOX in response:
    numbers = _find_numbers(_last_box(response))
  else:
    numbers = _find_numbers(response)[-1:]
  if not numbers:
    return None
  return _as_fraction(*numbers[0])


def _line_after_mark(response: str) -> str:
  """Returns the first non-empty line after the last '####'."""
  return response.rpartition(_MARK)[2].strip().partition('\n')[0]


def _last_box(response: str) -> str:
  r"""Returns the content of the last \boxed{…}; where it is not closed, all that follows."""
  text = response.rpartition(_BOX)[2]
  depth = 1  # the number of open braces
  for index, letter in enumerate(text):
    if letter == '{':
      depth += 1
    elif letter == '}':
      depth -= 1
    if depth == 0:  # the brace that closes the box
      return text[:index]
  return text


def _find_numbers(text: str) -> list[tuple[str, str]]:
  """Returns all numbers of a text as (numerator, denominator or '')."""
  for pattern, replacement in _REWRITES:
    text = re.sub(pattern, replacement, text)
  return _NUMBER.findall(text)


def _as_fraction(numerator: str, denominator: str) -> Fraction | None:
  """Returns a number as an exact fraction; None where it divides by zero or has too many digits."""
  try:
    return Fraction(numerator.replace(',', '')) / Fraction(denominator or 1)
  except (ValueError, ZeroDivisionError):  # ValueError: more digits than Python converts
    return None


def _read_final(record: Prompt) -> str:
  """Returns the right answer of a record as a text."""
  final = record.meta.get('final')
  if final is None:
    raise UserError(f'record {record.id}: meta lacks "final", the right answer')
  return str(final)


def _right_value(record: Prompt) -> Fraction:
  """Returns the right answer of a record as a number."""
  final = _read_final(record)
  numbers = _find_numbers(final)
  value = _as_fraction(*numbers[0]) if len(numbers) == 1 else None
  if value is None:
    raise UserError(f'record {record.id}: meta "final": expected a number, got {final!r:.60}')
  return value
