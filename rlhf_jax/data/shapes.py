"""Recognises the shapes of rows in published data sets by their fields, and reads them.

Some fields of a row say what was asked (PROMPT_FORMS), others what was answered
(ANSWER_FORMS). Each table has a reader for each form, and the first form whose
fields the row has is used. The two are independent: every form of a prompt goes
with every form of an answer.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import math
from typing import Any

from rlhf_jax.data import conversations, packed_rows
from rlhf_jax.data.conversations import Message
from rlhf_jax.errors import UserError

Row = Mapping[str, Any]
Response = str | Message  # a message if it is more than text, such as function calls


@dataclasses.dataclass(frozen=True)
class Asked:
  """What was asked: a conversation, which may end with the response."""

  name: str  # the form's name, for the log
  messages: list[Message]
  fields: frozenset[str]  # the fields that the form reads


@dataclasses.dataclass(frozen=True)
class Answered:
  """What was answered: K responses and, where there are several, their order."""

  responses: list[Response]
  ranks: list[int] | None = None  # [K], 1 = best, equal = tie; None for a single response
  desirable: bool | None = None  # whether a single response is good, if people rated it
  # The conversation, if the fields of the responses contain it.
  messages: list[Message] | None = None
  name: str = ''  # then also the name of the whole shape, for the log


@dataclasses.dataclass(frozen=True)
class Parsed:
  """A row's parts, the same for all shapes.

  Attributes:
    name: the name of the row's shape, for the log.
    messages: the conversation before the responses; None if nothing was asked.
    answered: the responses; None if there are none.
    context: a text put before the last message; may be empty.
    tools: JSON schemas of functions that the model may call.
    rest: all other fields.
  """

  name: str
  messages: list[Message] | None
  answered: Answered | None
  context: str
  tools: list[Any]
  rest: dict[str, Any]


def parse_row(row: Row, place: str, prompt_only: bool = False) -> Parsed:
  """Reads a row of any shape in the tables.

  Args:
    row: the fields of a row.
    place: the row's place for error messages, such as 'file:line'.
    prompt_only: whether only the prompt is read; the fields of answers are part of `rest` then.

  Raises:
    UserError: a field has the wrong type or form, or two fields contradict each other.
  """
  for field in _NOT_TEXT:
    if row.get(field):
      raise UserError(f'{place}: field "{field}": only text is read; remove the field or the row')
  row = packed_rows.unpack_row(row, place)
  asked = _find_asked(row, place)
  messages = asked.messages if asked else None
  name = asked.name if asked else ''
  used = set(COMMON_FIELDS) | (asked.fields if asked else set())
  answered = None
  form = _find_form(row)
  if form is not None and messages and conversations.ends_with_response(messages):
    form = _without_repeated_answer(form, messages, row, place)
  if form is not None and not (prompt_only and asked):
    answered = form.read(row, messages, place)
    used |= {*form.fields}
    name = f'{name} with {form.name}' if name else form.name
    if answered.name:  # the responses came with their conversation
      name = answered.name
      if asked is not None:
        _check_agreement(asked, answered, row, place)
    messages = answered.messages or messages
  if answered is None and messages and conversations.ends_with_response(messages):
    *messages, last = messages
    answered = Answered([_response(last)])
    name = f'{name} that end with the response'
  if messages is not None:
    messages = _with_system(row, messages)
  context = row.get('context')
  if not isinstance(context, (str, type(None))) and 'context' not in (
    asked.fields if asked else ()
  ):
    raise UserError(f'{place}: field "context": expected a text, got {context!r:.60}')
  rest = {key: value for key, value in row.items() if key not in used and value is not None}
  return Parsed(
    name=name,
    messages=messages,
    answered=answered,
    context=context if isinstance(context, str) else '',
    tools=_read_tools(row, place),
    rest=rest,
  )


# What was asked.


@dataclasses.dataclass(frozen=True)
class PromptForm:
  """A form in which rows say what was asked.

  Attributes:
    name: the name for the log.
    fields: the fields that it reads; the first one must be present.
    read: (row, place) → messages.
  """

  name: str
  fields: tuple[str, ...]
  read: Callable[[Row, str], list[Message]]


def _messages_of(field: str) -> Callable[[Row, str], list[Message]]:
  """Makes a reader of a field with messages in any form of data/conversations.py."""

  def read(row: Row, place: str) -> list[Message]:
    return conversations.read_messages(row[field], f'{place}: field "{field}"')

  return read


def _question_of(field: str) -> Callable[[Row, str], list[Message]]:
  """Makes a reader of a field with a question of the user, messages, or a dialogue in one text."""

  def read(row: Row, place: str) -> list[Message]:
    value = row[field]
    if not isinstance(value, str):
      return conversations.read_messages(value, f'{place}: field "{field}"')
    messages = conversations.split_dialogue(value)
    if not any(message['role'] == 'assistant' for message in messages):
      return [_user(value)]
    if not messages[-1]['content']:
      messages.pop()  # hh-rlhf's prompts end with the opened turn, '\n\nAssistant:'
    return messages

  return read


def _instruction(row: Row, place: str) -> list[Message]:
  """Reads an instruction: Alpaca's `input` is appended, `history` comes before it."""
  texts = [row['instruction'], row.get('input')]
  if not isinstance(row['instruction'], str):
    return conversations.read_messages(row['instruction'], f'{place}: field "instruction"')
  for text in texts[1:]:
    if text is not None and not isinstance(text, str):
      raise UserError(f'{place}: field "input": expected a text, got {text!r:.60}')
  earlier = []
  for pair in row.get('history') or ():  # [question, answer] of earlier turns
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
      raise UserError(f'{place}: field "history": expected pairs of texts, got {pair!r:.60}')
    earlier += [_user(pair[0]), {'role': 'assistant', 'content': pair[1]}]
  return [*earlier, _user('\n\n'.join(text for text in texts if text))]


