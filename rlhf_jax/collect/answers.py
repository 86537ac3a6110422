"""Parsing of answers from the fields of a form; pure functions, without a database.

On a page the responses have letters, in the order in which they are shown: A,
B, C and so on. `shown` maps places on the page to the item: the response at
place d is number shown[d] of the item. Answers refer to responses by their
number in the item only.

An answer to `rank`, and to each turn of `converse`:
  {'orders': {axis: [K] ranks, 1 = best, equal ranks = tie, without gaps},
   'mode': full, top or best_worst,
   'all_bad': bool, 'strength': '' or slight, clear, strong,
   'flags': {number of a response: [flags]}, 'reason': text}
An answer to `demonstrate` and `edit`: {'response': text}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.collect.refusals import Refused
from rlhf_jax.collect.settings import Settings

Form = Mapping[str, Sequence[str]]  # name of a field → its values

LETTERS = 'ABCDEFGHI'
MODES = ('full', 'top', 'best_worst')
STRENGTHS = ('slight', 'clear', 'strong')
RESPONSE_FLAGS = ('harmful', 'false', 'off_topic')
INVALID = 422  # HTTP status: the form is well-formed, but its content is not a valid answer


def field_name(axis: str, letter: str) -> str:
  """Returns the name of the form field that holds the rank of a response."""
  return f'{axis}.{letter}'


def parse_ranking(form: Form, shown: Sequence[int], settings: Settings) -> dict[str, Any]:
  """Reads an answer to `rank` from a form.

  Args:
    form: the fields of the form.
    shown: [K], the numbers of the responses, in the order on the page.
    settings: the axes, and what else the form asks for.

  Raises:
    Refused: the ranks are not a valid ordering, or a required field is missing
      or invalid.
  """
  mode = first(form, 'mode') or 'full'
  if mode not in MODES:
    raise Refused(INVALID, f'Unknown mode of ranking: {mode[:20]!r}.')
  if mode != 'full' and len(shown) < settings.partial_from:
    raise Refused(INVALID, 'All responses must be ranked.')
  orders = {}
  for axis in settings.axes:
    fields = [first(form, field_name(axis, LETTERS[place])) for place in range(len(shown))]
    ranks = _dense(_read_ranks(fields, mode, axis))
    orders[axis] = _in_order_of_item(ranks, shown)
  strength = first(form, 'strength')
  if strength and strength not in STRENGTHS:
    raise Refused(INVALID, f'Unknown strength of preference: {strength[:20]!r}.')
  if len(shown) != 2 or len(set(orders[settings.axes[0]])) == 1:
    strength = ''  # a tie prefers neither response
  return {
    'orders': orders,
    'mode': mode,
    'all_bad': first(form, 'all_bad') == 'yes',
    'strength': strength,
    'flags': _read_flags(form, shown),
    'reason': _read_reason(form, settings),
  }


def parse_response(form: Form, settings: Settings, original: str | None) -> dict[str, Any]:
  """Reads an answer to `demonstrate` or `edit` from a form.

  Args:
    form: the fields of the form.
    settings: the limits of a text's length.
    original: the response to edit; None for a demonstration.

  Raises:
    Refused: the text is too short or too long, or equals the original.
  """
  text = read_text(form, 'response', settings)
  if len(text.strip()) < max(1, settings.response_length):
    least = max(1, settings.response_length)
    raise Refused(INVALID, f'The response needs at least {least} characters.')
  if original is not None and text.strip() == original.strip():
    raise Refused(INVALID, 'The response is unchanged. Edit it, or skip the item.')
  return {'response': text}


def read_text(form: Form, name: str, settings: Settings) -> str:
  """Reads a text field of a form; raises Refused where the text is too long."""
  # browsers send line ends as CR LF
  text = first(form, name).replace('\r\n', '\n').replace('\r', '\n')
  if len(text) > settings.longest_text:
    raise Refused(
      INVALID,
      f'The text has {len(text)} characters; the limit is {settings.longest_text}.',
    )
  return text


def first(form: Form, name: str) -> str:
  """Returns the first value of a field; '' where the field is absent."""
  values = form.get(name)
  return values[0] if values else ''


def read_pastes(form: Form) -> dict[str, int]:
  """Reads the number of pastes that the page noticed, and their characters in total."""
  pasted = {}
  for name in ('pastes', 'pasted_characters'):
    value = first(form, name)
    pasted[name] = int(value) if value.isascii() and value.isdigit() and len(value) < 9 else 0
  return pasted


def list_cards(
  responses: Sequence[Mapping[str, str]],
  shown: Sequence[int],
) -> list[dict[str, str]]:
  """Lists the letter and the text of each response, in the order on the page."""
  cards = []
  for place, number in enumerate(shown):
    cards.append({'letter': LETTERS[place], 'text': responses[number]['text']})
  return cards


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
  """Lists the pairs (better, worse) of a ranking, as numbers of responses.

  >>> ordered_pairs([2, 1, 2])
  [(1, 0), (1, 2)]
  """
  pairs = []
  for better, rank in enumerate(ranks):
    for worse, other in enumerate(ranks):
      if rank < other:
        pairs.append((better, worse))
  return pairs


def _read_ranks(fields: Sequence[str], mode: str, axis: str) -> list[int]:
  """Reads the ranks on one axis from the fields of a form.

  Args:
    fields: [K] texts in the order on the page; some are empty in the modes
      'top' (only the best are ranked) and 'best_worst'.
    mode: one of MODES.
    axis: the name of the axis, for messages.

  Returns:
    [K] ranks in the order on the page. Responses without a rank come last in
    the mode 'top', and between the best and the worst in the mode 'best_worst'.

  Raises:
    Refused: the ranks are not a valid ordering for the mode.
  """
  count = len(fields)
  entered: list[int | None] = []
  for letter, field in zip(LETTERS, fields, strict=False):
    text = field.strip()
    if text and not (text.isascii() and text.isdigit() and len(text) == 1):
      raise Refused(INVALID, f'{axis}: the rank of {letter} must be a number from 1 to {count}.')
    entered.append(int(text) if text else None)
    if text and not 1 <= int(text) <= count:
      raise Refused(INVALID, f'{axis}: the rank of {letter} must be a number from 1 to {count}.')
  ranked = [rank for rank in entered if rank is not None]
  if mode == 'full' and len(ranked) < count:
    missing = ', '.join(letter for letter, rank in zip(LETTERS, entered) if rank is None)
    raise Refused(INVALID, f'{axis}: {missing} has no rank yet.')
  if mode == 'best_worst':
    return _read_best_and_worst(entered, axis)
  _check_ordering(ranked, axis)
  # responses without a rank share the rank below all ranked ones
  return [count + 1 if rank is None else rank for rank in entered]


def _read_best_and_worst(entered: Sequence[int | None], axis: str) -> list[int]:
  """Returns rank 1 for the best response, 3 for the worst one and 2 for all others."""
  ranked = [rank for rank in entered if rank is not None]
  if len(ranked) != 2 or len(set(ranked)) != 2 or min(ranked) != 1:
    raise Refused(
      INVALID,
      f'{axis}: give rank 1 to the best response, the last rank to the worst one, '
      'and leave the others empty.',
    )
  places = {None: 2, 1: 1}  # what was entered → its rank; the worst response has 3
  return [places.get(rank, 3) for rank in entered]


def _check_ordering(ranked: Sequence[int], axis: str) -> None:
  """Refuses ranks that do not begin with 1, or that have a gap.

  After a tie both ways of counting are valid: 1, 1, 2 and 1, 1, 3.
  """
  if not ranked:
    raise Refused(INVALID, f'{axis}: no response has a rank yet.')
  expected = 1
  before = 0
  for place, rank in enumerate(sorted(ranked), start=1):
    if rank not in (before, expected, place) or (place == 1 and rank != 1):
      raise Refused(INVALID, f'{axis}: ranks must be 1, 2, 3 … without a gap.')
    before = rank
    expected = rank + 1


def _dense(ranks: Sequence[int]) -> list[int]:
  """Returns ranks without gaps for the same order, such as 1, 1, 2 for 1, 1, 3."""
  steps = {rank: number for number, rank in enumerate(sorted(set(ranks)), start=1)}
  return [steps[rank] for rank in ranks]


def _in_order_of_item(values: Sequence[Any], shown: Sequence[int]) -> list[Any]:
  """Rearranges values from the order on the page to the order in the item."""
  rearranged: list[Any] = [None] * len(shown)
  for value, number in zip(values, shown, strict=True):
    rearranged[number] = value
  return rearranged


def _read_flags(form: Form, shown: Sequence[int]) -> dict[str, list[str]]:
  """Reads the flags of responses: number of the response in the item → its flags."""
  flags = {}
  for letter, number in zip(LETTERS, shown, strict=False):
    chosen = sorted(set(form.get(f'flag.{letter}', ())))
    unknown = set(chosen) - set(RESPONSE_FLAGS)
    if unknown:
      raise Refused(INVALID, f'Unknown flag of {letter}.')
    if chosen:
      flags[str(number)] = chosen
  return flags


def _read_reason(form: Form, settings: Settings) -> str:
  """Reads the reason of a ranking; raises Refused where it is too short or too long."""
  reason = read_text(form, 'reason', settings).strip()
  if len(reason) < settings.reason_length:
    raise Refused(
      INVALID,
      f'Please give a reason of at least {settings.reason_length} characters.',
    )
  return reason
