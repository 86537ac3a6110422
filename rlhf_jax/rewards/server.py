"""Rewards from a server, over HTTP.

  POST {"prompts": [[{"role": …, "content": …}, …], …], "responses": ["…", …]}
  →    {"scores": [0.5, …]}

A score that is null or not finite means that the server could not score that
response. A request holds a few responses. If the server cannot answer it, it is
retried one response at a time, so that only the responses that cause the failure
are lost: they score `failed_score` and are counted. Records and their `meta` are
not sent, as they may hold the right answer, which a third party must not see.
"""

import asyncio
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import json
import logging
import math
from typing import Any

import httpx
import numpy as np

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import http_requests
from rlhf_jax.options import Count, Natural, NonNegative, Number, Positive
from rlhf_jax.rewards.functions import Score


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """How a reward server is asked."""

  request_size: Count = 16  # responses in a request
  concurrency: Count = 8  # requests at the same time
  timeout: Positive = 60.0  # seconds for a request
  retries: Natural = 3  # of a request without an answer, or answered with 408, 409, 429 or 5xx
  backoff: NonNegative = 1.0  # seconds before the first retry, doubled for each further one
  longest_wait: NonNegative = 30.0  # seconds between two tries, at most
  failed_score: Number = 0.0  # of a response that could not be scored
  key_env: str = ''  # environment variable with a key, sent as bearer token; '' = none


@dataclasses.dataclass(frozen=True)
class _Server:
  """A server and how to ask it."""

  address: str
  key: str
  options: ServerOptions
  logged: set  # the kinds of failures already logged; grows


@dataclasses.dataclass
class _Batch:
  """The state that the concurrent requests of one call share."""

  conversations: Sequence[list[dict]]
  responses: Sequence[str]
  values: np.ndarray  # [N] float32, NaN where there is no score
  problems: list[UserError] = dataclasses.field(default_factory=list)  # the first one stops all
  last_failure: str = ''  # why the last response without a score has none


class _CannotScoreError(Exception):
  """The server gave no scores for a request; `answered` tells whether it replied at all."""

  def __init__(self, message: str, answered: bool):
    super().__init__(message)
    self.answered = answered


def build_server_reward(url: str, options: ServerOptions) -> Score:
  """Builds a function that scores texts by a reward server.

  Args:
    url: the URL to which requests are posted.
    options: how the server is asked.

  Returns:
    score(conversations, responses, records) → (values [N] float32, the number of failed
    responses). It raises a UserError where the server refuses (a status of 3xx or 4xx
    other than 400, 408, 409, 413, 422 and 429), replies anything other than a score for
    each response, or fails on every response.

  Raises:
    UserError: the address, the options or the key are invalid.
  """
  options_lib.check_ranges(options, 'reward_server')
  expected = 'reward: expected a URL like http://localhost:8000/score'
  message = (
    f'{expected}, without user or query'
    ' (put a key into the environment variable that key_env names)'
  )
  server = _Server(
    address=http_requests.check_address(url, message),
    key=http_requests.read_key(options.key_env),
    options=options,
    logged=set(),
  )
  return functools.partial(_score, server)


def _score(
  server: _Server,
  conversations: Sequence[list[dict]],
  responses: Sequence[str],
  records: Sequence[Any],
) -> tuple[np.ndarray, int]:
  """Scores all responses; see build_server_reward."""
  del records  # they may hold the right answer
  count = len(responses)
  batch = _Batch(conversations, responses, np.full(count, np.nan, np.float32))
  asyncio.run(_score_all(server, batch))
  if batch.problems:
    raise batch.problems[0]
  failed = np.isnan(batch.values)
  if count and failed.all():
    raise UserError(f'reward {server.address}: {batch.last_failure}; it failed on every response')
  values = np.where(failed, np.float32(server.options.failed_score), batch.values)
  return values, int(failed.sum())


async def _score_all(server: _Server, batch: _Batch) -> None:
  """Scores a batch by several concurrent requests."""
  size = server.options.request_size
  count = len(batch.responses)
  parts = iter(range(begin, min(begin + size, count)) for begin in range(0, count, size))
  async with http_requests.open_client(server.address, server.key) as client:
    workers = []
    for _ in range(server.options.concurrency):
      workers.append(_work(server, client, batch, parts))
    await asyncio.gather(*workers)


