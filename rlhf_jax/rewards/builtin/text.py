"""Rewards that look at a response's text alone: sentiment, length, a pattern, repetition.

Each is easily won by a text that nobody wants (one happy word, the right number of any words): they are for
experiments, and for use beside a reward that judges content. Left out: VADER's boosters, capitals, exclamation marks.
"""

import functools
import gzip
import json
import math
import re
import string
import zlib

from rlhf_jax.errors import UserError

_EDGES = string.punctuation + '“”‘’«»…—–'
_NEGATIONS = {'not', 'no', 'never', 'none', 'nobody', 'nothing', 'nowhere', 'neither', 'nor', 'cannot', 'without',
              'hardly', 'rarely', 'seldom'}


def sentiment(prompts, responses, records, *, path) -> list[float]:
  """Mean valence of the words that a lexicon knows; 0.0 where it knows none.

    s(y) = 1/|H| Σ_{i ∈ H} n_i v(w_i),   H = the words of y in the lexicon, n_i = −1 if a negation is among the three
                                         words before, else 1

  A simplification of VADER (Hutto & Gilbert 2014, ICWSM; v in −4..4). Words are parted by spaces and looked up in
  lower case, first as they stand (emoticons), then without the punctuation around them. Negations have no valence.

  Args:
    path: JSONL (.gz by its name) with `token` and `valence`.

  Raises:
    UserError: names file and line.
  """
  lexicon = _lexicon(str(path))
  return [_mean_valence(response, lexicon) for response in responses]


def length(prompts, responses, records, *, least=0, most=math.inf, unit='words') -> list[float]:
  """1.0 where least ≤ n ≤ most; below it n/least, above it 2 − n/most but at least 0 (reached at twice `most`).

  Args:
    unit: what n counts: 'words' (parted by spaces) or 'characters'.

  Raises:
    UserError: the bounds are no range, or another unit.
  """
  if unit not in ('words', 'characters'):
    raise UserError(f'length: unit: expected words or characters, got {unit!r}')
  if not (0 <= least <= most and most > 0):
    raise UserError(f'length: expected 0 ≤ least ≤ most and most > 0, got least={least} and most={most}')
  counts = [len(response.split() if unit == 'words' else response) for response in responses]
  return [count / least if count < least else min(1.0, max(0.0, 2 - count / most)) for count in counts]


def matches(prompts, responses, records, *, pattern) -> list[float]:
  """1.0 where a regular expression (Python's; '(?s)' lets '.' match newlines) matches the whole response, else 0.0.

  Raises:
    UserError: not a regular expression.
  """
  try:
    compiled = re.compile(pattern)
  except (TypeError, re.error) as error:
    raise UserError(f'matches: pattern {pattern!r:.60}: {error}') from None
  return [float(compiled.fullmatch(response) is not None) for response in responses]


def not_repeated(prompts, responses, records, *, n=3) -> list[float]:
  """Distinct n-grams of words over all n-grams: 1 − seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319).

  Words are parted by spaces, in lower case. A response of fewer than `n` words is one n-gram; an empty one gets 0.0.

  Raises:
    UserError: `n` is not a positive whole number.
  """
  if type(n) is not int or n < 1:
    raise UserError(f'not_repeated: n: expected a positive whole number, got {n!r}')
  values = []
  for response in responses:
    words = response.lower().split()
    grams = [tuple(words[begin:begin + n]) for begin in range(max(1, len(words) - n + 1))]
    values.append(len(set(grams)) / len(grams) if words else 0.0)
  return values


def _mean_valence(response, lexicon):
  words, valences = response.lower().replace('’', "'").split(), []
  bare = [word.strip(_EDGES) for word in words]
  negates = [word in _NEGATIONS or word.endswith("n't") for word in bare]
  for place, word in enumerate(words):
    valence = lexicon.get(word, lexicon.get(bare[place]))
    if valence is not None and not negates[place]:
      valences.append(-valence if any(negates[max(0, place - 3):place]) else valence)
  return sum(valences) / len(valences) if valences else 0.0


@functools.lru_cache(maxsize=4)
def _lexicon(path):
  """Token in lower case → valence."""
  valences, number = {}, 0
  try:
    with (gzip.open if path.endswith('.gz') else open)(path, 'rt', encoding='utf-8') as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          entry = json.loads(line)
          valences[entry['token'].lower()] = float(entry['valence'])
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'sentiment: {path}: cannot read: {error}') from None
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'sentiment: {path}:{number}: expected "token" and "valence": {error!r:.80}') from None
  return valences