def _webgpt_question(row: Row, place: str) -> list[Message]:
  """Reads a question that is an object with its text in `full_text` (WebGPT)."""
  text = row['question'].get('full_text')
  if not isinstance(text, str):
    raise UserError(f'{place}: field "question": expected a text')
  return [_user(text)]


def _post(row: Row, place: str) -> list[Message]:
  """Reads a post or article to summarise (TL;DR)."""
  info = row['info']
  post = info.get('post') or info.get('article') if isinstance(info, dict) else None
  if not isinstance(post, str):
    raise UserError(f'{place}: field "info": expected an object with a "post"')
  return [_user(f'{post}\n\nTL;DR:')]


PROMPT_FORMS = (
  PromptForm('conversations', ('messages',), _messages_of('messages')),
  PromptForm('ShareGPT conversations', ('conversations',), _messages_of('conversations')),
  PromptForm('conversations', ('conversation',), _messages_of('conversation')),
  PromptForm('prompts', ('prompt',), _question_of('prompt')),
  PromptForm('instructions', ('instruction', 'input', 'history'), _instruction),
  PromptForm('questions', ('question',), _question_of('question')),
  PromptForm('queries', ('query',), _question_of('query')),
  PromptForm('problems', ('problem',), _question_of('problem')),
  PromptForm('inputs', ('inputs',), _question_of('inputs')),
  PromptForm('inputs', ('input',), _question_of('input')),
  PromptForm('histories', ('history',), _question_of('history')),
  PromptForm('posts', ('info',), _post),
  PromptForm('conversations', ('context',), _messages_of('context')),
  PromptForm('dialogues in one text', ('text',), _messages_of('text')),
)


# What was answered.


@dataclasses.dataclass(frozen=True)
class AnswerForm:
  """A form in which rows say what was answered.

  Attributes:
    name: the name for the log.
    fields: the fields that it reads; all of them must be present.
    read: (row, messages that were asked or None, place) → what was answered.
  """

  name: str
  fields: tuple[str, ...]
  read: Callable[[Row, list[Message] | None, str], Answered]


