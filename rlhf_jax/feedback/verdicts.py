"""Reads a judge's verdict from what a chat model replied.

With log-probabilities the verdict is soft,

  P(A) / (P(A) + P(B))

of the token with which the reply states its option, over the most probable tokens.
Without them it is read from the text: 1, 0, or 0.5 for a tie. A reply that states
no clear verdict has none, rather than a guess.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

_END_OF_THOUGHT = '</think>'  # reasoning models write what they think before it
_GAP = r'(?:[^\w\n]|_)*'  # spaces, brackets and marks within one line
_SO = rf'(?:(?:so|thus|therefore|hence|overall)\b{_GAP})?'
_ARTICLE = r'(?:(?:the|my)\s+)?'
_ADJECTIVE = r'(?:(?:final|correct|better|best)\s+)?'
_NOUN = r'(?:answer|verdict|choice|option|response|boxed)\b'
_LEAD = rf'(?:{_SO}{_ARTICLE}{_ADJECTIVE}(?:{_NOUN}{_GAP}(?:is\b{_GAP})?){{0,2}})'
_TIE = r'(?i:(?:a\s+)?tie)'


@dataclasses.dataclass(frozen=True)
class Patterns:
  """Regular expressions of verdicts; their group 'option' holds the option."""

  options: tuple[str, str]  # for the first and the second response
  line: re.Pattern[str]  # a line that is a verdict and nothing else
  beginning: re.Pattern[str]  # a reply that begins with an option


def compile_patterns(options: Sequence[str]) -> Patterns:
  """Compiles the patterns of two options, such as 'A' and 'B'."""
  first, second = options
  option = rf'(?P<option>{first}|{second})'
  word_ends = r'(?![^\W_])'
  is_better = rf'(?i:is\s+better\b{_GAP})?'
  lead = rf'(?i:{_LEAD})'
  line = rf'^{_GAP}{lead}(?:{option}|{_TIE}){word_ends}{_GAP}{is_better}$'
  # 'A better answer …' begins with an article, not with the option A.
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
    tokens: for each of its tokens {'token', 'logprob', 'top_logprobs'}, as the
      OpenAI protocol has them; empty where the server gives none.
    patterns: of `compile_patterns`.
    thought: whether the reply reasons first. Then its last verdict counts;
      otherwise all verdicts of a reply must agree.

  Returns:
    The probability that the first response is better (None = no verdict), and
    whether it was read by 'logprobs' or 'text'.
  """
  begin = 0
  if _END_OF_THOUGHT in text:
    begin = text.rfind(_END_OF_THOUGHT) + len(_END_OF_THOUGHT)
  verdict = text[begin:]
  lines = list(patterns.line.finditer(verdict))
  stated = [match['option'] or 'tie' for match in lines]
  is_clear = bool(lines) and (thought or len(set(stated)) == 1)

  statement = None  # the match whose option is looked for among the tokens
  if not thought:
    statement = patterns.beginning.match(verdict)
  elif is_clear:
    statement = lines[-1]
  if tokens and statement is not None and statement['option']:
    place = begin + statement.start('option')
    probability = _token_probability(tokens, statement['option'], place, patterns)
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
  place: int,
  patterns: Patterns,
) -> float | None:
  """Returns P(first) / (P(first) + P(second)) of the token that states an option.

  Args:
    tokens: as in `read_verdict`.
    option: the option that was stated.
    place: the character of the reply at which it was stated.
    patterns: its options are compared.

  Returns:
    None where no token is the option.
  """
  lengths = [len(entry['token']) for entry in tokens]
  starts = np.cumsum([0, *lengths])  # the character at which each token begins
  candidates = []
  for number, entry in enumerate(tokens):
    if _bare(entry['token']) == option:
      candidates.append(number)
  if not candidates:
    return None
  # Texts are stripped and tokens are not, so places agree only roughly.
  nearest = min(candidates, key=lambda number: abs(starts[number] - place))
  entry = tokens[nearest]
  logprobs = {}
  for item in [entry, *(entry.get('top_logprobs') or [])]:
    logprobs[item['token']] = item['logprob']
  first, second = (_option_mass(logprobs, name) for name in patterns.options)
  return first / (first + second)


def _option_mass(logprobs: Mapping[str, float], option: str) -> float:
  """Adds up the probabilities of all tokens that mean an option: 'A', ' A', '(A'."""
  matching = [value for token, value in logprobs.items() if _bare(token) == option]
  return math.fsum(math.exp(value) for value in matching)


def _bare(token: str) -> str:
  """Returns a token without the signs around it."""
  return re.sub(r'^[\W_]+|[\W_]+$', '', token)
