"""A conversation with one model or two: messages, commands and votes.

What a user sees and types goes through a `Screen` (chat_terminal.py), so that a
session runs on a terminal, in a pipe and in a test alike.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import datetime
import math
from pathlib import Path
import random
import signal
import threading
from typing import Any, Protocol

import jax

from rlhf_jax import file_lock, json_lines, plain_text
from rlhf_jax.commands import lines
from rlhf_jax.errors import UserError
from rlhf_jax.generation import streaming
from rlhf_jax.generation.streaming import Streamer
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import transformer
from rlhf_jax.runtime import compilation, mesh

HELP = {  # command → what it does
  '/undo': 'takes back your last message and the response',
  '/save FILE': 'adds the conversation to a file of JSON Lines, which SFT reads',
  '/system TEXT': 'sets the system message; without a text, removes it',
  '/temperature X': 'sets the temperature; 0 = greedy',
  '/help': 'shows this list',
  '/quit': 'ends, as Ctrl-D does',
}
VOTES = {'1': (1, 2), '2': (2, 1), '=': (1, 1)}  # what is typed → ranks of first and second
_SOURCE = 'chat'  # of the records that are written
_INCOMPLETE = '\ufffd'  # what bytes decode to that are not yet a whole character

Message = dict[str, str]


class Screen(Protocol):
  """Where a session is shown, and where its messages come from."""

  def read_message(self) -> str | None:
    """Returns what the user has typed, of one line or several; None at the end."""

  def read_vote(self) -> str:
    """Returns the user's choice, a key of VOTES, or '' for none."""

  def say(self, text: str) -> None:
    """Shows a line of the program itself."""

  def show_help(self, commands: Mapping[str, str]) -> None:
    """Shows the commands."""

  def show_response(self, parts: Iterator[str]) -> None:
    """Shows a response while it grows; the parts joined are the text."""

  def show_pair(self, parts: Iterator[tuple[int, str]]) -> None:
    """Shows two responses beside each other while they grow, as (0 or 1, a part of it)."""


@dataclasses.dataclass(frozen=True)
class Speaker:
  """A model that talks."""

  name: str
  streamer: Streamer
  tokenizer: Tokenizer

  def respond(
    self, messages: Sequence[Message], key: jax.Array, temperature: float, max_new_tokens: int
  ) -> Iterator[str]:
    """Yields the parts of a response to a conversation as they are drawn.

    Raises:
      UserError: the chat template refuses the conversation, or it is too long.
    """
    prompt = self.tokenizer.prompt(messages)
    ids: list[int] = []
    shown = ''
    for token in self.streamer.stream(prompt, key, temperature, max_new_tokens):
      ids.append(token)
      text = self.tokenizer.decode(ids)
      # Bytes of a character that is not complete yet may still become another one.
      if text.startswith(shown) and not text.endswith(_INCOMPLETE):
        yield text[len(shown) :]
        shown = text
    text = self.tokenizer.decode(ids) if ids else ''
    if text.startswith(shown):
      yield text[len(shown) :]


@dataclasses.dataclass
class Conversation:
  """What was said, and how it goes on.

  Attributes:
    system: the system message; '' without.
    messages: of user and assistant in turn.
    temperature: of the sampling.
  """

  system: str
  temperature: float
  messages: list[Message] = dataclasses.field(default_factory=list)

  def with_system(self) -> list[Message]:
    """Returns all messages, the system's first."""
    first = [{'role': 'system', 'content': self.system}] if self.system else []
    return [*first, *self.messages]

  def undo(self) -> bool:
    """Takes back the last message of the user with the response; says whether there was one."""
    if not self.messages:
      return False
    while self.messages and self.messages.pop()['role'] != 'user':
      pass
    return True


