"""Reads a judge's verdict from the reply of a chat model.

With log-probabilities the verdict is a probability,

  P(A) / (P(A) + P(B))

at the token that states the chosen option; the sums run over the most probable
tokens that the server lists. Without log-probabilities it is read from the
text: 1, 0, or 0.5 for a tie. A reply without a clear verdict counts as no
verdict; nothing is guessed.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

_END_OF_THOUGHT = '</think>'  # reasoning models write their reasoning before it
_GAP = r'(?:[^\w\n]|_)*'  # spaces, brackets and punctuation within one line
_SO = rf'(?:(?:so|thus|therefore|hence|overall)\b{_GAP})?'
_ARTICLE = r'(?:(?:the|my)\s+)?'
_ADJECTIVE = r'(?:(?:final|correct|better|best)\s+)?'
_NOUN = r'(?:answer|verdict|choice|option|response|boxed)\b'
_LEAD = rf'(?:{_SO}{_ARTICLE}{_ADJECTIVE}(?:{_NOUN}{_GAP}(?:is\b{_GAP})?){{0,2}})'
_TIE = r'(?i:(?:a\s+)?tie)'


@dataclasses.dataclass(frozen=True)
class Patterns:
  """Regular expressions that find verdicts; their group 'option' is the chosen option."""

  options: tuple[str, str]  # for the first and the second response
  line: re.Pattern[str]  # a line that states a verdict and nothing else
  beginning: re.Pattern[str]  # a reply that begins with an option


def compile_patterns(options: Sequence[str]) -> Patterns:
  """Compiles the patterns of two options, such as 'A' and 'B'."""
  first, second = options
  option = rf'(?P<option>{first}|{second})'
  word_ends = r'(?![^\W_])'
  is_better = rf'(?i:is\s+better\b{_GAP})?'
  lead = rf'(?i:{_LEAD})'
  line = rf'^{_GAP}{lead}(?:{option}|{_TIE}){word_ends}{_GAP}{is_better}$'
  # In 'A better answer …' the A is an article, not the option.
  prose = rf'{_GAP}(?<=\s)(?!because\b|since\b|is better\b)[a-z]'
  beginning = rf"[\W_]*{lead}{option}(?![^\W_]|')(?!{prose})"
  return Patterns(
    options=(first, second),
    line=re.compile(line, re.MULTILINE),
    beginning=re.compile(beginning),
  )


def read_verdict(
  text: str,
  tokens: Sequence[Mapping[str, Any]],
  patterns: Patterns,
  thought: bool,
) -> tuple[float | None, str]:
  """Reads a verdict from a reply.

  Args:
    text: the reply.
    tokens: for each of its tokens a dict with 'token', 'logprob' and
      'top_logprobs', as in the OpenAI protocol; empty where the server returns
      none.
    patterns: from `compile_patterns`.
    thought: whether the reply reasons before its verdict. If so, its last
      verdict counts; otherwise all verdicts in a reply must agree.

  Returns:
    (the probability that the first response is better, None = no verdict;
    whether it was read from 'logprobs' or 'text').
  """
  begin = 0
  if _END_OF_THOUGHT in text:
    begin = text.rfind(_END_OF_THOUGHT) + len(_END_OF_THOUGHT)
  verdict = text[begin:]
  lines = list(patterns.line.finditer(verdict))
  stated = [match['option'] or 'tie' for match in lines]
  is_clear = bool(lines) and (thought or len(set(stated)) == 1)

  statement = None  # the match whose option is looked up among the tokens
  if not thought:
    statement = patterns.beginning.match(verdict)
  elif is_clear:
    statement = lines[-1]
  if tokens and statement is not None and statement['option']:
    offset = begin + statement.start('option')
    probability = _token_probability(tokens, statement['option'], offset, patterns)
    if probability is not None:
      return probability, 'logprobs'

  if not is_clear:
    return None, 'text'
  first, second = patterns.options
  values = {first: 1.0, second: 0.0, 'tie': 0.5}
  return values[stated[-1]], 'text'


def _token_probability(
  tokens: Sequence[Mapping[str, Any]],
  option: str,
  offset: int,
  patterns: Patterns,
) -> float | None:
  """Computes P(first) / (P(first) + P(second)) at the token that states an option.

  Args:
    tokens: as in `read_verdict`.
    option: the option that the reply states.
    offset: the character of the reply at which it is stated.
    patterns: names the two options.

  Returns:
    The probability; None where no token is the option.
  """
  lengths = [len(entry['token']) for entry in tokens]
  starts = np.cumsum([0, *lengths])  # the character at which each token begins
  candidates = []
  for number, entry in enumerate(tokens):
    if _strip_punctuation(entry['token']) == option:
      candidates.append(number)
  if not candidates:
    return None
  # The text was stripped and the tokens were not, so offsets agree only roughly.
  nearest = min(candidates, key=lambda number: abs(starts[number] - offset))
  entry = tokens[nearest]
  logprobs = {}
  for item in [entry, *(entry.get('top_logprobs') or [])]:
    logprobs[item['token']] = item['logprob']
  first, second = (_option_mass(logprobs, name) for name in patterns.options)
  return first / (first + second)


def _option_mass(logprobs: Mapping[str, float], option: str) -> float:
  """Adds up the probabilities of all tokens that state an option, such as 'A', ' A' and '(A'."""
  matching = [value for token, value in logprobs.items() if _strip_punctuation(token) == option]
  return math.fsum(math.exp(value) for value in matching)


def _strip_punctuation(token: str) -> str:
  """Returns a token without the spaces and punctuation around it."""
  return re.sub(r'^[\W_]+|[\W_]+$', '', token)