def _ranked(row: Row, messages: list[Message] | None, place: str) -> Answered:
  """Reads K responses and their ranks; records.py checks that they fit each other."""
  del messages
  responses = row['responses']
  if not isinstance(responses, list):
    raise UserError(f'{place}: field "responses": expected a list, got {responses!r:.60}')
  if not isinstance(row['ranks'], list):
    raise UserError(f'{place}: field "ranks": expected a list, got {row["ranks"]!r:.60}')
  read = []
  for number, response in enumerate(responses, 1):
    if isinstance(response, dict):
      response = _response(conversations.read_message(response, f'{place}: response {number}'))
    read.append(response)
  return Answered(read, row['ranks'])


def _pair_of(better: str, worse: str) -> Callable[..., Answered]:
  """Makes a reader of a better and a worse response.

  Each is a text, a message, a list of one message, a whole conversation, or a
  whole dialogue in one text. Two conversations must have the same messages before
  the responses: the prompt. Beside a prompt they may also be lists of texts:
  several good and several bad responses.
  """

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    where = f'{place}: fields "{better}" and "{worse}"'
    if messages and _are_texts(row[better]) and _are_texts(row[worse]):
      return _read_sets(row[better], row[worse], messages, where)
    sides = []
    for field in (better, worse):
      sides.append(_read_side(row[field], messages, f'{place}: field "{field}"'))
    first, second = sides
    if first[:-1] != second[:-1]:
      raise UserError(f'{where}: expected conversations that differ in the last response only')
    for side in sides:
      if not conversations.ends_with_response(side):
        raise UserError(f'{where}: expected conversations in which the assistant speaks last')
    responses = [_response(first[-1]), _response(second[-1])]
    common = first[:-1]
    if not common:  # the fields hold the responses alone
      return Answered(responses, [1, 2])
    kind = 'dialogues in one text' if isinstance(row[better], str) else 'full conversations'
    return Answered(responses, [1, 2], messages=common, name=f'pairs of {kind}')

  return read


def _read_sets(
  better: Sequence[str], worse: Sequence[str], messages: list[Message], place: str
) -> Answered:
  """Reads the good and the bad responses to one prompt, each a list of texts (RewardBench 2)."""
  if messages[-1]['content'] in (better[0], worse[0]):
    raise UserError(f'{place}: expected lists of responses, got the prompt as the first text')
  return Answered([*better, *worse], [1] * len(better) + [2] * len(worse))


def _are_texts(value: Any) -> bool:
  """Tells whether a value is a list of texts."""
  return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _read_side(value: Any, messages: list[Message] | None, place: str) -> list[Message]:
  """Reads one side of a pair as messages: the response alone, or the whole conversation."""
  if isinstance(value, str):
    dialogue = conversations.split_dialogue(value)
    if conversations.ends_with_response(dialogue) and dialogue[0]['role'] == 'user':
      return dialogue
    if messages is None:
      raise UserError(
        f'{place}: a pair without "messages" or "prompt" must be two conversations, or two '
        'dialogues of "\\n\\nHuman:" and "\\n\\nAssistant:" turns, that differ in the last '
        'response only'
      )
    return [{'role': 'assistant', 'content': value}]
  if isinstance(value, dict):
    return [conversations.read_message(value, place)]
  if not isinstance(value, list):
    raise UserError(f'{place}: expected a text or messages, got {value!r:.60}')
  return conversations.read_messages(value, place)


def _chosen_of(
  first: str, second: str, choice: str, best: Mapping[Any, int]
) -> Callable[..., Answered]:
  """Makes a reader of two responses and a field that says which one is better.

  Args:
    first: the field of the first response.
    second: the field of the second response.
    choice: the field that says which one is better.
    best: a value of that field → 0 (the first), 1 (the second) or −1 (a tie).
  """

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    value = row[choice]
    key = value if isinstance(value, (str, int)) else None
    if isinstance(key, str):
      key = key.strip().lower()
    if key not in best:
      names = ', '.join(map(repr, best))
      raise UserError(f'{place}: field "{choice}": expected one of {names}, got {value!r:.60}')
    pair = _pair_of(first, second)(row, messages, place)
    ranks = {0: [1, 2], 1: [2, 1], -1: [1, 1]}[best[key]]
    return dataclasses.replace(pair, ranks=ranks)

  return read