def run(options: argparse.Namespace, screen: Screen) -> None:
  """Opens the models and talks until the user ends it.

  Raises:
    UserError: a model cannot be read, or cannot talk.
  """
  compilation.cache_compilations()
  compilation.request_exact_products()
  conversation = Conversation(options.system, check_temperature(options.temperature))
  speakers = []
  for name in options.models:
    screen.say(f'reading {name} …')
    speakers.append(open_speaker(name, options))
  screen.say('Ctrl-D ends, Ctrl-C stops a response, /help lists the commands.')
  # So the same messages get the same responses again.
  keys = _number_keys(options.seed)
  order = random.Random(options.seed)  # of the two models in each vote
  while (text := screen.read_message()) is not None:
    if not text.strip():
      continue
    try:
      if text.startswith('/'):
        if not obey(text, conversation, screen):
          return
      elif len(speakers) == 1:
        talk(text, conversation, speakers[0], screen, options, next(keys))
      else:
        compare(text, conversation, order.sample(speakers, 2), screen, options, next(keys))
    except UserError as error:  # the conversation is as it was before
      screen.say(plain_text.one_line(str(error)))


def open_speaker(name: str, options: argparse.Namespace) -> Speaker:
  """Opens a model that can talk, on the first device.

  Raises:
    UserError: it cannot be read, is a reward model, or has no chat template.
  """
  # A single response cannot be divided over the axis `data`.
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  opened = lines.read_model(name, options.dtype, layout)
  tokenizer = opened.tokenizer
  if opened.model.config.head:
    raise UserError(f'{name} is a reward model: it scores responses and cannot generate any')
  if tokenizer is None:
    raise UserError(f'{name} has no tokenizer that can be read: expected one with a chat template')
  tokenizer.prompt([{'role': 'user', 'content': 'Hello'}])  # fails now without a chat template
  empty_ids = tokenizer.empty_ids(opened.model.config.vocab_size)  # are never sampled
  config = dataclasses.replace(opened.model.config, empty_ids=empty_ids)
  streamer = streaming.build_streamer(
    transformer.build_model(config, layout),
    opened.params,
    tokenizer.stop_ids,
    layout,
    options.top_k,
    options.top_p,
  )
  return Speaker(name, streamer, tokenizer)


def _number_keys(seed: int) -> Iterator[jax.Array]:
  """Yields the random key of each message."""
  root = jax.random.key(seed)
  number = 0
  while True:
    yield jax.random.fold_in(root, number)
    number += 1


# Messages.


def talk(
  text: str,
  conversation: Conversation,
  speaker: Speaker,
  screen: Screen,
  options: argparse.Namespace,
  key: jax.Array,
) -> None:
  """Sends a message to one model and adds both to the conversation."""
  asked = [*conversation.with_system(), {'role': 'user', 'content': text}]
  said: list[str] = []
  with stop_at_interrupt() as is_stopped:
    parts = speaker.respond(asked, key, conversation.temperature, options.max_new_tokens)
    screen.show_response(_collect(parts, said, is_stopped))
  _add_turn(conversation, text, ''.join(said))


def compare(
  text: str,
  conversation: Conversation,
  speakers: Sequence[Speaker],
  screen: Screen,
  options: argparse.Namespace,
  key: jax.Array,
) -> None:
  """Sends a message to two models, asks which is better, and only then says who they are.

  Both see the same conversation, so that the vote is on responses to the same prompt;
  it goes on with the better one, the first of equal ones.
  """
  asked = [*conversation.with_system(), {'role': 'user', 'content': text}]
  said: list[list[str]] = [[], []]
  with stop_at_interrupt() as is_stopped:
    streams = []
    for number, speaker in enumerate(speakers):
      own_key = jax.random.fold_in(key, number)
      parts = speaker.respond(asked, own_key, conversation.temperature, options.max_new_tokens)
      streams.append(_collect(parts, said[number], is_stopped))
    screen.show_pair(_alternate(streams))
  responses = [''.join(parts) for parts in said]
  # The signal is as before: here Ctrl-C means no vote.
  choice = screen.read_vote()
  ranks = VOTES.get(choice)  # None for anything else
  if ranks:
    add_vote(options.votes, asked, responses, ranks, [speaker.name for speaker in speakers])
  names = f'1 was {speakers[0].name}, 2 was {speakers[1].name}'
  screen.say(f'{names}; {f"added to {options.votes}" if ranks else "no vote"}')
  better = 1 if ranks == (2, 1) else 0
  _add_turn(conversation, text, responses[better])


