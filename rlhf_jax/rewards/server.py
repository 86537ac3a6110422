"""Rewards from a server, over HTTP.

  POST {"prompts": [[{"role": …, "content": …}, …], …], "responses": ["…", …]}
  →    {"scores": [0.5, …]}

A score that is null or not finite means that the server could not score that
response. Requests hold a few responses each. One that the server cannot answer is
asked again response by response, so that a bad response costs only itself: it
scores `failed_score` and is counted. Records and their `meta` are not sent: they may
hold the right answer, which is not for others.
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

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import http_requests
from rlhf_jax.rewards.functions import Score


@dataclasses.dataclass(frozen=True)
class ServerOptions:
  """How a reward server is asked."""

  request_size: int = 16  # responses in a request
  concurrency: int = 8  # requests at the same time
  timeout: float = 60.0  # seconds for a request
  retries: int = 3  # further tries where no answer came, or 408, 409, 429, 5xx
  backoff: float = 1.0  # seconds before the first retry, doubled for each further one
  longest_wait: float = 30.0  # seconds between two tries at most
  failed_score: float = 0.0  # of a response that could not be scored
  key_env: str = ''  # environment variable with a key, sent as bearer token; '' = none


@dataclasses.dataclass(frozen=True)
class _Server:
  """A server and how to ask it."""

  address: str
  key: str
  options: ServerOptions
  logged: set  # kinds of failures that were logged; grows


@dataclasses.dataclass
class _Batch:
  """What the concurrent requests of one call share."""

  conversations: Sequence[list[dict]]
  responses: Sequence[str]
  values: np.ndarray  # [N] float32, NaN where there is no score
  problems: list[UserError] = dataclasses.field(default_factory=list)
  last_failure: str = ''


class _CannotScoreError(Exception):
  """The server gave no scores for a request; `answered`: it said so itself."""

  def __init__(self, message: str, answered: bool):
    super().__init__(message)
    self.answered = answered


def build_server_reward(url: str, options: ServerOptions) -> Score:
  """Builds the score of texts by a reward server.

  Args:
    url: where requests are posted to.
    options: how it is asked.

  Returns:
    score(conversations, responses, records) → (values [N] float32, how many
    responses failed). It raises a UserError where the server refuses (3xx or 4xx
    but 400, 408, 409, 413, 422, 429), replies something else than a score for each
    response, or fails on every response.

  Raises:
    UserError: the address, the options or the key are wrong.
  """
  _check_options(options)
  expected = 'reward: expected a URL like http://localhost:8000/score'
  message = f'{expected}, without user or query (a key goes into the variable key_env)'
  server = _Server(
    address=http_requests.check_address(url, message),
    key=http_requests.read_key(options.key_env),
    options=options,
    logged=set(),
  )
  return functools.partial(_score, server)


def _check_options(options: ServerOptions) -> None:
  """Raises UserError where options are wrong by themselves."""
  for name in ('request_size', 'concurrency'):
    if getattr(options, name) < 1:
      value = getattr(options, name)
      raise UserError(f'reward_server.{name}: expected a number from 1, got {value}')
  if options.timeout <= 0:
    raise UserError(f'reward_server.timeout: expected seconds above 0, got {options.timeout}')


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
  """Scores a batch by several requests at the same time."""
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
  """Scores one part after another, taking the next from those left for all."""
  try:
    while not batch.problems:  # one problem stops all workers
      places = next(parts, None)
      if places is None:
        return
      await _score_part(server, client, batch, places, server.options.retries)
  except UserError as error:
    batch.problems.append(error)


async def _score_part(
  server: _Server,
  client: httpx.AsyncClient,
  batch: _Batch,
  places: range,
  retries: int,
) -> None:
  """Scores the responses at some places, one by one where they fail together."""
  try:
    scores = await _ask(server, client, batch, places, retries)
  except _CannotScoreError as error:
    # A server that does not answer at all would not answer smaller requests.
    if error.answered and len(places) > 1:
      for place in places:
        single = range(place, place + 1)
        await _score_part(server, client, batch, single, retries=0)
    else:
      _note_failure(server, batch, str(error))
    return
  batch.values[places.start : places.stop] = scores
  if any(math.isnan(score) for score in scores):
    _note_failure(server, batch, 'a score is null or not finite')


def _note_failure(server: _Server, batch: _Batch, failure: str) -> None:
  """Remembers why a response has no score; the first of each kind is logged."""
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
  places: range,
  retries: int,
) -> list[float]:
  """Returns the scores of the responses at some places, NaN for a null.

  Raises:
    _CannotScoreError: the server could not score them, after all tries.
    UserError: it refused the request, or its reply does not keep the protocol.
  """
  options = server.options
  request = {
    'prompts': [batch.conversations[place] for place in places],
    'responses': [batch.responses[place] for place in places],
  }
  tries = 0
  while True:
    reply = await http_requests.post_json(client, server.address, request, options.timeout)
    if reply.status == 200:
      return _read_scores(server, reply.body, len(places))
    failure = reply.body
    if reply.status:
      excerpt = http_requests.excerpt(reply.body, server.key)
      failure = f'it answered {reply.status}: {excerpt}'
    if reply.status in (
      400,
      413,
      422,
    ):  # these responses, not the server, are at fault
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
  """Reads {"scores": [number or null, …]}.

  Raises:
    UserError: the body is something else, or has another number of scores.
  """
  try:
    scores = json.loads(body)['scores']
    values = [math.nan if score is None else float(score) for score in scores]
  except (ValueError, LookupError, TypeError, RecursionError):
    values = []
  if len(values) != count:
    excerpt = http_requests.excerpt(body, server.key)
    raise UserError(
      f'reward {server.address}: expected {{"scores": [{count} numbers]}}, got {excerpt}'
    )
  return [value if math.isfinite(value) else math.nan for value in values]
