r"""Converts messages from the forms that data sets use into one form.

A message is {'role': …, 'content': …} with other keys that a chat template may
read, such as `tool_calls`, `tool_call_id` or `reasoning_content`. The content is
a text; it may be null if the assistant only calls functions. Other forms are
ShareGPT's {'from': …, 'value': …}, a content in parts, and whole dialogues in one
text (hh-rlhf: '\n\nHuman: …\n\nAssistant: …').
"""

import itertools
import json
import re
from typing import Any

from rlhf_jax.errors import UserError

Message = dict[str, Any]

# The roles of messages; a template decides in which order it accepts them.
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# A data set's name of a role, in lower case → ours.
_ROLE_NAMES = {
  **{role: role for role in ROLES},
  'human': 'user',
  'prompter': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'bing': 'assistant',
  'bard': 'assistant',
  'bot': 'assistant',
  'model': 'assistant',
  'function': 'tool',
  'function_response': 'tool',
  'tool_response': 'tool',
  'ipython': 'tool',
  'observation': 'tool',
}

# ShareGPT's names of a turn in which the assistant calls functions.
_CALLERS = ('function_call', 'tool_call')

# The speakers' names in dialogues that are one text: those of hh-rlhf, those of Guanaco.
_DIALOGUES = (
  re.compile(r'(?:^|\n\n)(Human|Assistant):'),
  re.compile(r'(?:^|\s*)### (Human|Assistant):'),
)


def read_messages(value: Any, place: str) -> list[Message]:
  """Converts messages from any of the forms.

  Args:
    value: a list of messages, or a dialogue in one text.
    place: what error messages call the place, with the field's name.

  Raises:
    UserError: it is none of the forms; the error names the first message that is wrong.
  """
  if isinstance(value, str):
    messages = split_dialogue(value)
    if messages:
      return messages
    value = _parse_list(value)
  if not isinstance(value, list):
    raise UserError(f'{place}: expected a list of messages, got {value!r:.60}')
  if not value:
    raise UserError(f'{place}: expected at least one message, got none')
  if len(value) > 1 and all(isinstance(text, str) for text in value):  # LIMA: they take turns
    return [
      {'role': 'assistant' if number % 2 else 'user', 'content': text}
      for number, text in enumerate(value)
    ]
  if all(isinstance(turn, dict) and {'input', 'output'} <= {*turn} for turn in value):  # Capybara
    value = [
      {'role': role, 'content': turn[field]}
      for turn in value
      for role, field in (('user', 'input'), ('assistant', 'output'))
    ]
  return [
    read_message(message, f'{place}: message {number}') for number, message in enumerate(value, 1)
  ]


def read_message(value: Any, place: str) -> Message:
  """Turns one message into {'role', 'content', …}.

  Raises:
    UserError: as `read_messages`.
  """
  if not isinstance(value, dict):
    raise UserError(f'{place} needs the texts "role" and "content"')
  name = value.get('role', value.get('from'))
  content = value.get('content', value.get('value'))
  rest = {
    key: item
    for key, item in value.items()
    if key not in ('role', 'from', 'content', 'value') and item is not None
  }
  if not isinstance(name, str):
    raise UserError(f'{place} needs the texts "role" and "content"')
  if name in _CALLERS:
    return {'role': 'assistant', 'content': None, **rest, 'tool_calls': _read_calls(content, place)}
  role = _ROLE_NAMES.get(name.lower())
  if role is None:
    names = ', '.join(ROLES)
    raise UserError(f'{place}: expected a role among {names}, got {name!r:.40}')
  if isinstance(rest.get('function_call'), dict):  # OpenAI's older name
    rest['tool_calls'] = [{'type': 'function', 'function': rest.pop('function_call')}]
  message = {'role': role, 'content': _read_content(content, place), **rest}
  if message['content'] is None and not (message['role'] == 'assistant' and rest):
    raise UserError(f'{place} needs the texts "role" and "content"')
  return message


def split_dialogue(text: str) -> list[Message]:
  """Splits a dialogue that is one text into messages; returns [] for a text that is none.

  Consecutive turns of the same speaker, which occur in hh-rlhf, become one message.
  """
  for pattern in _DIALOGUES:
    # As the pattern has a group, the speakers' names alternate with the texts.
    before, *parts = pattern.split(text)
    if before.strip() or not parts:
      continue
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    messages = []
    for speaker, turns in itertools.groupby(zip(parts[::2], parts[1::2]), key=_speaker):
      content = '\n\n'.join(words.strip() for _, words in turns)
      messages.append({'role': roles[speaker], 'content': content})
    return messages
  return []


def ends_with_response(messages: list[Message]) -> bool:
  """Says whether the assistant speaks last."""
  return bool(messages) and messages[-1]['role'] == 'assistant'


def message_text(message: str | Message) -> str:
  """Returns the text of a message or a response; function calls are written as JSON."""
  if isinstance(message, str):
    return message
  words = [message['content']] if message.get('content') else []
  calls = [json.dumps(call, ensure_ascii=False) for call in message.get('tool_calls') or ()]
  return '\n'.join(words + calls)


def _parse_list(text: str) -> Any:
  """Returns the list that a text encodes in JSON, or the text itself if it encodes none."""
  if not text.lstrip().startswith('['):
    return text
  try:
    return json.loads(text)
  except ValueError:
    return text


def _read_content(content: Any, place: str) -> str | None:
  """Returns a content as one text; it may be a list of parts of type 'text'."""
  if content is None or isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise UserError(f'{place}: "content": expected a text, got {content!r:.60}')
  texts = []
  for part in content:
    text = part.get('text') if isinstance(part, dict) else part
    if not isinstance(text, str):
      kind = part.get('type') if isinstance(part, dict) else part
      raise UserError(f'{place}: "content": expected parts of text, got {kind!r:.60}')
    texts.append(text)
  return ''.join(texts)


def _read_calls(value: Any, place: str) -> list[Any]:
  """Returns the function calls of a ShareGPT turn, whose content is JSON."""
  try:
    calls = json.loads(value) if isinstance(value, str) else value
  except ValueError as error:
    raise UserError(f'{place}: a function call: not JSON: {error}') from None
  calls = calls if isinstance(calls, list) else [calls]
  if not calls or not all(isinstance(call, dict) for call in calls):
    raise UserError(f'{place}: expected function calls, got {value!r:.60}')
  # OpenAI's form, which chat templates read.
  return [call if 'function' in call else {'type': 'function', 'function': call} for call in calls]


def _speaker(turn: tuple[str, str]) -> str:
  """Returns who speaks in a turn (speaker, text)."""
  return turn[0]
