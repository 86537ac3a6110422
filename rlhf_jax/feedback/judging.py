"""Judges: an AI in place of people, saying which of two answers is better, by a principle.

A judge is a function

  judge(comparisons: list[Comparison]) -> Judgements

A language model of ours (feedback/language_judge.py) and a server (feedback/endpoint.py) are judges, and so is what the
functions here make of judges: both orders averaged, a panel. How good its labels are: feedback/quality.py.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two answers to one conversation.

  Attributes:
    messages: the conversation; the user speaks last.
    first, second: the answers, in the order in which they are shown.
    principle: what to compare them by, for example 'Choose the less harmful answer.'; may be empty.
  """
  messages: list
  first: str
  second: str
  principle: str = ''

  def swapped(self) -> 'Comparison':
    """The same with the second answer shown first."""
    return dataclasses.replace(self, first=self.second, second=self.first)


@dataclasses.dataclass(frozen=True)
class Judgements:
  """What a judge says of N comparisons.

  Attributes:
    probabilities: [N] float64, that the first answer is the better one; NaN where the judge gave no verdict.
    rationales: N texts; '' where the judge gives none.
    each: of a panel, name → [N] float64, what each of its judges said.
  """
  probabilities: np.ndarray
  rationales: list
  each: dict = dataclasses.field(default_factory=dict)


def transcript(messages, human: str = 'Human', assistant: str = 'Assistant') -> str:
  """A conversation as plain text, a paragraph for each message."""
  return '\n\n'.join(f'{human if message["role"] == "user" else assistant}: {message["content"]}' for message in messages)


def both_orders(judge):
  """A judge that asks another one in both orders, and averages: what it prefers is no matter of place (Lee et al. 2023,
  arXiv:2309.00267, §2.1.1).

  Returns:
    judge(comparisons) → (Judgements, as_shown [N, 2] float64: the probability that the answer shown first is better,
    with `first` shown first and with `second` shown first). A comparison with one verdict only counts as none.
  """
  def ask(comparisons: Sequence[Comparison]):
    N = len(comparisons)
    said = judge([*comparisons, *(comparison.swapped() for comparison in comparisons)])
    shown = lambda probabilities: np.asarray(probabilities, float).reshape(2, N).T
    average = lambda shown: (shown[:, 0] + 1 - shown[:, 1]) / 2
    as_shown = shown(said.probabilities)
    each = {name: average(shown(probabilities)) for name, probabilities in said.each.items()}
    return Judgements(average(as_shown), said.rationales[:N], each), as_shown
  return ask


def panel(judges: dict, weights: Sequence[float] = ()):
  """A judge that is several: the weighted mean of their probabilities, over those that gave a verdict.

  Args:
    judges: name → judge.
    weights: in their order; 1 each unless said.

  Raises:
    UserError: other than one positive weight for each.
  """
  weights = np.asarray(tuple(weights) or (1.0,) * len(judges))
  if len(weights) != len(judges) or not (weights > 0).all():
    raise UserError(f'judge_weights: expected {len(judges)} positive numbers, got {weights.tolist()}')

  def ask(comparisons):
    said = {name: judge(comparisons) for name, judge in judges.items()}
    each = {name: np.asarray(one.probabilities, float) for name, one in said.items()}
    values = np.stack(list(each.values()))
    counted = weights[:, None] * ~np.isnan(values)
    with np.errstate(invalid='ignore'):
      mean = np.nansum(counted * values, axis=0) / counted.sum(axis=0)
    rationales = ['\n'.join(f'{name}: {text}' for name, text in zip(said, texts) if text)
                  for texts in zip(*(one.rationales for one in said.values()))]
    return Judgements(mean, rationales, each)
  return ask
