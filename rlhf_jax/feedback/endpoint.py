"""Judges that are servers with the OpenAI chat-completions protocol.

vLLM, SGLang, llama.cpp, `transformers serve` and hosted models have it.
verdicts.py reads the verdict from a reply. Every answer is written to a cache
file as soon as it arrives, so that no question is asked, or paid for, twice.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
import re
import string
from typing import Any

import httpx
import numpy as np
import tqdm

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import (
  answer_cache,
  http_requests,
  judging,
  verdicts,
)
from rlhf_jax.options import Count, Natural, NonNegative, Positive, Shares


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
  """How a server is asked, and the limits on time and cost."""

  model: str = ''  # the model's name on the server; required
  key_env: str = 'OPENAI_API_KEY'  # environment variable with the key; empty: none is sent
  system: str = ''  # a system message before the question; '' = none
  template: str = (
    'Consider the following conversation between a human and an assistant:\n\n'
    '{conversation}\n\n{principle}\nOptions:\n(A) {first}\n(B) {second}\n\n'
  )
  options: tuple = ('A', 'B')  # the names of the first and the second response
  ending: str = 'Answer with one letter, A or B, and nothing else.'  # after the template
  thought: Natural = 0  # tokens of reasoning before the verdict; 0 = none
  think: str = (  # replaces `ending` if thought > 0
    'Reason step by step, then write a last line that is "Answer: A" or "Answer: B".'
  )
  clamp: Shares = (0.4, 0.6)  # if thought > 0, probabilities are clipped to this range
  max_tokens: Count = 16  # of a reply, in addition to `thought`
  temperature: NonNegative = 0.0
  # `top_logprobs` of the request; 0 = no log-probabilities: verdicts are read from the text.
  logprobs: Natural = 20
  # Further fields of the request; a field that is None here is left out of the request.
  extra: dict = dataclasses.field(default_factory=dict)
  concurrency: Count = 8  # requests at the same time
  timeout: Positive = 60.0  # seconds for a request
  retries: Natural = 6  # of a request that fails, before the run stops
  backoff: NonNegative = 1.0  # seconds before the first retry, doubled for each further one
  # Seconds; the run stops if the server asks for a longer wait
  longest_wait: NonNegative = 120.0
  # Limit on the replies paid for, over all runs with this cache; 0 = none
  max_calls: Natural = 0
  # The same for tokens. Requests in flight when the limit is reached can exceed it.
  max_total_tokens: Natural = 0

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.thought else dict.fromkeys(('think', 'clamp'), 'thought is 0')


_EXAMPLE_URL = 'http://localhost:8000/v1'
_PATH = '/chat/completions'
_PLACES = {'conversation', 'question', 'principle', 'first', 'second'}  # of a template
# What `_read_reply` may raise where a reply is not a chat completion.
_NOT_A_COMPLETION = (
  ValueError,
  LookupError,
  TypeError,
  AttributeError,
  ArithmeticError,
  RecursionError,
)


@dataclasses.dataclass
class _Server:
  """A server and how to ask it; the last two fields change during a run."""

  address: str
  options: EndpointOptions
  patterns: verdicts.Patterns
  key: str
  refuses_logprobs: bool = False  # set once it has refused a request for log-probabilities
  warned: set = dataclasses.field(default_factory=set)  # the kinds of warnings already logged

  def excerpt(self, body: str) -> str:
    """Returns the beginning of a reply, with the key hidden."""
    return http_requests.excerpt(body, self.key)

  def warn_once(self, kind: Any, message: str) -> None:
    """Logs a warning unless one of the same kind was logged before."""
    if kind not in self.warned:
      self.warned.add(kind)
      logging.warning('judge %s: %s', self.address, message)


@dataclasses.dataclass
class _Run:
  """The state that the concurrent requests of one call of a judge share."""

  calls: int  # replies so far, over all runs, and requests in flight
  tokens: int  # of the replies so far, over all runs
  stopped: asyncio.Event  # set when a request fails after all its retries
  problems: list[UserError] = dataclasses.field(default_factory=list)


def build_endpoint_judge(
  url: str,
  options: EndpointOptions,
  cache: str | Path,
) -> judging.Judge:
  """Builds a judge that asks a server.

  Only one process may use a cache file: process 0 where there are several.

  Args:
    url: the base URL of the server, for example http://localhost:8000/v1, or
      the full URL of its …/chat/completions.
    options: how the server is asked.
    cache: a .jsonl file with a line for each answer, created if missing.

  Returns:
    The judge. It raises a UserError when the server refuses a request, when a
    request fails after all retries, or when `max_calls` or `max_total_tokens`
    is reached. The answers received until then are in the cache; calling the
    judge again asks only for the missing ones.

  Raises:
    UserError: the address, the options or the key are invalid.
  """
  _check_options(options)
  server = _Server(
    key=http_requests.read_key(options.key_env),
    address=_completions_address(url),
    options=options,
    patterns=verdicts.compile_patterns(options.options),
  )
  return functools.partial(_judge, server, Path(cache))


def _judge(
  server: _Server,
  cache_path: Path,
  comparisons: Sequence[judging.Comparison],
) -> judging.Judgements:
  """Asks the server the questions that are not in the cache, and returns all answers."""
  requests = [build_request(comparison, server.options) for comparison in comparisons]
  with answer_cache.open_cache(cache_path) as cache:
    missing = {}
    for request, key in requests:
      if key not in cache.rows:
        missing[key] = request
    try:
      asyncio.run(_ask_all(server, missing, cache))
    except UserError as error:
      raise UserError(_stop_message(server, cache, str(error))) from None
    except KeyboardInterrupt:
      logging.warning(_stop_message(server, cache, 'stopped'))
      raise
    rows = [cache.rows[key] for _, key in requests]
  # None (no verdict) becomes NaN, which np.clip leaves as it is.
  probabilities = np.array([row['probability'] for row in rows], float)
  if server.options.thought:
    probabilities = np.clip(probabilities, *server.options.clamp)
  return judging.Judgements(probabilities, [row['text'] for row in rows])


def _stop_message(server: _Server, cache: answer_cache.AnswerCache, problem: str) -> str:
  """Returns a message that says why a run stopped, and how to continue it."""
  return (
    f'judge {server.address}: {problem}; {len(cache.rows)} label(s) are kept in'
    f' {cache.path}; repeat the same command to continue'
  )


async def _ask_all(
  server: _Server,
  missing: Mapping[str, dict],
  cache: answer_cache.AnswerCache,
) -> None:
  """Asks all missing questions, and writes each answer to the cache as it arrives.

  Args:
    server: whom to ask.
    missing: key of the cache → request.
    cache: where answers are kept.

  Raises:
    UserError: the first problem. No further requests are sent after it; the
      answers to those in flight are awaited and kept.
  """
  run = _Run(
    calls=cache.total('calls'),
    tokens=cache.total('tokens'),
    stopped=asyncio.Event(),
  )
  questions = iter(missing.items())
  progress = tqdm.tqdm(
    total=len(missing),
    desc='judge',
    unit='call',
    leave=False,
    disable=None,
  )
  with progress:
    async with http_requests.open_client(server.address, server.key) as client:
      workers = []
      for _ in range(server.options.concurrency):
        workers.append(_work(server, run, client, questions, cache, progress))
      await asyncio.gather(*workers)
  if run.problems:
    raise run.problems[0]


async def _work(
  server: _Server,
  run: _Run,
  client: httpx.AsyncClient,
  questions: Iterator[tuple[str, dict]],
  cache: answer_cache.AnswerCache,
  progress: tqdm.tqdm,
) -> None:
  """Asks questions one after the other, until the iterator that all workers share is empty."""
  try:
    while not run.stopped.is_set():
      question = next(questions, None)
      if question is None:
        return
      key, request = question
      row = await _ask(server, run, client, request)
      if row is not None:
        cache.keep({'key': key, 'model': server.options.model, **row})
        progress.update()
  except UserError as error:
    run.problems.append(error)
    run.stopped.set()


async def _ask(
  server: _Server,
  run: _Run,
  client: httpx.AsyncClient,
  request: dict,
) -> dict | None:
  """Asks one question, and retries where that may help.

  Returns:
    The answer as a row of the cache, or None where another question has stopped
    the run.

  Raises:
    UserError: the server refuses, all retries failed, or a limit of the options
      is reached.
  """
  options = server.options
  calls = 0  # replies with status 200, which are paid for
  tries = 0  # failed ones before the current one
  while not run.stopped.is_set():
    if server.refuses_logprobs:
      request = _without_logprobs(request)
    _check_bounds(run, options)
    run.calls += 1  # before it is sent, so that concurrent requests see it
    reply = await http_requests.post_json(
      client,
      server.address,
      request,
      options.timeout,
    )
    if reply.status == 200:
      calls += 1
      try:
        row = _read_reply(reply.body, request, server)
      except _NOT_A_COMPLETION:
        problem = f'its answer is not a chat completion: {server.excerpt(reply.body)}'
      else:
        run.tokens += row['tokens']
        return {**row, 'calls': calls}
    else:
      run.calls -= 1
      problem = reply.body
      if reply.status:
        problem = f'it answered {reply.status}: {server.excerpt(reply.body)}'
    if reply.status in (400, 422) and 'logprobs' in request:
      server.refuses_logprobs = True
      consequence = 'continuing without log-probabilities: verdicts are read from the text'
      server.warn_once('logprobs', f'{problem}; {consequence}')
      continue
    _check_retry(reply, problem, tries, options)
    server.warn_once(reply.status or reply.body, f'{problem}; trying again')
    delay = http_requests.retry_delay(
      tries,
      reply.pause,
      options.backoff,
      options.longest_wait,
    )
    tries += 1
    # Waits for the delay, but no longer than until another question stops the run.
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(run.stopped.wait(), delay)
  return None


def _check_bounds(run: _Run, options: EndpointOptions) -> None:
  """Raises UserError where a limit of the options is reached."""
  too_many_calls = 0 < options.max_calls <= run.calls
  too_many_tokens = 0 < options.max_total_tokens <= run.tokens
  if too_many_calls or too_many_tokens:
    raise UserError(
      f'max_calls or max_total_tokens is reached: {run.calls} calls, {run.tokens} tokens'
    )


def _check_retry(
  reply: http_requests.Reply,
  problem: str,
  tries: int,
  options: EndpointOptions,
) -> None:
  """Raises UserError where the request must not be retried."""
  if reply.is_refusal:
    hint = ''
    if reply.status in (401, 403):
      hint = f' (is the key in {options.key_env} right?)'
    raise UserError(problem + hint)
  if reply.pause > options.longest_wait or tries >= options.retries:
    request_to_wait = ''
    if reply.pause:
      request_to_wait = f'; it asks to wait {reply.pause:.0f} s'
    raise UserError(f'{problem}; tried {tries + 1} times{request_to_wait}')


def _without_logprobs(request: Mapping[str, Any]) -> dict:
  """Returns a request without the fields that ask for log-probabilities."""
  return {name: value for name, value in request.items() if 'logprobs' not in name}


def _read_reply(body: str, request: Mapping[str, Any], server: _Server) -> dict:
  """Reads a chat completion into a row of the cache.

  Returns:
    A dict with `probability` (None = no verdict), `by` (read from 'logprobs' or
    'text'), `text` and `tokens`.

  Raises:
    Any of _NOT_A_COMPLETION: the body is not a chat completion.
  """
  completion = json.loads(body)
  choice = completion['choices'][0]
  # str.strip raises a TypeError where the content is not a text.
  text = str.strip(choice['message']['content'] or '')
  tokens = (choice.get('logprobs') or {}).get('content') or []
  if server.options.logprobs and not tokens:
    message = 'it returns no log-probabilities; verdicts are read from the text'
    server.warn_once('logprobs', message)
  thought = server.options.thought > 0
  probability, by = verdicts.read_verdict(text, tokens, server.patterns, thought)
  total_tokens = (completion.get('usage') or {}).get('total_tokens')
  if not total_tokens:  # estimated: about four characters a token
    characters = len(json.dumps(request['messages'])) + len(text)
    total_tokens = characters // 4
  return dict(
    probability=probability,
    by=by,
    text=http_requests.hide_key(text, server.key),
    tokens=max(0, int(total_tokens)),
  )


def build_request(
  comparison: judging.Comparison,
  options: EndpointOptions,
) -> tuple[dict, str]:
  """Builds the body of a request and the key of its answer in the cache.

  Args:
    comparison: what is asked about.
    options: how the server is asked.

  Returns:
    The body, and the key: a hash of everything that the answer depends on. The
    address of the server is not part of it.

  Raises:
    LookupError, ValueError: the template is not a format string of the fields
      of `judging.fill_template`.
  """
  ending = options.think if options.thought else options.ending
  question = judging.fill_template(options.template, comparison) + ending
  messages = []
  if options.system:
    messages.append(dict(role='system', content=options.system))
  messages.append(dict(role='user', content=question))
  request = dict(
    model=options.model,
    messages=messages,
    max_tokens=options.thought + options.max_tokens,
    temperature=options.temperature,
  )
  if options.logprobs:
    request.update(logprobs=True, top_logprobs=options.logprobs)
  request.update(options.extra)
  request = {name: value for name, value in request.items() if value is not None}
  depends_on = [request, options.options, options.thought]
  text = json.dumps(depends_on, sort_keys=True)
  return request, hashlib.sha256(text.encode()).hexdigest()


def _completions_address(url: str) -> str:
  """Returns the URL of a server's chat completions."""
  expected = f'judge: expected a URL like {_EXAMPLE_URL}, without user or query'
  message = f'{expected} (put a key into the environment variable that key_env names)'
  base = http_requests.check_address(url, message)
  return base.removesuffix(_PATH) + _PATH


