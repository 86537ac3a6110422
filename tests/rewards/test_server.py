"""Rewards from a server, against a real one in this process."""

import contextlib
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import server, sources

KEY = 'sk-very/secret-0123456789'


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers the n-th request, from 0, with script(n, request): a body or (status, body)."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['content-length'])))
    with self.server.lock:
      number = len(self.server.requests)
      self.server.requests.append((self.path, dict(self.headers), body))
    said = self.server.script(number, body)
    status, answer = said if isinstance(said, tuple) else (200, said)
    answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    self.send_response(status)
    self.send_header('content-length', str(len(answer)))
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *_):
    pass


@pytest.fixture
def serve():
  """serve(script) → a running server with its `url` and the `requests` it got."""
  with contextlib.ExitStack() as stack:

    def start(script):
      running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
      stack.enter_context(running)
      running.handle_error = lambda *_: None  # a client that went away
      running.script, running.requests, running.lock = script, [], threading.Lock()
      running.url = f'http://127.0.0.1:{running.server_port}/score'
      threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
      stack.callback(running.shutdown)
      return running

    yield start


def lengths(request):
  return {'scores': [len(text) for text in request['responses']]}


def score(url, responses, **changes):
  options = server.ServerOptions(**{'backoff': 0.01, 'retries': 2, **changes})
  conversations = [[dict(role='user', content=f'Why {i}?')] for i in range(len(responses))]
  return server.build_server_reward(url, options)(conversations, responses, [None] * len(responses))


def test_what_is_asked_and_what_comes_back(serve, monkeypatch):
  running = serve(lambda n, request: lengths(request))
  values, failed = score(running.url, ['a', 'bb', '\u2028é'])
  assert values.tolist() == [1, 2, 2] and values.dtype == np.float32 and failed == 0
  path, headers, body = running.requests[0]
  assert path == '/score' and 'authorization' not in headers
  prompts = [[{'role': 'user', 'content': f'Why {i}?'}] for i in range(3)]
  assert body == {'prompts': prompts, 'responses': ['a', 'bb', '\u2028é']}
  monkeypatch.setenv('REWARD_KEY', KEY)
  score(running.url, ['a'], key_env='REWARD_KEY')
  assert running.requests[1][1]['authorization'] == f'Bearer {KEY}'
  assert score(running.url, [])[0].shape == (0,) and len(running.requests) == 2


def test_many_responses_go_in_parts_and_keep_their_order(serve):
  running = serve(lambda n, request: time.sleep(0.03 * (n == 0)) or lengths(request))
  responses = ['a' * i for i in range(37)]
  values, _ = score(running.url, responses, request_size=5, concurrency=3)
  assert values.tolist() == [float(i) for i in range(37)]
  sizes = sorted(len(body['responses']) for _, _, body in running.requests)
  assert sizes == [2] + [5] * 7


def test_a_source_of_this_kind(serve):
  running = serve(lambda n, request: lengths(request))
  source = sources.parse_reward_source(running.url)
  opened = sources.open_reward_source(source, sources.RewardSourceOptions(), None)
  values, failed = opened([[]] * 2, ['a', 'bb'], [None] * 2)
  assert values.tolist() == [1, 2] and failed == 0


@pytest.mark.parametrize('trouble', [(429, {}), (503, b''), (500, b'oops')])
def test_a_temporary_failure_is_retried(serve, trouble):
  running = serve(lambda n, request: trouble if n < 2 else lengths(request))
  values, failed = score(running.url, ['a', 'bb'])
  assert values.tolist() == [1, 2] and failed == 0 and len(running.requests) == 3


@pytest.mark.parametrize('status', [400, 413, 422, 500])
def test_a_bad_response_costs_only_itself(serve, caplog, status):
  def script(n, request):
    return (status, b'too odd') if 'bad' in request['responses'] else lengths(request)

  running = serve(script)
  responses = ['fine', 'bad', 'fine', 'x']
  values, failed = score(running.url, responses, failed_score=-1.0, retries=1, request_size=3)
  assert values.tolist() == [4, -1, 4, 1] and failed == 1
  assert f'it answered {status}: too odd' in caplog.text
  assert 'such responses score -1 and are counted' in caplog.text


def test_a_score_that_is_none_or_not_finite(serve, caplog):
  body = b'{"scores": [0.5, null, NaN, Infinity, 1]}'
  running = serve(lambda n, request: (200, body))
  values, failed = score(running.url, ['a'] * 5, failed_score=-2.0)
  assert values.tolist() == [0.5, -2, -2, -2, 1] and failed == 3
  assert 'a score is null or not finite' in caplog.text


def test_an_answer_that_takes_too_long(serve):
  running = serve(
    lambda n, request: time.sleep(0.5 * ('slow' in request['responses'])) or lengths(request)
  )
  values, failed = score(running.url, ['slow', 'a'], timeout=0.2, retries=1, request_size=1)
  assert values.tolist() == [0, 1] and failed == 1 and len(running.requests) == 3
  with pytest.raises(
    UserError, match='no answer in 0.2 s; tried 2 times; it failed on every response'
  ):
    score(running.url, ['slow', 'slow'], timeout=0.2, retries=1)


def test_a_server_that_is_down():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{free.getsockname()[1]}/score'
  with pytest.raises(
    UserError, match=f'reward {url}: ConnectError.*tried 3 times; it failed on every'
  ) as error:
    score(url, ['a'] * 40)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('status', [301, 401, 404])
def test_a_refusal_stops_at_once_and_the_key_stays_secret(serve, monkeypatch, caplog, status):
  monkeypatch.setenv('REWARD_KEY', KEY)
  running = serve(lambda n, request: (status, f'no {KEY}'.encode()))
  with pytest.raises(UserError, match=f'reward {running.url}: it answered {status}: no …') as error:
    score(running.url, ['a'] * 40, key_env='REWARD_KEY', concurrency=1)
  assert len(running.requests) == 1 and 'secret' not in str(error.value) + caplog.text


@pytest.mark.parametrize(
  'body',
  [
    b'',
    b'[1]',
    b'{"scores": [1]}',
    b'{"scores": ["x", 1]}',
    b'{"score": [1, 2]}',
    b'{"scores": 3}',
  ],
)
def test_what_is_no_list_of_scores(serve, body):
  running = serve(lambda n, request: (200, body))
  with pytest.raises(UserError) as error:
    score(running.url, ['a', 'b'])
  said = str(error.value)
  assert (
    f'reward {running.url}: expected {{"scores": [2 numbers]}}, got ' in said and '\n' not in said
  )


@pytest.mark.parametrize(
  'url', ['http://user:secret@host/', 'http://host/?key=secret', 'http://', 'https://[::1']
)
def test_wrong_urls(url):
  with pytest.raises(UserError, match='reward: expected a URL') as error:
    server.build_server_reward(url, server.ServerOptions())
  assert 'secret' not in str(error.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(request_size=0), 'request_size: expected a number from 1, got 0'),
    (dict(concurrency=0), 'concurrency: expected a number from 1'),
    (dict(timeout=0.0), 'reward_server.timeout: expected a number above 0'),
  ],
)
def test_wrong_options(changes, message):
  with pytest.raises(UserError, match=message):
    server.build_server_reward('http://localhost/', server.ServerOptions(**changes))
