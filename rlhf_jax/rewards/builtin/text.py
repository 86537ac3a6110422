"""Rewards that look at a response's text alone: sentiment, length, pattern, repetition.

A policy can easily exploit each of them (with one happy word, or the right number
of arbitrary words). They are meant for experiments, and for use together with a
reward that judges the content. Left out: VADER's boosters, capitals and
exclamation marks.
"""

from collections.abc import Mapping, Sequence
import functools
import math
import re
import string
from typing import Any

from rlhf_jax import json_lines
from rlhf_jax.errors import UserError

_PUNCTUATION = string.punctuation + '“”‘’«»…—–'  # removed around words
_NEGATIONS = frozenset(
  'not no never none nobody nothing nowhere neither nor cannot without hardly rarely seldom'.split()
)
_NEGATION_REACH = 3  # a negation within so many words before a word reverses its valence


def sentiment(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
  *,
  path: str,
) -> list[float]:
  """Computes the mean valence of the words that a lexicon knows.

    s(y) = 1/|H| Σ_{i ∈ H} n_i v(w_i)

  H are the words of y that are in the lexicon; v is a word's valence, and n_i =
  −1 if one of the three words before it is a negation, else 1. This is a
  simplification of VADER (Hutto & Gilbert 2014, ICWSM; v from −4 to 4). Words are
  separated by spaces and looked up in lower case, first as they are (for
  emoticons), then without surrounding punctuation. Negations have no valence of
  their own.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    path: a lexicon, a JSONL file (compressed if its name ends in .gz) with `token` and
      `valence` in each line.

  Returns:
    N means; 0.0 where the lexicon knows no word.

  Raises:
    UserError: the lexicon cannot be read; the message names file and line.
  """
  lexicon = _read_lexicon(str(path))
  return [_mean_valence(response, lexicon) for response in responses]


def length(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
  *,
  least: float = 0,
  most: float = math.inf,
  unit: str = 'words',
) -> list[float]:
  """Rewards responses whose length n is between two bounds.

    r(y) = 1                    where least ≤ n ≤ most
           n / least            where n < least
           max(0, 2 − n / most) where n > most, which is 0 from twice `most` on

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    least: the lower bound.
    most: the upper bound.
    unit: what n counts, 'words' (separated by spaces) or 'characters'.

  Returns:
    N rewards from 0 to 1.

  Raises:
    UserError: the bounds are not 0 ≤ least ≤ most, or there is no such unit.
  """
  if unit not in ('words', 'characters'):
    raise UserError(f'length: unit: expected words or characters, got {unit!r}')
  if not (0 <= least <= most and most > 0):
    raise UserError(
      f'length: expected 0 ≤ least ≤ most and most > 0, got least={least} and most={most}'
    )
  values = []
  for response in responses:
    count = len(response.split()) if unit == 'words' else len(response)
    if count < least:
      values.append(count / least)
    else:
      values.append(min(1.0, max(0.0, 2 - count / most)))
  return values


def matches(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
  *,
  pattern: str,
) -> list[float]:
  """Gives 1.0 where a regular expression matches the whole response, else 0.0.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    pattern: a regular expression in Python's syntax; '(?s)' lets '.' match newlines.

  Returns:
    N values, 1.0 or 0.0.

  Raises:
    UserError: the pattern is not a valid regular expression.
  """
  try:
    compiled = re.compile(pattern)
  except (TypeError, re.error) as error:
    raise UserError(f'matches: pattern {pattern!r:.60}: {error}') from None
  return [float(compiled.fullmatch(response) is not None) for response in responses]


def not_repeated(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
  *,
  n: int = 3,
) -> list[float]:
  """Computes the share of distinct n-grams among all n-grams of words.

  This is 1 − seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319). Words are
  separated by spaces and compared in lower case. A response of fewer than `n`
  words counts as one n-gram.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    n: words in an n-gram.

  Returns:
    N shares from 0 to 1; 0.0 for an empty response.

  Raises:
    UserError: `n` is not a positive whole number.
  """
  if type(n) is not int or n < 1:  # isinstance would accept True
    raise UserError(f'not_repeated: n: expected a positive whole number, got {n!r}')
  values = []
  for response in responses:
    words = response.lower().split()
    if not words:
      values.append(0.0)
      continue
    count = max(1, len(words) - n + 1)
    grams = [tuple(words[begin : begin + n]) for begin in range(count)]
    values.append(len(set(grams)) / len(grams))
  return values


def _mean_valence(response: str, lexicon: Mapping[str, float]) -> float:
  """Returns s(y) of `sentiment`."""
  words = response.lower().replace('’', "'").split()
  bare_words = [word.strip(_PUNCTUATION) for word in words]
  is_negation = [_is_negation(word) for word in bare_words]
  valences = []
  for index, word in enumerate(words):
    valence = lexicon.get(word)
    if valence is None:
      valence = lexicon.get(bare_words[index])
    if valence is None or is_negation[index]:
      continue
    before = is_negation[max(0, index - _NEGATION_REACH) : index]
    valences.append(-valence if any(before) else valence)
  if not valences:
    return 0.0
  return sum(valences) / len(valences)


def _is_negation(word: str) -> bool:
  return word in _NEGATIONS or word.endswith("n't")


@functools.lru_cache(maxsize=4)  # as a worker process is called many times
def _read_lexicon(path: str) -> dict[str, float]:
  """Reads a lexicon: token in lower case → valence."""
  valences = {}
  for place, entry in json_lines.read_values(path):
    try:
      valences[entry['token'].lower()] = float(entry['valence'])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UserError(
        f'sentiment: {place}: expected "token" and "valence": {error!r:.80}'
      ) from None
  return valences
