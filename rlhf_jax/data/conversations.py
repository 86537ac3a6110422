r"""Messages in the forms in which people have them, turned into one form.

A message is {'role': …, 'content': …} with whatever else a chat template may read, such as
`tool_calls`, `tool_call_id` or `reasoning_content`. The content is a text; it may be null where
the assistant only calls functions. Other forms are ShareGPT's {'from': …, 'value': …}, a content
in parts, and whole dialogues in one text (hh-rlhf: '\n\nHuman: …\n\nAssistant: …').
"""

import itertools
import json
import re
from typing import Any

from rlhf_jax.errors import UserError

Message = dict[str, Any]

# Who may speak; templates decide which orders they accept.
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')

# What others call them.
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

# How dialogues in one text name the speakers: hh-rlhf, Guanaco.
_DIALOGUES = (
  re.compile(r'(?:^|\n\n)(Human|Assistant):'),
  re.compile(r'(?:^|\s*)### (Human|Assistant):'),
)


def read_messages(value: Any, place: str) -> list[Message]:
  """Turns messages in any of the forms into messages.

  Args:
    value: a list of messages, or a dialogue in one text.
    place: what error messages call the place, with the field's name.

  Raises:
    UserError: it is nothing of the kind; the first message that is not is named.
  """
  if isinstance(value, str):
    messages = split_dialogue(value)
    if messages:
      return messages
  if not isinstance(value, list):
    raise UserError(f'{place}: expected a list of messages, got {value!r:.60}')
  if not value:
    raise UserError(f'{place}: expected at least one message, got none')
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
  if name not in _ROLE_NAMES:
    names = ', '.join(ROLES)
    raise UserError(f'{place}: expected a role among {names}, got {name!r:.40}')
  message = {'role': _ROLE_NAMES[name], 'content': _read_content(content, place), **rest}
  if message['content'] is None and not (message['role'] == 'assistant' and rest):
    raise UserError(f'{place} needs the texts "role" and "content"')
  return message


def split_dialogue(text: str) -> list[Message]:
  """Splits a dialogue in one text into messages; gives [] for a text that is no dialogue.

  Turns of one speaker in a row, which hh-rlhf has, are joined to one message.
  """
  for pattern in _DIALOGUES:
    # Splitting by a pattern with a group gives the names between the texts.
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
  """Returns what a message or a response says, calls of functions as JSON."""
  if isinstance(message, str):
    return message
  words = [message['content']] if message.get('content') else []
  calls = [json.dumps(call, ensure_ascii=False) for call in message.get('tool_calls') or ()]
  return '\n'.join(words + calls)


def _read_content(content: Any, place: str) -> str | None:
  """Returns the text of a content, which may come in parts of type 'text'."""
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
  """Returns the calls in a turn of ShareGPT, which writes them as JSON."""
  try:
    calls = json.loads(value) if isinstance(value, str) else value
  except ValueError as error:
    raise UserError(f'{place}: a function call: not JSON: {error}') from None
  calls = calls if isinstance(calls, list) else [calls]
  if not calls or not all(isinstance(call, dict) for call in calls):
    raise UserError(f'{place}: expected calls of functions, got {value!r:.60}')
  # The form of OpenAI, which chat templates read.
  return [call if 'function' in call else {'type': 'function', 'function': call} for call in calls]


def _speaker(turn: tuple[str, str]) -> str:
  """Returns who speaks in a turn (speaker, text)."""
  return turn[0]