def _scored_pair(row: Row, messages: list[Message] | None, place: str) -> Answered:
  """Reads two responses with a score each (WebGPT)."""
  pair = _pair_of('answer_0', 'answer_1')(row, messages, place)
  return dataclasses.replace(pair, ranks=_ranks_of([row['score_0'], row['score_1']], place))


def _preferred_of(first: str, second: str, preference: str) -> Callable[..., Answered]:
  """Makes a reader of two responses and how much better the second is (HelpSteer, −3 to 3)."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    pair = _pair_of(first, second)(row, messages, place)
    strength = _number(row[preference], f'{place}: field "{preference}"')
    return dataclasses.replace(pair, ranks=_ranks_of([-strength, strength], place))

  return read


def _rejected_of(field: str) -> Callable[..., Answered]:
  """Makes a reader of a worse response beside a conversation that ends with the better one."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    if not messages or not conversations.ends_with_response(messages):
      raise UserError(f'{place}: field "messages": expected the better response at the end')
    *before, better = messages
    *more, worse = _read_side(row[field], before, f'{place}: field "{field}"')
    if more not in ([], before) or worse['role'] != 'assistant':
      raise UserError(f'{place}: field "{field}": expected another response to the same messages')
    return Answered([_response(better), _response(worse)], [1, 2], messages=before)

  return read


def _scored_of(responses: str, scores: str) -> Callable[..., Answered]:
  """Makes a reader of a list of responses and a list of their scores; higher is better."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    del messages
    texts, numbers = row[responses], row[scores]
    are_lists = isinstance(texts, list) and isinstance(numbers, list)
    if not are_lists or len(texts) != len(numbers):
      raise UserError(f'{place}: fields "{responses}" and "{scores}": expected lists of one length')
    return Answered(texts, _ranks_of(numbers, f'{place}: field "{scores}"'))

  return read


def _summaries(row: Row, messages: list[Message] | None, place: str) -> Answered:
  """Reads two summaries and which was chosen (TL;DR)."""
  summaries = row['summaries']
  texts: list[Any] = [item.get('text') if isinstance(item, dict) else item for item in summaries]
  are_texts = len(texts) == 2 and all(isinstance(text, str) for text in texts)
  if not are_texts or row['choice'] not in (0, 1):
    raise UserError(f'{place}: fields "summaries" and "choice": expected two, and 0 or 1')
  return Answered(texts, [1, 2] if row['choice'] == 0 else [2, 1])


def _listed_of(field: str, texts: Sequence[str], scores: Sequence[str]) -> Callable[..., Answered]:
  """Makes a reader of a list of responses, each with a score or a rank.

  Args:
    field: the field of the list.
    texts: the possible names of an item's text.
    scores: the possible names of its score (higher is better) or 'rank' (1 is best).
  """

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    where = f'{place}: field "{field}"'
    items = row[field]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
      raise UserError(f'{where}: expected a list of objects, got {items!r:.60}')
    responses, values = [], []
    for number, item in enumerate(items, 1):
      response = next((item[name] for name in texts if isinstance(item.get(name), str)), None)
      name = next((name for name in scores if item.get(name) is not None), None)
      if response is None or name is None:
        raise UserError(
          f'{where}: item {number}: expected one of the texts {", ".join(texts)} and one of the '
          f'numbers {", ".join(scores)}; got the fields {", ".join(sorted(item))}'
        )
      responses.append(response)
      values.append(-_number(item[name], where) if name == 'rank' else _number(item[name], where))
    return Answered(responses, _ranks_of(values, where))

  return read


def _rated_of(response: str, label: str) -> Callable[..., Answered]:
  """Makes a reader of a single response and whether it is good (KTO)."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    desirable = _read_rating(row, label, place)
    single = _single_of(response)(row, messages, place)
    return dataclasses.replace(single, desirable=desirable)

  return read


