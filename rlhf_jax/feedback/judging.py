"""Judges: an AI in place of people that says which of two responses is better.

A judge is a function

  judge(comparisons: list[Comparison]) -> Judgements

Language models (language_judge.py), servers (endpoint.py) and Python functions
(function_judge.py) are judges, and so is what the functions here make of judges:
one that averages both orders, a panel. judges.py lists the kinds; quality.py
measures how good a judge's labels are.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from rlhf_jax.data import conversations
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two responses to one conversation.

  Attributes:
    messages: the conversation; the user speaks last.
    first: the response that is shown first.
    second: the response that is shown second.
    principle: what to compare them by, such as 'Choose the less harmful answer.';
      may be empty.
  """

  messages: list[dict]
  first: str
  second: str
  principle: str = ''

  def swapped(self) -> 'Comparison':
    """Returns the same comparison with the second response shown first."""
    return dataclasses.replace(self, first=self.second, second=self.first)


@dataclasses.dataclass(frozen=True)
class Judgements:
  """What a judge says of N comparisons.

  Attributes:
    probabilities: [N] float64, that the first response is the better one; NaN where
      the judge gave no verdict.
    rationales: N texts; '' where the judge gives none.
    each: of a panel, name → [N] float64, the probabilities of each of its judges.
  """

  probabilities: np.ndarray
  rationales: list[str]
  each: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


Judge = Callable[[Sequence[Comparison]], Judgements]
# Also returns `as_shown`, the probabilities in each of the two orders, [N, 2] float64.
JudgeOfBothOrders = Callable[[Sequence[Comparison]], tuple[Judgements, np.ndarray]]


def format_transcript(
  messages: Sequence[conversations.Message],
  human: str = 'Human',
  assistant: str = 'Assistant',
) -> str:
  """Formats a conversation as plain text, a paragraph for each message."""
  speakers = {'user': human, 'assistant': assistant}
  paragraphs = []
  for message in messages:
    role = message['role']
    speaker = speakers.get(role, role.capitalize())  # 'System', 'Tool'
    paragraphs.append(f'{speaker}: {conversations.message_text(message)}')
  return '\n\n'.join(paragraphs)


def fill_template(template: str, comparison: Comparison) -> str:
  """Fills in a judge's question.

  Args:
    template: a text with any of {conversation}, {question} (its last message),
      {principle}, {first} and {second}.
    comparison: what is asked about.

  Raises:
    LookupError, ValueError: the template is no format string of these fields.
  """
  return template.format(
    conversation=format_transcript(comparison.messages),
    question=comparison.messages[-1]['content'],
    principle=comparison.principle,
    first=comparison.first,
    second=comparison.second,
  )


def ask_both_orders(judge: Judge) -> JudgeOfBothOrders:
  """Builds a judge that asks another one in both orders and averages.

  What it prefers does not depend on which response is shown first (Lee et al. 2023,
  arXiv:2309.00267, §2.1.1).

  Returns:
    judge(comparisons) → (judgements, as_shown). as_shown: [N, 2] float64, the
    probability that the response shown first is better, with `first` shown first
    and with `second` shown first. A comparison with a verdict in one order only
    counts as one without a verdict.
  """

  def judge_both_orders(
    comparisons: Sequence[Comparison],
  ) -> tuple[Judgements, np.ndarray]:
    swapped = [comparison.swapped() for comparison in comparisons]
    judgements = judge([*comparisons, *swapped])
    as_shown = _split_orders(judgements.probabilities)
    each = {}
    for name, probabilities in judgements.each.items():
      each[name] = _average_orders(_split_orders(probabilities))
    # The rationales of the swapped order name the responses the other way round.
    rationales = judgements.rationales[: len(comparisons)]
    averaged = Judgements(_average_orders(as_shown), rationales, each)
    return averaged, as_shown

  return judge_both_orders


def _split_orders(probabilities: np.ndarray) -> np.ndarray:
  """Lays the [2N] probabilities of both orders side by side: [N, 2] float64."""
  return np.asarray(probabilities, float).reshape(2, -1).T


def _average_orders(as_shown: np.ndarray) -> np.ndarray:
  """Returns P(`first` is better) [N]; NaN where either order has no verdict."""
  return (as_shown[:, 0] + 1 - as_shown[:, 1]) / 2


def build_panel(judges: Mapping[str, Judge], weights: Sequence[float] = ()) -> Judge:
  """Builds a judge that is several: the weighted mean of their probabilities.

  The mean is over the judges that gave a verdict.

  Args:
    judges: name → judge.
    weights: of the judges, in their order; empty for 1 each.

  Raises:
    UserError: there is not one positive weight for each judge.
  """
  weight_array = np.asarray(tuple(weights) or (1.0,) * len(judges))
  if len(weight_array) != len(judges) or not (weight_array > 0).all():
    raise UserError(
      f'judge_weights: expected {len(judges)} positive numbers, got {weight_array.tolist()}'
    )

  def ask_panel(comparisons: Sequence[Comparison]) -> Judgements:
    judgements = {name: judge(comparisons) for name, judge in judges.items()}
    each = {}
    for name, single in judgements.items():
      each[name] = np.asarray(single.probabilities, float)
    values = np.stack(list(each.values()))  # [judges, N]
    used_weights = weight_array[:, None] * ~np.isnan(values)
    with np.errstate(invalid='ignore'):  # 0 / 0 is NaN: nobody gave a verdict
      mean = np.nansum(used_weights * values, axis=0) / used_weights.sum(axis=0)
    return Judgements(mean, _join_rationales(judgements), each)

  return ask_panel


def _join_rationales(judgements: Mapping[str, Judgements]) -> list[str]:
  """Joins the rationales of a panel, a line 'name: text' for each that has one."""
  joined = []
  for texts in zip(*(single.rationales for single in judgements.values()), strict=True):
    named = zip(judgements, texts, strict=True)
    joined.append('\n'.join(f'{name}: {text}' for name, text in named if text))
  return joined
