"""A server as judge: any that speaks the OpenAI chat-completions protocol (vLLM, SGLang, `transformers serve`, hosted).

  P(A) / (P(A) + P(B))  of the token with which the answer states its option, over the most probable tokens

Where the server gives no log-probabilities, the verdict is read from the text: 1, 0, or 0.5 for a tie. What states no
verdict gets none (NaN). Answers are kept in a file as they come, so that no question is asked, or paid for, twice.
"""

import asyncio
import contextlib
import email.utils
import fcntl
import hashlib
import json
import logging
import math
import os
from pathlib import Path
import random
import re
import time
import types

import httpx
import ml_collections
import numpy as np
import tqdm

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging

DEFAULTS = dict(
    model='',  # as the server calls it; must be said
    key_env='OPENAI_API_KEY',  # the environment variable that holds the key; where it is empty, none is sent
    system='',  # a system message before the question; '' = none
    template='Consider the following conversation between a human and an assistant:\n\n{conversation}\n\n{principle}\n'
             'Options:\n(A) {first}\n(B) {second}\n\n',
    options=('A', 'B'),  # for the first, for the second answer
    ending='Answer with one letter, A or B, and nothing else.',  # behind the template
    thought=0,  # tokens of reasoning before the verdict; 0 = none
    think='Reason step by step, then write a last line that is "Answer: A" or "Answer: B".',  # then the ending
    clamp=(0.4, 0.6),  # of a probability after a thought
    max_tokens=16,  # of an answer, beside those of its thought
    temperature=0.0,
    logprobs=20,  # most probable tokens asked for, for soft labels; 0 = verdicts are read from the text
    extra=dict(),  # further fields of a request; None takes one away
    concurrency=8,  # calls at once
    timeout=60.0,  # seconds for a call
    retries=6,  # further tries of a call that failed, before the run stops
    backoff=1.0,  # seconds before the first of them, twice as many before each further one
    longest_wait=120.0,  # seconds between two tries; a server that asks for more stops the run
    max_calls=0,  # answers in the cache at most, over all runs; 0 = no bound
    max_total_tokens=0,  # of questions and answers, likewise; calls under way when it is reached come on top
)
_X = r'(?:[^\w\n]|_)*'  # spaces, brackets and marks of one line
_LEAD = (rf'(?:(?:so|thus|therefore|hence|overall)\b{_X})?(?:(?:the|my)\s+)?(?:(?:final|correct|better|best)\s+)?'
         rf'(?:(?:answer|verdict|choice|option|response|boxed)\b{_X}(?:is\b{_X})?){{0,2}}')


def build_endpoint_judge(url: str, config, cache: Path):
  """A judge (see judging) that is a server. Only one process may ask with a cache: process 0 where there are several.

  Args:
    url: the server's base, for example http://localhost:8000/v1, or the whole …/chat/completions.
    config: like DEFAULTS.
    cache: a .jsonl file, made if missing; a line for each answer.

  Raises:
    UserError: wrong url, config or key; and, when called: the server refuses a question, fails at all tries, or a bound
    of the config is reached. The answers that came are in the cache, and asking again goes on from there.
  """
  _check(config)
  key = os.environ.get(config.key_env, '').strip()
  if not re.fullmatch(r'[!#-\[\]-~]*', key):
    raise UserError(f'{config.key_env}: expected a key of ASCII letters, digits and signs without spaces')
  server = types.SimpleNamespace(address=_address(url), config=config, patterns=_patterns(config.options), key=key,
                                 scrub=lambda text: text.replace(key, '…') if key else text, plain=False, warned=set())

  def judge(comparisons):
    requests = [_request(comparison, config) for comparison in comparisons]
    with _opened(Path(cache)) as (kept, keep):
      waiting = {name: request for request, name in requests if name not in kept}
      said = lambda problem: (f'judge {server.address}: {problem}; {len(kept)} label(s) are kept in {cache}, and the '
                              'same command goes on from there')
      try:
        asyncio.run(_ask_all(server, waiting, kept, keep))
      except UserError as error:
        raise UserError(said(error)) from None
      except KeyboardInterrupt:
        logging.warning(said('stopped'))
        raise
      rows = [kept[name] for _, name in requests]
    probabilities = np.array([row['probability'] for row in rows], float)  # None, no verdict, is NaN
    if config.thought:
      probabilities = np.clip(probabilities, *config.clamp)  # leaves NaN as it is
    return judging.Judgements(probabilities, [row['text'] for row in rows])

  return judge