def _rated_conversation_of(label: str) -> Callable[..., Answered]:
  """Makes a reader of a conversation that ends with a response, and whether that is good."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    desirable = _read_rating(row, label, place)
    if not messages or not conversations.ends_with_response(messages):
      raise UserError(f'{place}: a rated response needs the field "response"')
    return Answered([_response(messages[-1])], None, desirable, messages=messages[:-1])

  return read


def _single_of(field: str) -> Callable[..., Answered]:
  """Makes a reader of a single response: a text, a message, or messages that end with it."""

  def read(row: Row, messages: list[Message] | None, place: str) -> Answered:
    value = row[field]
    where = f'{place}: field "{field}"'
    if isinstance(value, str):
      return Answered([value])
    if isinstance(value, dict):
      value = [value]
    if not isinstance(value, list):
      raise UserError(f'{where}: expected a text, got {value!r:.60}')
    *more, last = conversations.read_messages(value, where)
    if last['role'] != 'assistant':
      raise UserError(f'{where}: expected the last message from the assistant')
    before = [*(messages or []), *more] if more else None
    return Answered([_response(last)], messages=before)

  return read


_SIDES = {'a': 0, 'b': 1, 'model_a': 0, 'model_b': 1, 'response_a': 0, 'response_b': 1}
_TIES = {'tie': -1, 'ties': -1, 'both': -1, 'tie (bothbad)': -1, 'both_bad': -1}

ANSWER_FORMS = (
  AnswerForm('ranked responses', ('responses', 'ranks'), _ranked),
  AnswerForm(
    'a chosen and a rejected response', ('chosen', 'rejected'), _pair_of('chosen', 'rejected')
  ),
  AnswerForm(
    'a chosen and a rejected response',
    ('chosen_response', 'rejected_response'),
    _pair_of('chosen_response', 'rejected_response'),
  ),
  AnswerForm(
    'a response and a rejected one',
    ('messages', 'rejected_response'),
    _rejected_of('rejected_response'),
  ),
  AnswerForm(
    'a response and a rejected one',
    ('messages', 'rejected_messages'),
    _rejected_of('rejected_messages'),
  ),
  AnswerForm(
    'a better and a worse response',
    ('response_j', 'response_k'),
    _pair_of('response_j', 'response_k'),
  ),
  *(
    AnswerForm('two responses and a preference', fields, _preferred_of(*fields))
    for fields in (
      ('response1', 'response2', 'overall_preference'),
      ('response_1', 'response_2', 'preference_strength'),
    )
  ),
  AnswerForm(
    'a preferred and another output',
    ('preferred_output', 'non_preferred_output'),
    _pair_of('preferred_output', 'non_preferred_output'),
  ),
  AnswerForm(
    'two responses and the better one',
    ('response_0', 'response_1', 'better_response_id'),
    _chosen_of('response_0', 'response_1', 'better_response_id', {0: 0, 1: 1}),
  ),
  AnswerForm(
    'two outputs and the better one',
    ('output_1', 'output_2', 'preference'),
    _chosen_of('output_1', 'output_2', 'preference', {1: 0, 2: 1}),
  ),
  AnswerForm(
    'two responses and the winner',
    ('response_a', 'response_b', 'winner'),
    _chosen_of('response_a', 'response_b', 'winner', {**_SIDES, **_TIES}),
  ),
  AnswerForm(
    'two conversations and the winner',
    ('conversation_a', 'conversation_b', 'winner'),
    _chosen_of('conversation_a', 'conversation_b', 'winner', {**_SIDES, **_TIES}),
  ),
  AnswerForm(
    'two replies and the better one',
    ('human_ref_A', 'human_ref_B', 'labels'),
    _chosen_of('human_ref_A', 'human_ref_B', 'labels', {1: 0, 0: 1}),  # 1: A is better
  ),
  AnswerForm('two scored answers', ('answer_0', 'answer_1', 'score_0', 'score_1'), _scored_pair),
  AnswerForm('two summaries and the better one', ('summaries', 'choice'), _summaries),
  AnswerForm(
    'scored completions',
    ('completions',),
    _listed_of(
      'completions',
      ('response', 'text'),
      ('rank', 'fine-grained_score', 'overall_score', 'score'),
    ),
  ),
  *(
    AnswerForm('scored responses', (responses, scores), _scored_of(responses, scores))
    for responses, scores in (('responses', 'scores'), ('generations', 'ratings'))
  ),
  AnswerForm(
    'ranked or scored answers',
    ('answers',),
    _listed_of('answers', ('answer', 'text'), ('rank', 'pm_score', 'score')),
  ),
  AnswerForm('rated responses', ('response', 'desirable'), _rated_of('response', 'desirable')),
  AnswerForm('rated completions', ('completion', 'label'), _rated_of('completion', 'label')),
  AnswerForm('rated responses', ('response', 'label'), _rated_of('response', 'label')),
  *(
    AnswerForm('a rating', (field, label), _rated_conversation_of(label))
    for field in ('messages', 'conversations')
    for label in ('desirable', 'label', 'kto_tag')
  ),
  *(
    AnswerForm(f'the field {name}', (name,), _single_of(name))
    for name in ('response', 'completion', 'output', 'solution', 'answer', 'targets', 'target')
  ),
)

# Fields with inputs that a text model cannot read.
_NOT_TEXT = ('images', 'image', 'videos', 'video', 'audios', 'audio')

# Fields that never belong to `Parsed.rest`.
COMMON_FIELDS = (
  'messages',
  'context',
  'tools',
  'functions',
  'system',
  'system_prompt',
  'id',
  'source',
  'license',
  'domain',
)


def list_asked_fields(row: Row) -> list[str]:
  """Returns the fields of a row that say what was asked; the first one is used."""
  names = [form.fields[0] for form in PROMPT_FORMS]
  return [name for name in names if row.get(name) is not None and _can_be_asked(name, row[name])]


def with_context(messages: list[Message], context: str) -> list[Message]:
  """Returns the messages with a context put before the text of the last one."""
  if not context:
    return messages
  *earlier, last = messages
  content = f'{context}\n\n{last["content"]}'
  return [*earlier, {**last, 'content': content}]


# Parts.


def _find_form(row: Row) -> AnswerForm | None:
  """Returns the first form of an answer whose fields are all present."""
  for form in ANSWER_FORMS:
    if any(row.get(field) is None for field in form.fields):
      continue
    # `label` rates a `completion`, whatever it holds; elsewhere only if it is true or false.
    if form.fields[-1] == 'label' and form.fields[0] != 'completion':
      if not isinstance(row['label'], bool):
        continue
    return form
  return None


def _without_repeated_answer(
  form: AnswerForm, messages: list[Message], row: Row, place: str
) -> AnswerForm | None:
  """Returns None for a form of one field, as the conversation already ends with the response.

  A field such as 'solution' or 'answer' is then left in `rest`, for a reward to compare with.
  """
  [*_, last] = messages
  if len(form.fields) > 1:
    return form
  [field] = form.fields
  if field in ('response', 'completion') and row[field] not in (last['content'], [last]):
    raise UserError(
      f'{place}: field "{field}": it is not the response with which the messages end; remove one'
    )
  return None


def _find_asked(row: Row, place: str) -> Asked | None:
  """Reads what was asked by the first form whose field is present; `prompt` must agree with it."""
  asked = None
  present = list_asked_fields(row)
  for form in PROMPT_FORMS:
    if form.fields[0] not in present:
      continue
    value = row[form.fields[0]]
    if asked is None:
      read = _webgpt_question if _is_webgpt(form, value) else form.read
      asked = Asked(form.name, read(row, place), frozenset(form.fields))
    elif form.fields == ('prompt',):  # beside `messages`, as in UltraFeedback
      _check_prompt(asked.messages, row, place, asked.fields)
      asked = dataclasses.replace(asked, fields=asked.fields | {'prompt'})
  return asked


def _can_be_asked(field: str, value: Any) -> bool:
  """Tells whether a field says what was asked; `context` and `text` have other uses too."""
  if field == 'context':  # in most data sets a text that belongs before the question
    return isinstance(value, list)
  if field == 'text':  # in most data sets a document
    return isinstance(value, str) and bool(conversations.split_dialogue(value))
  return True


def _is_webgpt(form: PromptForm, value: Any) -> bool:
  return form.fields == ('question',) and isinstance(value, dict)


def _check_agreement(asked: Asked, answered: Answered, row: Row, place: str) -> None:
  """Refuses a row whose prompt differs from that of its conversations."""
  given = asked.messages
  messages = answered.messages or []
  # UltraFeedback's `messages` are the conversation with the chosen response.
  if given == [*messages, _message(answered.responses[0])]:
    return
  # The prompt may be only the question of conversations that have more messages.
  if given != messages and not (len(given) == 1 and given[-1] in messages):
    names = ', '.join(sorted(asked.fields & {*row}))
    raise UserError(
      f'{place}: field "{names}": it is not the prompt of the conversations in this row'
    )


def _check_prompt(messages: list[Message], row: Row, place: str, fields: frozenset[str]) -> None:
  """Refuses a prompt whose questions are not in the row's conversation."""
  prompt = _question_of('prompt')(row, place)
  asked = [message['content'] for message in messages if message['role'] == 'user']
  if any(message['role'] == 'user' and message['content'] not in asked for message in prompt):
    [field] = fields
    raise UserError(
      f'{place}: the fields "prompt" and "{field}" say different things; remove one of them'
    )


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
  """Returns the messages with the row's system message before them, where it has one."""
  for field in ('system', 'system_prompt'):
    text = row.get(field)
    if isinstance(text, str) and text and messages[:1] and messages[0]['role'] != 'system':
      return [{'role': 'system', 'content': text}, *messages]
  return messages


