"""Rewards that look at a response's text alone: sentiment, length, pattern, repetition.

Each is easily won by a text that nobody wants (one happy word, the right number of
any words): they are for experiments, and for use beside a reward that judges
content. Left out: VADER's boosters, capitals and exclamation marks.
"""

from collections.abc import Mapping, Sequence
import functools
import math
import re
import string
from typing import Any

from rlhf_jax import json_lines
from rlhf_jax.errors import UserError

_EDGES = string.punctuation + '“”‘’«»…—–'  # removed around words
_NEGATIONS = frozenset(
  'not no never none nobody nothing nowhere neither nor cannot without hardly rarely seldom'.split()
)
_NEGATION_REACH = 3  # words before a word in which a negation turns its valence


def sentiment(
  prompts: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
  *,
  path: str,
) -> list[float]:
  """Computes the mean valence of the words that a lexicon knows.

    s(y) = 1/|H| Σ_{i ∈ H} n_i v(w_i)

  H are the words of y in the lexicon; n_i = −1 if a negation is among the three
  words before, else 1. This simplifies VADER (Hutto & Gilbert 2014, ICWSM; v in
  −4..4). Words are separated by spaces and looked up in lower case, first as they
  stand (emoticons), then without the punctuation around them. Negations have no
  valence.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    path: a lexicon, JSONL (.gz by its name) with `token` and `valence`.

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

    r(y) = 1 where least ≤ n ≤ most;  n/least below;  max(0, 2 − n/most) above

  so that 0 is reached at twice `most`.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    least: the lower bound.
    most: the upper bound.
    unit: what n counts, 'words' (separated by spaces) or 'characters'.

  Raises:
    UserError: the bounds are no range, or the unit is another one.
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
    pattern: in Python's syntax; '(?s)' lets '.' match newlines.

  Raises:
    UserError: the pattern is no regular expression.
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
  separated by spaces, in lower case. A response of fewer than `n` words is one
  n-gram.

  Args:
    prompts: not used.
    responses: N texts.
    records: not used.
    n: words in an n-gram.

  Returns:
    N shares in 0..1; 0.0 for an empty response.

  Raises:
    UserError: `n` is not a positive whole number.
  """
  if type(n) is not int or n < 1:  # True is an int too
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
  bare_words = [word.strip(_EDGES) for word in words]
  is_negation = [_is_negation(word) for word in bare_words]
  valences = []
  for place, word in enumerate(words):
    valence = lexicon.get(word)
    if valence is None:
      valence = lexicon.get(bare_words[place])
    if valence is None or is_negation[place]:
      continue
    before = is_negation[max(0, place - _NEGATION_REACH) : place]
    valences.append(-valence if any(before) else valence)
  if not valences:
    return 0.0
  return sum(valences) / len(valences)


def _is_negation(word: str) -> bool:
  return word in _NEGATIONS or word.endswith("n't")


@functools.lru_cache(maxsize=4)  # a worker process scores many parts
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
