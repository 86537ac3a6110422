"""The process that replies in conversations, beside the server of `collect`.

The server's process never imports JAX: a model that fails or takes all memory
ends its own process, which is started again for the next reply.
"""

from collections.abc import Sequence
import multiprocessing
from multiprocessing.connection import Connection
import threading

from rlhf_jax.collect.items import Response
from rlhf_jax.data.records import Message
from rlhf_jax.errors import UserError

_START_SECONDS = 600  # to open the models
_REPLY_SECONDS = 300  # for one reply, the first one's compilation included


class WorkerReplies:
  """Replies of models in a process of their own, one turn at a time."""

  def __init__(self, names: Sequence[str], max_new_tokens: int):
    """Starts the process.

    Args:
      names: of the models, which reply in turn.
      max_new_tokens: of a reply.

    Raises:
      UserError: a model cannot be opened.
    """
    self._names = list(names)
    self._max_new_tokens = max_new_tokens
    self._lock = threading.Lock()
    self._start()

  def __call__(self, messages: Sequence[Message], count: int) -> list[Response]:
    """Lets the models reply; raises RuntimeError where they cannot."""
    with self._lock:
      if not self._process.is_alive():
        self._start()
      self._pipe.send((list(messages), count))
      if not self._pipe.poll(_REPLY_SECONDS):
        self.close()
        raise RuntimeError(f'no reply within {_REPLY_SECONDS} s')
      try:
        replied, value = self._pipe.recv()
      except EOFError:
        raise RuntimeError('the process of the models has ended') from None
    if not replied:
      raise RuntimeError(value)
    return value

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.join()

  def _start(self) -> None:
    """Starts the process, and waits until the models are open."""
    # 'spawn', as a copy of a process with threads may hang
    context = multiprocessing.get_context('spawn')
    self._pipe, other = context.Pipe()
    self._process = context.Process(
      target=run_worker,
      args=(other, self._names, self._max_new_tokens),
      daemon=True,  # it ends with the server
    )
    self._process.start()
    other.close()
    if not self._pipe.poll(_START_SECONDS):
      self.close()
      raise UserError(f'--models: not open within {_START_SECONDS} s')
    try:
      opened, value = self._pipe.recv()
    except EOFError:
      raise UserError('--models: the process that opens them has ended') from None
    if not opened:
      raise UserError(value)


def run_worker(pipe: Connection, names: Sequence[str], max_new_tokens: int) -> None:
  """Opens models and replies until the other end of the pipe is closed.

  Args:
    pipe: gives (messages, K); takes (True, K responses) or (False, what went wrong).
    names: of the models.
    max_new_tokens: of a reply.
  """
  from rlhf_jax.commands import collect_models  # imports JAX, here only

  try:
    reply = collect_models.open_replies(names, max_new_tokens)
  except UserError as error:
    pipe.send((False, str(error)))
    return
  pipe.send((True, ''))
  while True:
    try:
      messages, count = pipe.recv()
    except EOFError:
      return  # the server has ended
    try:
      answer = (True, reply(messages, count))
    except Exception as error:  # the page tells it; the next turn may go well
      answer = (False, f'{type(error).__name__}: {error}')
    pipe.send(answer)