def _read_tools(row: Row, place: str) -> list[Any]:
  """Returns the row's tools, which may be written as JSON."""
  tools = row.get('tools')
  if tools is None and isinstance(row.get('functions'), list):  # OpenAI's older name
    tools = [{'type': 'function', 'function': function} for function in row['functions']]
  if isinstance(tools, str):
    try:
      tools = json.loads(tools) if tools.strip() else []
    except ValueError as error:
      raise UserError(f'{place}: field "tools": not JSON: {error}') from None
  tools = tools or []
  if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
    raise UserError(f'{place}: field "tools": expected a list of objects, got {tools!r:.60}')
  return tools


def _response(message: Message) -> Response:
  """Returns an assistant's message as a response: only its text, if it has nothing else."""
  return message['content'] if set(message) == {'role', 'content'} else message


def _message(response: Response) -> Message:
  """Returns the message of a response."""
  return {'role': 'assistant', 'content': response} if isinstance(response, str) else response


def _read_rating(row: Row, field: str, place: str) -> bool:
  """Returns whether a response is good; tables of classes write 1 and 0."""
  rating = row[field]
  if not isinstance(rating, (bool, int)) or rating not in (0, 1):
    raise UserError(f'{place}: field "{field}": expected true or false, got {rating!r:.60}')
  return bool(rating)


def _user(text: str) -> Message:
  return {'role': 'user', 'content': text}


def _number(value: Any, place: str) -> float:
  """Returns a number as a float; some data sets write it as text."""
  try:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
      raise ValueError
    return number
  except (TypeError, ValueError):
    raise UserError(f'{place}: expected a number, got {value!r:.60}') from None


def _ranks_of(scores: Sequence[Any], place: str) -> list[int]:
  """Returns the ranks of scores, 1 for the highest; equal scores have equal ranks."""
  numbers = [_number(score, place) for score in scores]
  order = sorted(set(numbers), reverse=True)
  return [order.index(number) + 1 for number in numbers]
