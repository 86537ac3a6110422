"""The interface of judges, which say in place of people which of two responses is better.

A judge is a function

  judge(comparisons: list[Comparison]) -> Judgements

It may be a language model (language_judge.py), a server (endpoint.py) or a
Python function (function_judge.py). The functions here combine judges: one
judge asked in both orders, or a panel of several. judges.py registers the
kinds; quality.py measures how good a judge's labels are.
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
    messages: the conversation; the last message is the user's.
    first: the response that is shown first.
    second: the response that is shown second.
    principle: what to compare them by, such as 'Choose the less harmful
      answer.'; may be empty.
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
  """The verdicts of a judge on N comparisons.

  Attributes:
    probabilities: [N] float64, the probability that the first response is the
      better one; NaN where the judge gave no verdict.
    rationales: N texts, the reasons; '' where the judge gives none.
    each: for a panel, the probabilities of each of its judges: name → [N]
      float64.
  """

  probabilities: np.ndarray
  rationales: list[str]
  each: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


Judge = Callable[[Sequence[Comparison]], Judgements]
# Also returns the probabilities in each of the two orders, see `ask_both_orders`.
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
  """Fills in the template of a judge's question.

  Args:
    template: a format string with any of {conversation}, {question} (the last
      message of the conversation), {principle}, {first} and {second}.
    comparison: what is asked about.

  Raises:
    LookupError, ValueError: the template has other fields, or is not a format
      string.
  """
  return template.format(
    conversation=format_transcript(comparison.messages),
    question=comparison.messages[-1]['content'],
    principle=comparison.principle,
    first=comparison.first,
    second=comparison.second,
  )


def ask_both_orders(judge: Judge) -> JudgeOfBothOrders:
  """Builds a judge that shows each pair of responses in both orders and averages the verdicts.

  This removes position bias: the result does not depend on which response is
  shown first (Lee et al. 2023, arXiv:2309.00267, §2.1.1).

  Args:
    judge: the judge that is asked.

  Returns:
    judge(comparisons) → (judgements, as_shown). as_shown is [N, 2] float64, the
    probability that the response shown first is better: in column 0 `first` was
    shown first, in column 1 `second`. The averaged probability is NaN where one
    of the two orders has no verdict.
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
    # Those of the swapped order call the first response the second one.
    rationales = judgements.rationales[: len(comparisons)]
    averaged = Judgements(_average_orders(as_shown), rationales, each)
    return averaged, as_shown

  return judge_both_orders


def _split_orders(probabilities: np.ndarray) -> np.ndarray:
  """Returns the [2N] probabilities of both orders as two columns, [N, 2] float64."""
  return np.asarray(probabilities, float).reshape(2, -1).T


def _average_orders(as_shown: np.ndarray) -> np.ndarray:
  """Returns P(`first` is better), [N] float64; NaN where one of the orders has no verdict."""
  return (as_shown[:, 0] + 1 - as_shown[:, 1]) / 2


def build_panel(judges: Mapping[str, Judge], weights: Sequence[float] = ()) -> Judge:
  """Builds a judge that averages the probabilities of several judges.

  It is a weighted mean, over those judges that gave a verdict.

  Args:
    judges: name → judge.
    weights: one for each judge, in the same order; empty = equal weights.

  Raises:
    UserError: the number of weights is not that of the judges, or one is not
      positive.
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
    with np.errstate(invalid='ignore'):  # 0 / 0 = NaN where no judge gave a verdict
      mean = np.nansum(used_weights * values, axis=0) / used_weights.sum(axis=0)
    return Judgements(mean, _join_rationales(judgements), each)

  return ask_panel


def _join_rationales(judgements: Mapping[str, Judgements]) -> list[str]:
  """Joins the rationales of a panel: for each comparison a line 'name: text' per judge."""
  joined = []
  for texts in zip(*(single.rationales for single in judgements.values()), strict=True):
    named = zip(judgements, texts, strict=True)
    joined.append('\n'.join(f'{name}: {text}' for name, text in named if text))
  return joined
