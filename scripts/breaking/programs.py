"""What other programs say and do: servers of judges, their caches, reward functions."""

from collections.abc import Iterator
import contextlib
import functools
import gzip
import http.server
import json
import os
from pathlib import Path
import sys
import threading
from typing import Any

from breaking.cases import Case, odd_files, truncations

GOOD = {'choices': [{'message': {'content': 'A'}}], 'usage': {'total_tokens': 3}}
BODIES: tuple[Any, ...] = (
  {},
  {'choices': []},
  {'choices': None},
  {'choices': {}},
  {'choices': [None]},
  {'choices': [5]},
  {'choices': [{}]},
  {'choices': [{'message': None}]},
  {'choices': [{'message': {}}]},
  {'choices': [{'message': {'content': 5}}]},
  {'choices': [{'message': {'content': ['A']}}]},
  {'choices': [{'message': {'content': {'text': 'A'}}}]},
  {'choices': [{'message': {'content': 'A'}, 'logprobs': 5}]},
  {'choices': [{'message': {'content': 'A'}, 'logprobs': {'content': 5}}]},
  {'choices': [{'message': {'content': 'A'}, 'logprobs': {'content': [5]}}]},
  {'choices': [{'message': {'content': 'A'}, 'logprobs': {'content': [{'top_logprobs': 5}]}}]},
  {**GOOD, 'usage': 5},
  {**GOOD, 'usage': {'total_tokens': 'many'}},
  {**GOOD, 'usage': {'total_tokens': [1]}},
  {**GOOD, 'usage': {'total_tokens': 1e400}},
  [],
  'text',
  5,
  None,
)


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers every request with the same reply."""

  reply: tuple[int, dict[str, str], bytes] = (200, {}, b'')

  def do_POST(self) -> None:
    """Answers."""
    self.rfile.read(int(self.headers.get('content-length', 0)))
    status, headers, body = self.reply
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    if 'content-length' not in map(str.lower, headers):
      self.send_header('content-length', str(len(body)))
    self.end_headers()
    with contextlib.suppress(OSError):
      self.wfile.write(body)

  def log_message(self, *_: Any) -> None:
    """Says nothing."""


@contextlib.contextmanager
def _serving(reply: tuple[int, dict[str, str], bytes]) -> Iterator[str]:
  """Runs a server; yields its address."""
  handler = type('Handler', (_Handler,), {'reply': reply})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  server.daemon_threads = True
  threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_address[1]}'
  finally:
    server.shutdown()
    server.server_close()


def endpoint_cases() -> Iterator[Case]:
  """Yields servers that answer oddly, wrong addresses and options, damaged caches."""
  for body in BODIES:
    refuse = not (isinstance(body, dict) and 'usage' in body)
    yield _endpoint(f'{body!r:.70}', (200, {}, json.dumps(body).encode()), refuse)
    yield _server_reward(f'{body!r:.70}', (200, {}, json.dumps(body).encode()), True)
  for scores in (
    [],
    [1, 2, 3],
    ['x'],
    [None],
    [[1]],
    'x',
    5,
    None,
    {'a': 1},
    [float('nan')],
    [1e400],
  ):
    body = json.dumps({'scores': scores}).encode()
    yield _server_reward(f'scores {scores!r}', (200, {}, body), True)
  for name, data in odd_files():
    yield _endpoint(name, (200, {}, data), True)
    yield _server_reward(name, (200, {}, data), True)
  good = json.dumps(GOOD).encode()
  for name, data in truncations(good, 12):
    yield _endpoint(name, (200, {}, data), True)
  bomb = gzip.compress(bytes(400 * 2**20), 9)
  replies: tuple[tuple[str, tuple[int, dict[str, str], bytes]], ...] = (
    ('a gzip bomb', (200, {'Content-Encoding': 'gzip'}, bomb)),
    ('no gzip', (200, {'Content-Encoding': 'gzip'}, b'{}')),
    ('cut gzip', (200, {'Content-Encoding': 'gzip'}, gzip.compress(good)[:-20])),
    ('deflate that is none', (200, {'Content-Encoding': 'deflate'}, good)),
    ('20 MB', (200, {}, b'{"a":"' + b'x' * 20 * 2**20 + b'"}')),
    ('fewer bytes than stated', (200, {'Content-Length': '9999'}, good)),
    ('an unknown charset', (200, {'Content-Type': 'text/plain; charset=nothing'}, b'\xff{')),
    ('a charset that is no text', (200, {'Content-Type': 'text/plain; charset=zlib'}, b'x')),
    ('utf-7', (200, {'Content-Type': 'text/plain; charset=utf-7'}, b'+AHs-')),
    ('a redirect', (302, {'Location': 'http://localhost:1/'}, b'')),
    ('a redirect to itself', (307, {'Location': '/'}, b'')),
    ('a long Retry-After', (429, {'Retry-After': '99999999999'}, b'')),
    ('an odd Retry-After', (429, {'Retry-After': '9' * 400}, b'')),
    ('Retry-After of a date', (429, {'Retry-After': 'Wed, 99 Nov 9999 99:99:99 GMT'}, b'')),
    ('Retry-After nan', (503, {'Retry-After': 'nan'}, b'')),
    *((f'status {status}', (status, {}, b'no')) for status in (400, 401, 403, 404, 422, 500, 503)),
    ('an escape sequence', (404, {}, b'\x1b[2J\x1b]0;title\x07')),
  )
  for name, reply in replies:
    yield _endpoint(name, reply, True)
    yield _server_reward(name, reply, True)
  for url in (
    '',
    'localhost',
    'ftp://localhost',
    'http://',
    'http://[::1',
    'http://localhost:99999',
    'http://localhost:x',
    'http://localhost:-1',
    'http://user:secret@localhost',
    'http://localhost/?key=secret',
    'http://a..b/',
    'http://' + 'x' * 300 + '/',
    'http://\u2603\ud800/',
    'http://xn--a/',
    'http://%zz/',
    'http://local host/',
    'http://localhost\n/',
  ):
    yield _address(url)
  yield from _option_cases()
  row = json.dumps({'key': 'k', 'probability': 0.5, 'text': 'A', 'calls': 1, 'tokens': 1}).encode()
  for name, data in odd_files():
    yield _cache(name, row + b'\n' + data + b'\n' + row + b'\n', True)
  for key, wrong in (
    ('key', 5),
    ('key', []),
    ('probability', 'x'),
    ('probability', 7),
    ('probability', []),
    ('calls', 'x'),
    ('calls', None),
    ('tokens', {}),
    ('tokens', -5),
    ('text', 5),
  ):
    changed = json.dumps({**json.loads(row), key: wrong}).encode()
    yield _cache(f'{key} is {wrong!r}', changed + b'\n', True)
  for name, data in truncations(row, 10):
    yield _cache(f'cut in the middle: {name}', data + b'\n' + row + b'\n', True)
    yield _cache(f'cut at the end: {name}', row + b'\n' + data, False)


def _judge(folder: Path, url: str, **changes: Any) -> Any:
  from rlhf_jax.feedback import endpoint, judging

  settings = {'model': 'm', 'key_env': '', 'retries': 1, 'backoff': 0.01, 'timeout': 5.0}
  options = endpoint.EndpointOptions(**{**settings, **changes})
  judge = endpoint.build_endpoint_judge(url, options, folder / 'cache.jsonl')
  question = [{'role': 'user', 'content': 'Why?'}]
  return judge([judging.Comparison(question, 'So.', 'No.')])


def _endpoint(name: str, reply: tuple[int, dict[str, str], bytes], refuse: bool) -> Case:
  def run(folder: Path) -> None:
    with _serving(reply) as url:
      _judge(folder, url)

  return Case('endpoint and cache', f'judge: {name}', run, '127.0.0.1', refuse)


def _server_reward(name: str, reply: tuple[int, dict[str, str], bytes], refuse: bool) -> Case:
  def run(folder: Path) -> None:
    from rlhf_jax.rewards import server

    with _serving(reply) as url:
      options = server.ServerOptions(retries=1, backoff=0.01, timeout=5.0)
      server.build_server_reward(url, options)([[{'role': 'user', 'content': 'x'}]], ['y'], [None])

  return Case('endpoint and cache', f'reward: {name}', run, '127.0.0.1', refuse)


def _address(url: str) -> Case:
  return Case(
    'endpoint and cache', f'address {url!r:.40}', lambda folder: _judge(folder, url), 'judge'
  )


def _option_cases() -> Iterator[Case]:
  for name, value in (
    ('template', 'no places at all'),
    ('template', '{conversation} {first}'),
    ('template', '{nothing} {first} {second}'),
    ('template', '{first'),
    ('template', '{first.__class__}{second}{conversation}'),
    ('template', '{first:>999999999}{second}{conversation}'),
    ('template', '{0}'),
    ('options', ()),
    ('options', ('A',)),
    ('options', ('A', 'A')),
    ('options', ('A', 5)),
    ('clamp', (0.9, 0.1)),
    ('clamp', ('a', 'b')),
    ('concurrency', 0),
    ('timeout', 0.0),
    ('timeout', float('nan')),
    ('max_tokens', 0),
    ('temperature', float('nan')),
    ('temperature', -1.0),
    ('logprobs', -1),
    ('retries', -1),
    ('backoff', -1.0),
    ('model', ''),
    ('thought', -1),
  ):

    def run(folder: Path, name: str = name, value: Any = value) -> None:
      with _serving((200, {}, json.dumps(GOOD).encode())) as url:
        _judge(folder, url, **{name: value})

    yield Case('endpoint and cache', f'option {name} = {value!r:.40}', run, name)

  for key in (
    'se\ncret-key',
    'se\rcret-key',
    'secret-\u2603-key',
    'secret-\x00-key',
    'secret-key ',
  ):

    def with_key(folder: Path, key: str = key) -> None:
      with contextlib.suppress(ValueError):  # no variable can hold zeros
        os.environ['BREAK_KEY'] = key
      with _serving((401, {}, b'wrong: ' + key.encode())) as url:
        try:
          _judge(folder, url, key_env='BREAK_KEY')
        except Exception as error:
          assert 'cret-' not in str(error) and 'secret' not in str(error), 'the key was shown'
          raise

    yield Case('endpoint and cache', f'key {key!r}', with_key, '')


def _cache(name: str, data: bytes, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    (folder / 'cache.jsonl').write_bytes(data)
    with _serving((200, {}, json.dumps(GOOD).encode())) as url:
      _judge(folder, url)

  return Case('endpoint and cache', f'cache: {name}', run, 'cache.jsonl', refuse)


# Reward functions: source, and whether the run must stop; else the response scores failed_score.
FUNCTIONS = (
  ("raise ValueError('x')", False),
  ("raise ValueError('\\x1b[31m' * 99)", False),
  ('raise SystemExit(0)', False),
  ("import sys; sys.exit('bye')", False),
  ('raise KeyboardInterrupt', False),
  ('raise GeneratorExit', False),
  ('raise BaseException("x")', False),
  ('import os; os._exit(0)', False),
  ('import os; os._exit(7)', False),
  ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)', False),
  ('import os, signal; os.kill(os.getpid(), signal.SIGTERM)', False),
  ('import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(1)', False),
  ('import time; time.sleep(60)', False),
  ('while True: pass', False),
  ('import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass', False),
  ('return "x" * 10**8', True),
  ('print("x" * 10**6); raise ValueError', False),
  ('raise ValueError("x" * 10**7)', False),
  (
    'import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n'
    'raise OSError',
    False,
  ),
  ('def f(): return f()\nreturn f()', False),
  ('return None', True),
  ('return []', True),
  ('return [None]', True),
  ('return ["x"]', True),
  ('return [float("nan")]', True),
  ('return [1.0, 2.0, 3.0]', True),
  ('return {"a": 1}', True),
  ('return 5', True),
  ('return [10**400]', True),
  ('class E(Exception):\n  def __str__(self): raise OSError\nraise E', False),
  ('class E(Exception):\n  def __reduce__(self): raise OSError\nraise E', False),
  ('import os; os.close(1); os.close(2); raise ValueError', False),
  ('import os; os.remove(__file__); raise ValueError', False),
  ('return [1j]', True),
)


def reward_cases() -> Iterator[Case]:
  """Yields reward functions that do what they should not, on one of two responses."""
  for number, (body, stops) in enumerate(FUNCTIONS):
    for workers in (2,) if number > 2 else (2, 0):
      yield _reward(number, body, stops, workers)
  for name in (
    'a:',
    ':a',
    'a:b(',
    'a:b(1)',
    'a:b(**x)',
    'a:b(x=y)',
    'no_such:f',
    'os:no_such',
    'os:name',
  ):
    yield Case('reward programs', f'name {name!r}', functools.partial(_open_reward, name), 'reward')


def _reward(number: int, body: str, stops: bool, workers: int) -> Case:
  def run(folder: Path) -> None:
    indented = '\n'.join(f'  {line}' for line in body.splitlines())
    source = 'def reward(prompts, responses, records):\n  if responses == ["good"]: return [1.0]\n'
    name = f'reward_{number}_{workers}'
    Path(f'{name}.py').write_text(source + indented + '\n')
    sys.path.insert(0, os.getcwd())
    from rlhf_jax.data.records import Prompt
    from rlhf_jax.rewards import functions

    options = functions.RewardFunctionOptions(workers=workers, seconds=2.0, failed_score=-1.0)
    score = functions.build_reward_function(f'{name}:reward', options)
    asked = [{'role': 'user', 'content': 'x'}]
    record = Prompt('1', '', '', asked, {})
    values, failed = score([asked] * 2, ['good', 'bad'], [record] * 2)
    assert values.tolist() == [1.0, -1.0] and failed == 1, (values, failed)

  title = f'{body.splitlines()[0][:50]!r}, {workers} workers'
  return Case('reward programs', title, run, f'reward_{number}', stops, 60.0)


def _open_reward(name: str, folder: Path) -> None:
  from rlhf_jax.rewards import functions

  del folder
  functions.build_reward_function(name)