def _check_options(options: EndpointOptions) -> None:
  """Raises UserError where an option is invalid."""
  if not options.model:
    raise UserError("judge: expected a model, got ''")
  are_words = all(
    isinstance(option, str) and re.fullmatch(r'\w+', option) for option in options.options
  )
  are_two = len(options.options) == len(set(options.options)) == 2
  if not are_two or not are_words:
    raise UserError(f'judge: expected two different words as options, got {options.options}')
  options_lib.check_ranges(options, 'judge')
  _check_clamp(options.clamp)
  _check_template(options.template)
  empty = judging.Comparison([dict(role='user', content='')], '', '')
  try:
    build_request(empty, options)
  except (LookupError, ValueError) as error:
    raise UserError(f'judge: template: {type(error).__name__}: {error}') from None


def _check_clamp(clamp: Sequence[Any]) -> None:
  """Raises UserError unless a range of probabilities is one."""
  are_numbers = len(clamp) == 2 and all(type(value) in (int, float) for value in clamp)
  if not are_numbers or not 0 <= clamp[0] <= clamp[1] <= 1:
    raise UserError(f'judge: clamp: expected two probabilities in their order, got {clamp}')


def _check_template(template: str) -> None:
  """Raises UserError for a template without its places, or with more than names in them."""
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise UserError(f'judge: template: {error}') from None
  names = {name for _, name, _, _ in parts if name is not None}
  plain = all(not form and not conversion for _, _, form, conversion in parts)
  asks = {'first', 'second'} <= names and names & {'conversation', 'question'}
  if not plain or not asks or not names <= _PLACES:
    known = ', '.join(f'{{{name}}}' for name in sorted(_PLACES))
    raise UserError(
      f'judge: template: expected {{first}}, {{second}} and {{conversation}} or {{question}}, of '
      f'{known}, got {template!r:.80}'
    )