async def _ask_all(server, waiting, kept, keep):
  """Asks all that is waiting, name → request, and keeps each answer as it comes. At the first UserError no more
  calls are made, those under way are waited for, and their answers kept."""
  total = lambda name: sum(row[name] for row in kept.values())
  run = types.SimpleNamespace(calls=total('calls'), tokens=total('tokens'), stopped=asyncio.Event(), problems=[])
  questions = iter(waiting.items())
  headers = {'content-type': 'application/json', **({'authorization': f'Bearer {server.key}'} if server.key else {})}
  here = re.fullmatch(r'localhost|127\.[\d.]+|::1|0\.0\.0\.0', httpx.URL(server.address).host)  # no proxy leads here

  async def work(client, shown):
    try:
      while not run.stopped.is_set() and (question := next(questions, None)):
        if row := await _ask(server, run, client, question[1]):
          keep({'key': question[0], 'model': server.config.model, **row})
          shown.update()
    except UserError as error:
      run.problems.append(error)
      run.stopped.set()

  with tqdm.tqdm(total=len(waiting), desc='judge', unit='call', leave=False, disable=None) as shown:
    async with httpx.AsyncClient(headers=headers, timeout=None, trust_env=not here) as client:
      await asyncio.gather(*(work(client, shown) for _ in range(server.config.concurrency)))
  if run.problems:
    raise run.problems[0]


async def _ask(server, run, client, request):
  """The answer to one request, as a row of the cache; None where others have stopped the run. UserError: no answer."""
  config, calls, tries = server.config, 0, 0
  while not run.stopped.is_set():
    if server.plain:
      request = {name: value for name, value in request.items() if 'logprobs' not in name}
    if 0 < config.max_calls <= run.calls or 0 < config.max_total_tokens <= run.tokens:
      raise UserError(f'max_calls or max_total_tokens is reached: {run.calls} calls, {run.tokens} tokens')
    run.calls += 1  # before it is sent, for the others to see
    status, body, pause = await _post(client, server.address, request, config.timeout)
    trouble = f'it answered {status}: {_excerpt(body, server)}' if status else body
    if status == 200:
      calls += 1
      try:
        row = _read(body, request, server)
        run.tokens += row['tokens']
        return {**row, 'calls': calls}
      except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        trouble = f'its answer is no chat completion: {_excerpt(body, server)}'
    else:
      run.calls -= 1
    if status in (400, 422) and 'logprobs' in request:
      server.plain = True
      _warn(server, 'logprobs', f'{trouble}; going on without log-probabilities, verdicts are read from the text')
      continue
    if 300 <= status < 500 and status not in (408, 409, 429):
      raise UserError(trouble + (f' (is the key in {config.key_env} right?)' if status in (401, 403) else ''))
    if pause > config.longest_wait or tries >= config.retries:
      raise UserError(f'{trouble}; tried {tries + 1} times' + (f'; it asks to wait {pause:.0f} s' if pause else ''))
    _warn(server, status or body, f'{trouble}; trying again')
    wait = config.backoff if pause else min(config.longest_wait, config.backoff * 2 ** min(tries, 30))
    tries += 1
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(run.stopped.wait(), pause + wait * random.uniform(0.5, 1))


async def _post(client, address, request, timeout):
  """(status, body, seconds that the server asks to wait); 0 with the reason as body where no answer came."""
  try:
    async with asyncio.timeout(timeout):
      answer = await client.post(address, content=json.dumps(request).encode())
  except TimeoutError:
    return 0, f'no answer in {timeout:g} s', 0.0
  except (httpx.TransportError, httpx.DecodingError) as error:
    return 0, f'{type(error).__name__}: {error}'.strip(': '), 0.0
  after, pause = answer.headers.get('retry-after', ''), 0.0
  with contextlib.suppress(TypeError, ValueError):  # seconds, or a date
    pause = float(after) if after[:1].isdigit() else email.utils.parsedate_to_datetime(after).timestamp() - time.time()
  return answer.status_code, answer.text, max(0.0, pause)