def _collect(
  parts: Iterator[str], said: list[str], is_stopped: Callable[[], bool]
) -> Iterator[str]:
  """Passes the parts of a response on and keeps them, until it ends or is stopped."""
  for part in parts:
    said.append(part)
    yield part
    if is_stopped():
      return


def _alternate(streams: Sequence[Iterator[str]]) -> Iterator[tuple[int, str]]:
  """Yields a part of each response in turn, so that their speed does not tell them apart."""
  left = dict(enumerate(streams))  # those that have not ended
  while left:
    for number in list(left):
      part = next(left[number], None)
      if part is None:
        del left[number]
      else:
        yield number, part


def _add_turn(conversation: Conversation, text: str, response: str) -> None:
  """Adds a message and the response to it."""
  conversation.messages.append({'role': 'user', 'content': text})
  conversation.messages.append({'role': 'assistant', 'content': response})


@contextlib.contextmanager
def stop_at_interrupt() -> Iterator[Callable[[], bool]]:
  """Makes Ctrl-C stop a response rather than the program.

  Yields:
    A function that says whether Ctrl-C was pressed. Nothing is raised, as that might
    happen in the middle of a step.
  """
  stopped = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stopped.is_set  # Python handles signals in the main thread only
    return
  before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
  try:
    yield stopped.is_set
  finally:
    signal.signal(signal.SIGINT, before or signal.SIG_DFL)


# Commands.


def obey(text: str, conversation: Conversation, screen: Screen) -> bool:
  """Does what a command says; returns whether the session goes on.

  Raises:
    UserError: there is no such command, or its argument is wrong.
  """
  # Only the first word is the command; a text may have any others.
  name, _, argument = text.strip().partition(' ')
  argument = argument.strip()
  if name == '/quit':
    return False
  if name == '/help':
    screen.show_help(HELP)
  elif name == '/undo':
    was_there = conversation.undo()
    screen.say(f'{len(conversation.messages)} messages' if was_there else 'nothing to take back')
  elif name == '/system':
    conversation.system = argument
    screen.say(f'system message: {argument or "none"}')
  elif name == '/temperature':
    conversation.temperature = check_temperature(argument)
    screen.say(f'temperature {conversation.temperature:g}')
  elif name == '/save':
    path = save(conversation, argument)
    screen.say(f'added to {path}')
  else:
    raise UserError(f'{name}: expected one of {", ".join(key.split()[0] for key in HELP)}')
  return True


def check_temperature(given: str | float) -> float:
  """Returns a temperature; raises UserError for what is none."""
  try:
    value = float(given)
  except ValueError:
    value = math.nan
  if not (math.isfinite(value) and value >= 0):
    raise UserError(f'temperature: expected a number from 0, got {given!r}')
  return value


def save(conversation: Conversation, name: str) -> Path:
  """Adds the conversation to a file of JSON Lines, as a row with `messages`.

  Raises:
    UserError: no name is given, nothing was said, or the file cannot be written.
  """
  if not name:
    raise UserError('/save: expected the name of a file')
  if not conversation.messages:
    raise UserError('/save: nothing was said yet')
  path = Path(name).expanduser()
  _append(path, {'source': _SOURCE, 'messages': conversation.with_system()})
  return path


def add_vote(
  path: Path,
  messages: Sequence[Message],
  responses: Sequence[str],
  ranks: Sequence[int],
  models: Sequence[str],
) -> None:
  """Adds a vote to a file, as a ranking that reward models and preference stages read.

  Args:
    path: the file.
    messages: the conversation up to the user's last message.
    responses: of both models.
    ranks: 1 = better; equal = a tie.
    models: who wrote them, for the reader.
  """
  now = datetime.datetime.now().astimezone()
  vote = {
    'id': f'chat-{now.isoformat()}',
    'source': _SOURCE,
    'messages': list(messages),
    'responses': list(responses),
    'ranks': list(ranks),
    'models': list(models),
  }
  _append(path, vote)


def _append(path: Path, row: Mapping[str, Any]) -> None:
  """Adds a row to a file of JSON Lines, which another session may be writing too."""
  # Opened for appending, and closed again: a crash loses no earlier row.
  with file_lock.open_locked(path, 'another process is writing this file') as file:
    file.write((json_lines.format_value(row) + '\n').encode())