async def _work(
  server: _Server,
  client: httpx.AsyncClient,
  batch: _Batch,
  parts: Iterator[range],
) -> None:
  """Scores parts one after the other, until the iterator that all workers share is empty."""
  try:
    while not batch.problems:  # one problem stops all workers
      part = next(parts, None)
      if part is None:
        return
      await _score_part(server, client, batch, part, server.options.retries)
  except UserError as error:
    batch.problems.append(error)


async def _score_part(
  server: _Server,
  client: httpx.AsyncClient,
  batch: _Batch,
  part: range,
  retries: int,
) -> None:
  """Scores a part of the batch, and its responses one by one where the part fails.

  Args:
    server: whom to ask.
    client: the connection.
    batch: gets the scores.
    part: the indices of the responses.
    retries: of a request that fails.
  """
  try:
    scores = await _ask(server, client, batch, part, retries)
  except _CannotScoreError as error:
    # A server that does not answer at all would not answer smaller requests either.
    if error.answered and len(part) > 1:
      for index in part:
        single = range(index, index + 1)
        await _score_part(server, client, batch, single, retries=0)
    else:
      _note_failure(server, batch, str(error))
    return
  batch.values[part.start : part.stop] = scores
  if any(math.isnan(score) for score in scores):
    _note_failure(server, batch, 'a score is null or not finite')


def _note_failure(server: _Server, batch: _Batch, failure: str) -> None:
  """Records why a response has no score, and logs the first failure of each kind."""
  batch.last_failure = failure
  kind = failure.partition(':')[0]
  if kind not in server.logged:
    server.logged.add(kind)
    logging.warning(
      'reward %s: %s; such responses score %g and are counted in reward/failed',
      server.address,
      failure,
      server.options.failed_score,
    )


async def _ask(
  server: _Server,
  client: httpx.AsyncClient,
  batch: _Batch,
  part: range,
  retries: int,
) -> list[float]:
  """Asks the server for the scores of a part of the batch, with retries.

  Returns:
    The scores; NaN where the server's is null or not finite.

  Raises:
    _CannotScoreError: the server could not score them, after all retries.
    UserError: it refused the request, or its reply does not follow the protocol.
  """
  options = server.options
  request = {
    'prompts': [batch.conversations[index] for index in part],
    'responses': [batch.responses[index] for index in part],
  }
  tries = 0
  while True:
    reply = await http_requests.post_json(client, server.address, request, options.timeout)
    if reply.status == 200:
      return _read_scores(server, reply.body, len(part))
    failure = reply.body
    if reply.status:
      excerpt = http_requests.excerpt(reply.body, server.key)
      failure = f'it answered {reply.status}: {excerpt}'
    # Bad request, too large, unprocessable: these responses are at fault, not the server.
    if reply.status in (400, 413, 422):
      raise _CannotScoreError(failure, answered=True)
    if reply.is_refusal:
      raise UserError(f'reward {server.address}: {failure}')
    if tries >= retries or reply.pause > options.longest_wait:
      failure = f'{failure}; tried {tries + 1} times'
      raise _CannotScoreError(failure, answered=reply.status > 0)
    delay = http_requests.retry_delay(tries, reply.pause, options.backoff, options.longest_wait)
    tries += 1
    await asyncio.sleep(delay)


def _read_scores(server: _Server, body: str, count: int) -> list[float]:
  """Reads the scores from a reply's body, {"scores": [number or null, …]}.

  Returns:
    `count` scores; NaN where the server's is null or not finite.

  Raises:
    UserError: the body has another form, or another number of scores.
  """
  try:
    scores = json.loads(body)['scores']
    values = [math.nan if score is None else float(score) for score in scores]
  except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
    values = []
  if len(values) != count:
    excerpt = http_requests.excerpt(body, server.key)
    raise UserError(
      f'reward {server.address}: expected {{"scores": [{count} numbers]}}, got {excerpt}'
    )
  return [value if math.isfinite(value) else math.nan for value in values]
