"""Conversations with models: the models that reply, and the turns of a conversation.

A person's message becomes a turn that waits for replies. A thread of the server
asks `Replies` for K replies and stores them in the database; meanwhile the page
asks repeatedly whether they are there. At most `ROOM` turns wait at a time, so
that a slow model is not flooded.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import itertools
import logging
import os
import threading

import httpx
import sqlalchemy
from sqlalchemy import Connection, Row

from rlhf_jax.collect import database, tables
from rlhf_jax.collect.database import Database
from rlhf_jax.collect.items import Response
from rlhf_jax.collect.refusals import Refused
from rlhf_jax.data.records import Message

ROOM = 16  # largest number of turns that wait for replies at a time
_TIMEOUT = 120.0  # seconds for one reply

# (messages, K) → K responses {text, model}; may raise any exception
Replies = Callable[[Sequence[Message], int], list[Response]]


class Replier:
  """Gets the replies to waiting turns from `Replies`, in threads of its own."""

  def __init__(self, store: Database, replies: Replies, threads: int = 2):
    self._store = store
    self._replies = replies
    self._pool = concurrent.futures.ThreadPoolExecutor(threads, 'replier')
    self._room = threading.BoundedSemaphore(ROOM)

  def __call__(self, messages: Sequence[Message], count: int) -> list[Response]:
    """Returns the replies directly; the caller waits for them."""
    return self._replies(messages, count)

  def start(self, turn_id: int, messages: Sequence[Message], count: int) -> None:
    """Starts replying to a turn in another thread; call `reserve` first."""
    self._pool.submit(self._reply, turn_id, messages, count)

  def reserve(self) -> None:
    """Reserves a place among the waiting turns; raises Refused where all are taken."""
    if not self._room.acquire(blocking=False):
      raise Refused(503, 'The model is busy. Wait a moment and send it again.')

  def release(self) -> None:
    """Frees a place that was reserved."""
    self._room.release()

  def close(self) -> None:
    """Ends the threads; the server resumes the waiting turns when it starts again."""
    self._pool.shutdown(wait=False, cancel_futures=True)

  def _reply(self, turn_id: int, messages: Sequence[Message], count: int) -> None:
    """Stores the replies to a turn, or the reason why there are none."""
    try:
      values = {'state': 'ready', 'responses': self._replies(messages, count), 'error': ''}
    except Exception as error:  # a model or a server may fail in any way; the page shows why
      logging.warning('no reply to turn %d: %s', turn_id, error)
      reason = str(error).splitlines()[0] if str(error) else type(error).__name__
      values = {'state': 'failed', 'error': reason}
    finally:
      self.release()
    table = tables.turns
    with self._store.writing() as connection:
      connection.execute(sqlalchemy.update(table).where(table.c.id == turn_id).values(**values))


class EndpointReplies:
  """Gets replies from servers that speak the OpenAI chat-completions protocol."""

  def __init__(self, urls: Sequence[str], models: Sequence[str], max_tokens: int = 512):
    """Stores the addresses of the servers and the names of their models.

    Args:
      urls: the server of each model, such as 'http://localhost:8000/v1'.
      models: the name of each model on its server.
      max_tokens: the largest number of tokens of a reply.
    """
    self._servers = list(zip(urls, models, strict=True))
    self._max_tokens = max_tokens
    key = os.environ.get('OPENAI_API_KEY', '')
    self._headers = {'Authorization': f'Bearer {key}'} if key else {}

  def __call__(self, messages: Sequence[Message], count: int) -> list[Response]:
    """Asks the servers in rotation, for `count` replies in total."""
    responses = []
    for url, model in itertools.islice(itertools.cycle(self._servers), count):
      reply = httpx.post(
        f'{url.rstrip("/")}/chat/completions',
        json={
          'model': model,
          'messages': list(messages),
          'max_tokens': self._max_tokens,
          'temperature': 1.0,  # sampled, so that the replies of one model differ
        },
        headers=self._headers,
        timeout=_TIMEOUT,
      )
      reply.raise_for_status()
      text = reply.json()['choices'][0]['message']['content']
      responses.append({'text': str(text), 'model': model})
    return responses


def resume_waiting(store: Database, replier: Replier, count: int) -> None:
  """Starts replying to the turns that were waiting when the server was stopped."""
  table = tables.turns
  with store.reading() as connection:
    waiting = connection.execute(sqlalchemy.select(table).where(table.c.state == 'waiting')).all()
  for turn in waiting:
    try:
      replier.reserve()
    except Refused:
      return  # all places are taken; the person can send the message again
    replier.start(turn.id, turn.messages, count)


def last_turn(connection: Connection, lease_id: int) -> Row | None:
  """Returns the latest turn of a conversation; None before the first message."""
  table = tables.turns
  query = sqlalchemy.select(table).where(table.c.lease_id == lease_id)
  return connection.execute(query.order_by(table.c.number.desc()).limit(1)).one_or_none()


def add_turn(
  connection: Connection,
  lease_id: int,
  number: int,
  messages: Sequence[Message],
  created: float,
) -> int:
  """Adds a turn that waits for replies, and returns its id."""
  return database.insert(
    connection,
    tables.turns,
    lease_id=lease_id,
    number=number,
    messages=list(messages),
    responses=[],
    state='waiting',
    error='',
    created=created,
  )


def set_turn_state(connection: Connection, turn_id: int, state: str) -> None:
  """Changes the state of a turn."""
  table = tables.turns
  connection.execute(sqlalchemy.update(table).where(table.c.id == turn_id).values(state=state))


def delete_turn(connection: Connection, turn_id: int) -> None:
  """Deletes a turn to which no reply came."""
  connection.execute(sqlalchemy.delete(tables.turns).where(tables.turns.c.id == turn_id))


def next_messages(turn: Row, best: int) -> list[Message]:
  """Returns the conversation up to a turn, with its best reply at the end."""
  reply = {'role': 'assistant', 'content': turn.responses[best]['text']}
  return [*turn.messages, reply]
