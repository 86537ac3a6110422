r"""Rewards for questions with one right answer: 1.0 where a response ends in it, else 0.0.

Left out: credit for the way to the answer or its format, mixed numbers (1 1/2), powers of ten (1e5), units.
"""

from fractions import Fraction
import logging
import re

from rlhf_jax.errors import UserError

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+'
# the sign of "-5" but not of "10-5"; "3/4" but not the date "3/4/21"
_NUMBER = re.compile(rf'(?<![\w)])(?<!\d\.)(-?(?:{_DIGITS}))(?:\s?/\s?(\d+)(?![\d/]))?')
_REWRITES = (
    (r'[−–]', '-'),
    (r'\{,\}', ','),  # TeX: 1{,}000 and 1\,000
    (r'\\[,!]', ''),
    (r'(-?)\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}', r' \1\2/\3'),
    (r'((?<![\w)])-)?\\?[$€£]', r' \1'),  # -$5 is -5
)


def final_number(prompts, responses, records) -> list[float]:
  r"""1.0 where the response's final number equals `meta['final']`, else 0.0.

  The final number is the first one on the line of the last '####' (Cobbe et al. 2021, arXiv:2110.14168, the form of
  GSM8K's answers), else the first in the last \boxed{…}, else the last of all. A mark with no number behind it is no
  answer. Numbers are compared exactly: 1,000 = 1000.0 and 1/2 = 0.50; currency and percent signs do not count.

  Raises:
    UserError: a record without `meta['final']`, or not a number.
  """
  return [float(_final(response) == _wanted(record)) for response, record in zip(responses, records, strict=True)]


def verified(prompts, responses, records) -> list[float]:
  r"""1.0 where `math-verify` finds the answer equal to `meta['final']`, which may be any TeX expression; else 0.0.

  The library looks for the answer on the line of the last '####' if there is one, else in the whole response, where
  it prefers \boxed{…}. What it cannot parse or compare is 0. Its own alarms are off: they would disturb the worker
  process, whose time limit is the only one (an answer such as 9^9^9^9 runs into it).

  Raises:
    UserError: no math-verify, or a record without `meta['final']` or with one that does not parse.
  """
  try:
    import math_verify
  except ImportError:
    raise UserError('programs.math:verified: math-verify is not installed, run: pip install rlhf_jax[math]') from None
  logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns that its alarms are off
  values = []
  for response, record in zip(responses, records, strict=True):
    gold = math_verify.parse(rf'\boxed{{{_said(record)}}}', parsing_timeout=None, fallback_mode='no_fallback')
    if not gold:
      raise UserError(f'record {record.id}: meta "final": math-verify cannot read {_said(record)!r:.60}')
    answer = math_verify.parse(_after_mark(response) if '####' in response else response, parsing_timeout=None)
    values.append(float(math_verify.verify(gold, answer, timeout_seconds=None)))
  return values


def _final(response):
  """The number a response ends in, None if there is none."""
  if '####' in response:
    numbers = _numbers(_after_mark(response))
  elif r'\boxed{' in response:
    numbers = _numbers(_boxed(response))
  else:
    numbers = _numbers(response)[-1:]
  return _value(*numbers[0]) if numbers else None


def _after_mark(response):
  """The first line with something on it behind the last '####'."""
  return response.rpartition('####')[2].strip().partition('\n')[0]


def _boxed(response):
  r"""What the last \boxed{…} holds; a box never closed holds all that follows."""
  text, depth = response.rpartition(r'\boxed{')[2], 1
  for place, letter in enumerate(text):
    depth += (letter == '{') - (letter == '}')
    if not depth:
      return text[:place]
  return text


def _numbers(text):
  """All numbers of a text, as pairs of texts: numerator, denominator or ''."""
  for pattern, replacement in _REWRITES:
    text = re.sub(pattern, replacement, text)
  return _NUMBER.findall(text)


def _value(numerator, denominator):
  """A pair of texts as a Fraction; None over zero, and where Python takes it for too long to read."""
  try:
    return Fraction(numerator.replace(',', '')) / Fraction(denominator or 1)
  except (ValueError, ZeroDivisionError):
    return None


def _said(record):
  final = record.meta.get('final')
  if final is None:
    raise UserError(f'record {record.id}: meta lacks "final", the right answer')
  return str(final)


def _wanted(record):
  numbers = _numbers(_said(record))
  wanted = _value(*numbers[0]) if len(numbers) == 1 else None
  if wanted is None:
    raise UserError(f'record {record.id}: meta "final": expected a number, got {_said(record)!r:.60}')
  return wanted