def _read(body, request, server):
  """A chat completion as a row: probability (None = no verdict), by, text, tokens. Fails on anything else."""
  said = json.loads(body)
  choice = said['choices'][0]
  text = str.strip(choice['message']['content'] or '')
  content = (choice.get('logprobs') or {}).get('content') or []
  if server.config.logprobs and not content:
    _warn(server, 'logprobs', 'it gives no log-probabilities; verdicts are read from the text')
  probability, by = _verdict(text, content, server.config, server.patterns)
  tokens = int((said.get('usage') or {}).get('total_tokens') or (len(json.dumps(request['messages'])) + len(text)) // 4)
  return dict(probability=probability, by=by, text=server.scrub(text), tokens=max(0, tokens))


def _verdict(text, content, config, patterns):
  """(probability or None, 'logprobs' or 'text'). Of a thought's verdicts the last counts; else they must agree."""
  line, beginning = patterns
  begin = text.rfind('</think>') + len('</think>') if '</think>' in text else 0
  found = list(line.finditer(text[begin:]))
  said = [match['option'] or 'tie' for match in found]
  clear = bool(found) and (config.thought > 0 or len(set(said)) == 1)
  stated = beginning.match(text[begin:]) if not config.thought else found[-1] if clear else None
  if content and stated and stated['option']:
    soft = _soft(content, stated['option'], begin + stated.start('option'), config.options)
    if soft is not None:
      return soft, 'logprobs'
  return {config.options[0]: 1.0, config.options[1]: 0.0, 'tie': 0.5}[said[-1]] if clear else None, 'text'


def _soft(content, option, at, options):
  """P(first) / (P(first) + P(second)) of the token that states the option at character `at`; None if no token does."""
  bare = lambda token: re.sub(r'^[\W_]+|[\W_]+$', '', token)
  starts = np.cumsum([0, *(len(entry['token']) for entry in content)])
  places = [i for i, entry in enumerate(content) if bare(entry['token']) == option]
  if not places:
    return None
  entry = content[min(places, key=lambda i: abs(starts[i] - at))]
  likely = {item['token']: item['logprob'] for item in [entry, *(entry.get('top_logprobs') or [])]}
  first, second = (math.fsum(math.exp(logprob) for token, logprob in likely.items() if bare(token) == option)
                   for option in options)
  return first / (first + second)


def _patterns(options):
  """Of a line that is a verdict and nothing else, and of an answer that begins with an option."""
  option = rf'(?P<option>{"|".join(options)})'
  line = rf'^{_X}(?i:{_LEAD})(?:{option}|(?i:(?:a\s+)?tie))(?![^\W_]){_X}(?i:is\s+better\b{_X})?$'
  prose = rf'{_X}(?<=\s)(?!because\b|since\b|is better\b)[a-z]'  # 'A better answer …' begins with an article
  return re.compile(line, re.MULTILINE), re.compile(rf"[\W_]*(?i:{_LEAD}){option}(?![^\W_]|')(?!{prose})")


def _request(comparison, config):
  """The body of a request, and what its answer is kept under: all that it depends on, but not where the server is."""
  question = config.template.format(conversation=judging.transcript(comparison.messages), first=comparison.first,
                                    second=comparison.second, principle=comparison.principle,
                                    question=comparison.messages[-1]['content'])
  user = dict(role='user', content=question + (config.think if config.thought else config.ending))
  messages = [dict(role='system', content=config.system), user] if config.system else [user]
  request = dict(model=config.model, messages=messages, max_tokens=config.thought + config.max_tokens,
                 temperature=config.temperature)
  if config.logprobs:
    request.update(logprobs=True, top_logprobs=config.logprobs)
  request.update(ml_collections.ConfigDict(dict(config.extra)).to_dict())
  request = {name: value for name, value in request.items() if value is not None}
  depends = json.dumps([request, config.options, config.thought], sort_keys=True)
  return request, hashlib.sha256(depends.encode()).hexdigest()


@contextlib.contextmanager
def _opened(path):
  """({name: row}, keep(row)) of a cache. A last line that a kill cut off is taken away."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+b', buffering=0)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    said = 'another process is asking with this cache' if isinstance(error, BlockingIOError) else error.strerror
    raise UserError(f'{path}: {said}') from None
  with file:
    file.seek(0)
    *lines, torn = file.read().split(b'\n')
    file.truncate(file.tell() - len(torn))
    rows = {}
    for number, line in enumerate(lines, 1):
      try:
        row = json.loads(line)
        rows[row['key']] = {name: row[name] for name in ('probability', 'text', 'calls', 'tokens')}
      except (ValueError, LookupError, TypeError):
        raise UserError(f"{path}:{number}: expected a judge's answer; take the line away to ask again") from None

    def keep(row):
      file.write(json.dumps(row).encode() + b'\n')
      os.fsync(file.fileno())
      rows[row['key']] = row

    yield rows, keep


def _warn(server, kind, text):
  if kind not in server.warned:
    server.warned.add(kind)
    logging.warning('judge %s: %s', server.address, text)


def _address(url):
  with contextlib.suppress(httpx.InvalidURL, TypeError):
    said = httpx.URL(url)
    if said.scheme in ('http', 'https') and said.host and not (said.userinfo or said.query or said.fragment):
      return str(said).rstrip('/').removesuffix('/chat/completions') + '/chat/completions'
  raise UserError('judge: expected a URL like http://localhost:8000/v1, without user or query (config: key_env)')


def _check(config):
  words = len(set(config.options)) == 2 and all(re.fullmatch(r'\w+', option) for option in config.options)
  if not config.model or not words or config.concurrency < 1 or config.timeout <= 0 or len(config.clamp) != 2:
    raise UserError('judge: expected a model, two words as options, concurrency from 1, timeout above 0, two numbers to '
                    f'clamp to, got {config.model!r}, {config.options}, {config.concurrency}, {config.timeout}, {config.clamp}')
  try:
    _request(judging.Comparison([dict(role='user', content='')], '', ''), config)
  except (LookupError, ValueError) as error:
    raise UserError(f'judge: template: {type(error).__name__}: {error}') from None


def _excerpt(body, server) -> str:
  with contextlib.suppress(ValueError, RecursionError):
    body = json.dumps(json.loads(body), ensure_ascii=False)  # a key with escapes is found too
  return ' '.join(server.scrub(body).split())[:200] or 'nothing'
