"""Against real HTTP servers: one in this process that plays a script, and slower ones.

The slow tests ask `transformers serve` and the server of llama.cpp.
"""

import contextlib
import email.utils
import fcntl
import http.server
import json
import math
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import ml_collections
import numpy as np
import pytest

from rlhf_jax import options
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import endpoint
from rlhf_jax.feedback.judging import Comparison

KEY = 'sk-very/secret-0123456789'


def completion(text, logprobs=None, tokens=10, **message):
  """A chat completion's body; logprobs: for each token (token, logprob, {other: logprob})."""

  def one(token, said):
    return {'token': token, 'logprob': said}

  content = logprobs and {
    'content': [
      {**one(token, said), 'top_logprobs': [one(*item) for item in {**other, token: said}.items()]}
      for token, said, other in logprobs
    ]
  }
  return {
    'choices': [
      {
        'index': 0,
        'message': {'role': 'assistant', 'content': text, **message},
        'logprobs': content,
        'finish_reason': 'stop',
      }
    ],
    'usage': {'total_tokens': tokens} if tokens else None,
  }


class Server(http.server.ThreadingHTTPServer):
  """Answers the n-th request, from 0, with script(n, request).

  A script gives a body (dict) or (status, body, headers).
  """

  daemon_threads, request_queue_size = True, 64

  def __init__(self, script):
    super().__init__(('127.0.0.1', 0), Handler)
    self.script, self.requests, self.lock, self.busy, self.most = script, [], threading.Lock(), 0, 0
    self.url = f'http://127.0.0.1:{self.server_port}/v1'

  def handle_error(self, *_):  # a client that went away
    pass


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_POST(self):
    server, body = self.server, json.loads(self.rfile.read(int(self.headers['content-length'])))
    with server.lock:
      number = len(server.requests)
      server.requests.append((self.path, dict(self.headers), body))
      server.busy += 1
      server.most = max(server.most, server.busy)
    said = server.script(number, body)
    status, answer, headers = said if isinstance(said, tuple) else (200, said, {})
    answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    self.send_response(status)
    for name, value in {'content-length': len(answer), 'connection': 'close', **headers}.items():
      self.send_header(name, value)
    with server.lock:
      server.busy -= 1
    self.end_headers()
    self.wfile.write(answer)

  def log_message(self, *_):
    pass


@pytest.fixture
def serve():
  """serve(script) → a running Server."""
  with contextlib.ExitStack() as stack:

    def start(script):
      server = stack.enter_context(Server(script))
      threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
      stack.callback(server.shutdown)
      return server

    yield start


@pytest.fixture(autouse=True)
def key(monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', KEY)


def config(**changes):
  quick = dict(model='wise', key_env='JUDGE_KEY', backoff=0.01, longest_wait=5.0, retries=2)
  return endpoint.EndpointOptions(**{**quick, **changes})


def comparisons(count):
  return [
    Comparison([dict(role='user', content=f'Why {i}?')], f'first {i}', f'second {i}', 'Be kind.')
    for i in range(count)
  ]


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def asked_for(request):
  """Which comparison a request is about."""
  return int(request['messages'][-1]['content'].split('Why ')[1].split('?')[0])


def test_what_is_asked_and_the_probability_of_the_options_tokens(serve, tmp_path):
  log = math.log
  server = serve(
    lambda n, request: completion(
      '(A)',
      [
        ('(', log(0.9), {'A': log(0.05), 'B': log(0.01)}),
        (
          'A',
          log(0.5),
          {' A': log(0.1), 'B': log(0.15), 'B)': log(0.05), 'C': log(0.1), 'b': log(0.1)},
        ),
      ],
    )
  )
  judged = endpoint.build_endpoint_judge(
    server.url, config(system='Judge.'), tmp_path / 'a' / 'cache.jsonl'
  )(comparisons(1))
  np.testing.assert_allclose(judged.probabilities, [0.6 / 0.8])
  assert judged.rationales == ['(A)'] and judged.probabilities.dtype == np.float64
  path, headers, body = server.requests[0]
  assert path == '/v1/chat/completions' and headers['authorization'] == f'Bearer {KEY}'
  question = (
    'Consider the following conversation between a human and an assistant:\n\n'
    'Human: Why 0?\n\nBe kind.\n'
    'Options:\n(A) first 0\n(B) second 0\n\nAnswer with one letter, A or B, and nothing else.'
  )
  assert body == {
    'model': 'wise',
    'temperature': 0.0,
    'max_tokens': 16,
    'logprobs': True,
    'top_logprobs': 20,
    'messages': [{'role': 'system', 'content': 'Judge.'}, {'role': 'user', 'content': question}],
  }


def test_a_section_of_a_config_as_options():
  extra = {'chat_template_kwargs': {'enable_thinking': False}, 'stop': ('a', {'b': 1})}
  section = ml_collections.ConfigDict(
    {**options.defaults(endpoint.EndpointOptions), 'extra': extra}
  )
  made = options.from_section(endpoint.EndpointOptions, section)
  plain = endpoint.EndpointOptions(extra=extra)
  requests = [endpoint.build_request(comparisons(1)[0], given) for given in (made, plain)]
  assert requests[0] == requests[1]
  assert requests[0][0]['chat_template_kwargs'] == {'enable_thinking': False}


def test_fields_of_a_request_added_and_taken_away(serve, tmp_path):
  server = serve(lambda n, request: completion('B'))
  extra = {
    'max_tokens': None,
    'max_completion_tokens': 7,
    'chat_template_kwargs': {'enable_thinking': False},
  }
  endpoint.build_endpoint_judge(
    server.url + '/chat/completions', config(extra=extra, logprobs=0), tmp_path / 'c'
  )(comparisons(1))
  path, _, body = server.requests[0]
  assert path == '/v1/chat/completions' and body.pop('messages')
  assert body == {
    'model': 'wise',
    'temperature': 0.0,
    'max_completion_tokens': 7,
    'chat_template_kwargs': {'enable_thinking': False},
  }


@pytest.mark.parametrize(
  'text, thought, expected',
  [
    ('A', 0, 1.0),
    ('B', 0, 0.0),
    ('(A)', 0, 1.0),
    (' B.', 0, 0.0),
    ('**A**', 0, 1.0),
    ('__B__', 0, 0.0),
    ('Answer: B', 0, 0.0),
    ('The answer is: (A).', 0, 1.0),
    ('Option B', 0, 0.0),
    ('[[A]]', 0, 1.0),
    ('tie', 0, 0.5),
    ('Answer: a tie', 0, 0.5),
    ('The better option is B', 0, 0.0),
    ('A is better.', 0, 1.0),
    (r'$\boxed{B}$', 0, 0.0),
    ('So the final answer is **B**', 0, 0.0),
    ('### Final answer: A', 0, 1.0),
    ('A\n\nIt is kinder, unlike B.', 0, 1.0),
    ('<think>B\nA</think>\n\nB', 0, 0.0),
    ('', 0, None),
    (None, 0, None),
    ('C', 0, None),
    ('A or B', 0, None),
    ('A\nB', 0, None),
    ('Neither', 0, None),
    ('A better answer is the second', 0, None),
    ('The answer is not A', 0, None),
    ('the answer is a', 0, None),
    ("I can't answer that.", 0, None),
    ('(A) is worse than (B)', 0, None),
    ('AB', 0, None),
    ('<think>A', 0, None),
    ('A is kind.\nAnswer: A\nNo, wait.\nAnswer: B', 9, 0.0),
    ('Answer: B\nsaid the other. Answer: A', 9, 0.0),
    ('I end with "Answer: A" or "Answer: B".', 9, None),
    ('A is rude, B is', 9, None),
  ],
)
def test_verdicts_in_texts(serve, tmp_path, text, thought, expected):
  server = serve(lambda n, request: completion(text))
  judged = endpoint.build_endpoint_judge(
    server.url, config(thought=thought, clamp=(0.0, 1.0)), tmp_path / 'cache.jsonl'
  )(comparisons(1))
  np.testing.assert_array_equal(judged.probabilities, [np.nan if expected is None else expected])
  clamped = endpoint.build_endpoint_judge(
    server.url, config(thought=thought), tmp_path / 'cache.jsonl'
  )(comparisons(1))
  np.testing.assert_array_equal(
    clamped.probabilities,
    np.clip(judged.probabilities, 0.4, 0.6) if thought else judged.probabilities,
  )
  assert len(server.requests) == 1  # what is kept is what was said
  assert judged.rationales == [(text or '').strip()]
  assert rows(tmp_path / 'cache.jsonl')[0]['probability'] == expected  # no verdict is kept as such


def test_the_tokens_of_a_verdict_behind_words_and_behind_a_thought(serve, tmp_path):
  even = {'A': math.log(0.3), 'B': math.log(0.1)}
  words = [
    ('The', -0.1, {'A': -3.0}),
    (' answer is', -0.1, {}),
    (' B', math.log(0.2), even),
    ('.', -0.1, {}),
  ]
  thought = [
    ('A', -0.1, {'B': -9.0}),
    (' lies', 0.0, {}),
    ('.\nAnswer:', 0.0, {}),
    (' A', math.log(0.5), {' B': math.log(0.25)}),
  ]
  article = [('A', -0.1, {'B': -3.0}), (' better answer is the second', -0.1, {})]

  def said(given):
    return completion(''.join(token for token, *_ in given), given)

  server = serve(lambda n, request: said([words, article][asked_for(request)]))
  judged = endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'a')(comparisons(2))
  np.testing.assert_allclose(judged.probabilities, [0.3 / 0.6, np.nan])
  server = serve(lambda n, request: said(thought))
  judged = endpoint.build_endpoint_judge(
    server.url, config(thought=100, clamp=(0.0, 1.0)), tmp_path / 'b'
  )(comparisons(1))
  np.testing.assert_allclose(judged.probabilities, [0.5 / 0.75])
  body = server.requests[0][2]
  assert body['max_tokens'] == 116 and 'step by step' in body['messages'][0]['content']


@pytest.mark.parametrize('status', [400, 422])
def test_a_server_that_refuses_logprobs_is_asked_without(serve, tmp_path, caplog, status):
  def script(n, request):
    asked = 'logprobs' in request or 'top_logprobs' in request
    return (status, {'error': 'logprobs: unknown'}, {}) if asked else completion('B')

  server = serve(script)
  judge = endpoint.build_endpoint_judge(server.url, config(concurrency=1), tmp_path / 'cache')
  assert judge(comparisons(3)).probabilities.tolist() == [0.0] * 3
  assert len(server.requests) == 4 and 'read from the text' in caplog.text
  assert (
    judge(comparisons(4)).probabilities.tolist() == [0.0] * 4 and len(server.requests) == 5
  )  # remembered, and kept
  again = endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')
  assert again(comparisons(4)).probabilities.tolist() == [0.0] * 4 and len(server.requests) == 5


def test_another_400_is_no_matter_of_logprobs(serve, tmp_path):
  server = serve(lambda n, request: (400, {'error': 'too long'}, {}))
  with pytest.raises(UserError, match='it answered 400: .*too long.*0 label'):
    endpoint.build_endpoint_judge(server.url, config(concurrency=1), tmp_path / 'cache')(
      comparisons(3)
    )
  assert len(server.requests) == 2


TROUBLES = {
  'busy': (429, {'error': 'slow down'}, {}),
  'broken': (500, b'<html>oops</html>', {}),
  'gone': (503, b'', {}),
  'garbage': (200, b'\xff\x00 not json', {}),
  'shape': {'choices': []},
  'other shape': (200, b'[1, 2]', {}),
  'content': completion(['A']),
  'strange logprobs': {
    'choices': [{'message': {'content': 'A'}, 'logprobs': {'content': [{'x': 1}]}}]
  },
  'half': (200, json.dumps(completion('A')).encode()[:40], {'content-length': 400}),
  'cut': (200, json.dumps(completion('A')).encode()[:40], {}),
  'not gzip': (200, b'hello', {'content-encoding': 'gzip'}),
}


@pytest.mark.parametrize('trouble', TROUBLES)
def test_a_temporary_failure_is_retried(serve, tmp_path, trouble):
  server = serve(lambda n, request: TROUBLES[trouble] if n < 2 else completion('A'))
  judged = endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')(comparisons(1))
  assert judged.probabilities.tolist() == [1.0] and len(server.requests) == 3


@pytest.mark.parametrize('trouble', TROUBLES)
def test_a_permanent_failure_stops_and_keeps_the_labels(serve, tmp_path, trouble):
  path = tmp_path / 'cache.jsonl'
  server = serve(
    lambda n, request: completion('A') if asked_for(request) < 3 else TROUBLES[trouble]
  )
  with pytest.raises(UserError) as error:
    endpoint.build_endpoint_judge(server.url, config(concurrency=1), path)(comparisons(9))
  said = str(error.value)
  assert (
    '3 label(s) are kept in ' + str(path) in said
    and 'repeat the same command' in said
    and server.url in said
  )
  assert (
    'tried 3 times' in said
    and len(server.requests) == 6
    and len(rows(path)) == 3
    and '\n' not in said
  )
  server.script = lambda n, request: completion('B')
  judged = endpoint.build_endpoint_judge(server.url, config(), path)(comparisons(9))
  assert judged.probabilities.tolist() == [1.0] * 3 + [0.0] * 6 and len(server.requests) == 12


def test_a_server_that_is_down(tmp_path):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{free.getsockname()[1]}/v1'
  with pytest.raises(
    UserError, match=f'judge {url}/chat/completions: ConnectError.*tried 3 times; 0 label'
  ):
    endpoint.build_endpoint_judge(url, config(), tmp_path / 'cache')(comparisons(20))


def test_a_slow_answer_is_asked_for_again_and_the_limit_is_of_the_whole_call(serve, tmp_path):
  def script(n, request):
    if n == 0:
      time.sleep(1.5)
    return completion('A')

  server = serve(script)
  began = time.monotonic()
  assert endpoint.build_endpoint_judge(server.url, config(timeout=0.3), tmp_path / 'a')(
    comparisons(1)
  ).probabilities.tolist() == [1.0]
  assert time.monotonic() - began < 1.2
  with pytest.raises(UserError, match='no answer in 0.2 s; tried 2 times'):
    server.script = lambda n, request: time.sleep(0.5) or completion('A')
    endpoint.build_endpoint_judge(server.url, config(timeout=0.2, retries=1), tmp_path / 'b')(
      comparisons(1)
    )


@pytest.mark.parametrize('as_date', [False, True])
def test_retry_after_is_honoured(serve, tmp_path, as_date):
  def said():
    return email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else '1'

  server = serve(
    lambda n, request: (429, b'', {'retry-after': said()}) if n == 0 else completion('A')
  )
  began = time.monotonic()
  endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')(comparisons(1))
  assert 0.9 < time.monotonic() - began < 3
  server.script = lambda n, request: (429, b'', {'retry-after': '3600'})
  with pytest.raises(UserError, match='429.*asks to wait 3600 s'):
    endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'other')(comparisons(1))


@pytest.mark.parametrize('status', [301, 307, 401, 403, 404, 413])
def test_a_refusal_stops_at_once_and_the_key_stays_secret(serve, tmp_path, caplog, status):
  elsewhere = serve(lambda n, request: completion('A'))
  echo = json.dumps({'error': f'wrong key {KEY}', 'again': KEY}).replace('/', '\\/').encode()
  server = serve(lambda n, request: (status, echo, {'location': elsewhere.url}))
  with pytest.raises(UserError, match=f'{status}: .*wrong key …') as error:
    endpoint.build_endpoint_judge(server.url, config(concurrency=1), tmp_path / 'cache')(
      comparisons(3)
    )
  assert len(server.requests) == 1 and not elsewhere.requests
  assert 'secret' not in str(error.value) + caplog.text and server.url in str(error.value)
  assert ('JUDGE_KEY' in str(error.value)) == (status in (401, 403))


def test_the_key_is_in_no_label_and_in_no_excerpt(serve, tmp_path, caplog):
  bad = 500, f'no {KEY}'.encode(), {}
  server = serve(lambda n, request: completion(f'{KEY}\nA') if asked_for(request) == 0 else bad)
  with pytest.raises(UserError) as error:
    endpoint.build_endpoint_judge(server.url, config(concurrency=1), tmp_path / 'cache')(
      comparisons(2)
    )
  kept = (tmp_path / 'cache').read_text()
  assert (
    rows(tmp_path / 'cache')[0]['text'] == '…\nA'
    and rows(tmp_path / 'cache')[0]['probability'] == 1.0
  )
  assert (
    'secret' not in kept + str(error.value) + caplog.text
    and KEY in server.requests[0][1]['authorization']
  )


@pytest.mark.parametrize('said', [None, '', '  '])
def test_without_a_key_none_is_sent(serve, tmp_path, monkeypatch, said):
  monkeypatch.delenv('JUDGE_KEY') if said is None else monkeypatch.setenv('JUDGE_KEY', said)
  server = serve(lambda n, request: completion('A'))
  endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')(comparisons(1))
  assert 'authorization' not in server.requests[0][1]


@pytest.mark.parametrize('said', ['sk-secret\nx: y', 'sk-secret x', 'sk-sécret', 'sk-"secret'])
def test_a_key_that_is_no_header_is_not_shown(tmp_path, monkeypatch, said):
  monkeypatch.setenv('JUDGE_KEY', said)
  with pytest.raises(UserError, match='JUDGE_KEY') as error:
    endpoint.build_endpoint_judge('http://localhost:1/v1', config(), tmp_path / 'cache')
  assert 'cret' not in str(error.value)


def test_bounds_count_what_is_in_the_cache(serve, tmp_path):
  path, server = tmp_path / 'cache.jsonl', serve(lambda n, request: completion('A', tokens=10))
  for _ in range(2):  # the second run asks nothing
    with pytest.raises(UserError, match=r'max_calls.*is reached: 5 calls.*5 label\(s\) are kept'):
      endpoint.build_endpoint_judge(server.url, config(max_calls=5), path)(comparisons(20))
    assert len(server.requests) == 5 == len(rows(path))
  assert (
    endpoint.build_endpoint_judge(server.url, config(max_calls=5), path)(
      comparisons(5)
    ).probabilities.tolist()
    == [1.0] * 5
  )
  for _ in range(2):
    with pytest.raises(UserError, match='max_total_tokens is reached: .*80 tokens.*8 label'):
      endpoint.build_endpoint_judge(server.url, config(max_total_tokens=75, concurrency=1), path)(
        comparisons(20)
      )
    assert len(server.requests) == 8
  assert (
    len(
      endpoint.build_endpoint_judge(server.url, config(max_calls=20), path)(
        comparisons(20)
      ).probabilities
    )
    == 20
  )


def test_unreadable_replies_count_as_calls_and_missing_usage_is_estimated(serve, tmp_path):
  server = serve(lambda n, request: b'' if n == 0 else completion('A', tokens=0))
  endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')(comparisons(1))
  (row,) = rows(tmp_path / 'cache')
  assert row['calls'] == 2 and 40 < row['tokens'] < 90


@pytest.mark.parametrize('most', [1, 4])
def test_no_more_calls_run_at_once_than_allowed(serve, tmp_path, most):
  server = serve(
    lambda n, request: time.sleep(0.03) or completion('A' if asked_for(request) % 3 else 'B')
  )
  judged = endpoint.build_endpoint_judge(server.url, config(concurrency=most), tmp_path / 'cache')(
    comparisons(20)
  )
  assert judged.probabilities.tolist() == [float(i % 3 > 0) for i in range(20)]
  assert server.most == most and len(server.requests) == 20


def test_nothing_is_asked_twice(serve, tmp_path):
  path = tmp_path / 'cache.jsonl'
  server = serve(lambda n, request: completion('A' if asked_for(request) % 2 else 'hm'))
  pairs = comparisons(6)
  for expected in (6, 6):
    judged = endpoint.build_endpoint_judge(server.url, config(), path)([*pairs, *pairs[::-1]])
    np.testing.assert_array_equal(judged.probabilities, [np.nan, 1.0] * 3 + [1.0, np.nan] * 3)
    assert len(server.requests) == expected and len(rows(path)) == 6
  other = serve(lambda n, request: completion('B'))
  endpoint.build_endpoint_judge(other.url, config(timeout=9.0), path)(
    pairs
  )  # the same server at another address
  assert not other.requests
  endpoint.build_endpoint_judge(other.url, config(temperature=0.5), path)(pairs)
  endpoint.build_endpoint_judge(other.url, config(model='another'), path)(pairs[:1])
  endpoint.build_endpoint_judge(other.url, config(), path)([pairs[0].swapped()])
  assert len(other.requests) == 8 and len(rows(path)) == 14
  assert endpoint.build_endpoint_judge(other.url, config(), path)([]).probabilities.shape == (0,)


def test_a_line_that_a_kill_cut_off_is_asked_again(serve, tmp_path):
  path, server = tmp_path / 'cache.jsonl', serve(lambda n, request: completion('A'))
  endpoint.build_endpoint_judge(server.url, config(), path)(comparisons(3))
  whole = path.read_bytes()
  for cut in (1, 30, whole.rindex(b'{"key"') and len(whole) - whole.rindex(b'{"key"') - 1):
    path.write_bytes(whole[:-cut])
    asked = len(server.requests)
    assert (
      endpoint.build_endpoint_judge(server.url, config(), path)(
        comparisons(3)
      ).probabilities.tolist()
      == [1.0] * 3
    )
    assert len(server.requests) == asked + 1 and path.read_bytes() == whole
  path.write_bytes(b'{"key": 1}\n' + whole)
  with pytest.raises(UserError, match=f'{path}:1: expected'):
    endpoint.build_endpoint_judge(server.url, config(), path)(comparisons(3))


def test_odd_texts_are_sent_and_kept(serve, tmp_path):
  server = serve(lambda n, request: completion('\ud800 {x}\u2028\r\nA'))
  pair = Comparison([dict(role='user', content='Why 0? \udfff {first} \x00')], '{second}', '')
  for _ in range(2):
    judged = endpoint.build_endpoint_judge(server.url, config(), tmp_path / 'cache')([pair])
    assert judged.rationales == ['\ud800 {x}\u2028\r\nA'] and judged.probabilities.tolist() == [1.0]
  assert (
    '(A) {second}\n(B) \n' in server.requests[0][2]['messages'][0]['content']
    and len(server.requests) == 1
  )


def test_answers_under_way_are_kept_when_another_call_stops_the_run(serve, tmp_path):
  def script(n, request):
    time.sleep(0.3 * (asked_for(request) < 3))
    return completion('A') if asked_for(request) < 3 else (404, b'', {})

  server = serve(script)
  with pytest.raises(UserError, match=r'404.*3 label\(s\)'):
    endpoint.build_endpoint_judge(server.url, config(concurrency=4), tmp_path / 'cache')(
      comparisons(50)
    )
  assert len(server.requests) == 4


def test_a_cache_in_use_or_not_to_be_written(tmp_path):
  judge = endpoint.build_endpoint_judge('http://127.0.0.1:9/v1', config(), tmp_path / 'cache')
  with open(tmp_path / 'cache', 'w') as other:
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another process'):
      judge(comparisons(1))
  with pytest.raises(UserError, match='irectory'):
    endpoint.build_endpoint_judge('http://127.0.0.1:9/v1', config(), tmp_path)(comparisons(1))


def test_no_proxy_is_used_for_this_machine(serve, tmp_path, monkeypatch):
  server, proxy = (
    serve(lambda n, request: completion('A')),
    serve(lambda n, request: completion('B')),
  )
  for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy'):
    monkeypatch.setenv(name, proxy.url.removesuffix('/v1'))
  monkeypatch.delenv('no_proxy', raising=False)
  monkeypatch.delenv('NO_PROXY', raising=False)

  def said(url, name):
    return endpoint.build_endpoint_judge(url, config(), tmp_path / name)(
      comparisons(1)
    ).probabilities.tolist()

  assert said(server.url, 'a') == [1.0] and said('http://judge.invalid/v1', 'b') == [0.0]


@pytest.mark.parametrize(
  'url',
  [
    '',
    'localhost:8000/v1',
    'ftp://host/v1',
    'http://',
    'http://user:secret@host/v1',
    'file:///x',
    None,
    'http://host/v1?key=secret',
    'http://host/v1#x',
    'http://[::1/v1',
    'http://host:x/',
  ],
)
def test_wrong_urls(tmp_path, url):
  with pytest.raises(UserError, match='expected a URL') as error:
    endpoint.build_endpoint_judge(url, config(), tmp_path / 'cache')
  assert 'secret' not in str(error.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(model=''), 'model'),
    (dict(options=('A', 'A')), 'options'),
    (dict(options=('A)', 'B')), 'options'),
    (dict(concurrency=0), 'concurrency'),
    (dict(clamp=(0.5,)), 'clamp'),
    (dict(timeout=0.0), 'timeout'),
    (dict(template='{frist}'), 'template.*frist'),
    (dict(template='{'), 'template'),
  ],
)
def test_wrong_configs(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    endpoint.build_endpoint_judge('http://localhost/v1', config(**changes), tmp_path / 'cache')


def test_ctrl_c_leaves_at_once_with_the_labels_kept(serve, tmp_path):
  server = serve(lambda n, request: completion('A') if n < 3 else time.sleep(60) or completion('A'))
  script = (
    'import pathlib, signal\nfrom rlhf_jax.feedback import endpoint, judging\n'
    # workers of pytest-xdist hand on that it is ignored
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    'config = endpoint.EndpointOptions(model="wise", concurrency=2)\n'
    'why = lambda i: [dict(role="user", content=f"Why {i}?")]\n'
    'pairs = [judging.Comparison(why(i), "a", "b") for i in range(9)]\n'
    f'cache = pathlib.Path({str(tmp_path / "cache")!r})\n'
    f'endpoint.build_endpoint_judge({server.url!r}, config, cache)(pairs)\n'
  )
  child = subprocess.Popen(
    [sys.executable, '-c', script], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
  )
  while len(server.requests) < 5:
    time.sleep(0.02)
    assert child.poll() is None
  began = time.monotonic()
  child.send_signal(signal.SIGINT)
  _, said = child.communicate(timeout=40)
  assert time.monotonic() - began < 40 and child.returncode and len(rows(tmp_path / 'cache')) == 3
  assert 'stopped; 3 label(s) are kept' in said


def tiny_model(directory, says=''):
  """Makes a Hugging Face directory: a Llama with a byte-level tokenizer and a chat template.

  Args:
    says: a byte; with weights such that every answer is this byte and the end.
  """
  import tokenizers
  import torch
  import transformers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate(['<|end|>', *alphabet])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token='<|end|>', pad_token='<|end|>'
  )
  fast.chat_template = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    '{% if add_generation_prompt %}assistant: {% endif %}'
  )
  fast.save_pretrained(directory)
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=len(vocabulary),
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      max_position_embeddings=2048,
      eos_token_id=0,
      pad_token_id=0,
      bos_token_id=None,
    )
  )
  if says:
    with torch.no_grad():
      embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
      embedding[:, 0], embedding[vocabulary[says], :2] = 100, torch.tensor([0.0, 100.0])
      head[vocabulary[says], 0], head[0, 1] = 1, 1
  model.save_pretrained(directory)


@contextlib.contextmanager
def transformers_serve(directory, log):
  """The url of `transformers serve` with the model of a directory."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [
    sys.executable,
    '-m',
    'transformers.cli.transformers',
    'serve',
    str(directory),
    '--host',
    '127.0.0.1',
    '--port',
    str(port),
    '--device',
    'cpu',
  ]
  environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': ''}
  with open(log, 'wb') as file:
    child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
  try:
    for _ in range(1200):
      assert child.poll() is None, log.read_text()[-2000:]
      with contextlib.suppress(httpx.TransportError):
        httpx.get(f'http://127.0.0.1:{port}/health', trust_env=False, timeout=5)
        break
      time.sleep(0.2)
    yield f'http://127.0.0.1:{port}/v1'
  finally:
    child.terminate()
    child.wait(30)


@pytest.mark.slow
def test_transformers_serve(tmp_path, monkeypatch, caplog):
  """A server that others wrote; it offers no log-probabilities, so its texts are read."""
  for module in ('torch', 'fastapi', 'uvicorn', 'openai'):
    pytest.importorskip(module)
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.delenv('JUDGE_KEY')
  for says, expected in (('A', 1.0), ('B', 0.0), ('', np.nan)):  # random words state no verdict
    model, path = tmp_path / f'model{says}', tmp_path / f'cache{says}.jsonl'
    tiny_model(model, says)
    settings = config(model=str(model), concurrency=2, timeout=120.0)
    with transformers_serve(model, tmp_path / 'log') as url:
      judged = endpoint.build_endpoint_judge(url, settings, path)(comparisons(4))
      with pytest.raises(UserError, match='it answered 4..: .*4 label'):
        endpoint.build_endpoint_judge(url, config(model='no such model', timeout=120.0), path)(
          comparisons(1)
        )
    np.testing.assert_array_equal(judged.probabilities, [expected] * 4)
    assert 'returns no log-probabilities' in caplog.text and len(rows(path)) == 4
    for row, text in zip(rows(path), judged.rationales):
      assert (
        row['by'] == 'text'
        and row['text'] == text
        and row['tokens'] > 100
        and text.startswith(says)
      )
    again = endpoint.build_endpoint_judge(url, settings, path)(comparisons(4))  # the server is gone
    np.testing.assert_array_equal(again.probabilities, judged.probabilities)


@contextlib.contextmanager
def llama_cpp(model):
  """The url of llama.cpp's own server, out of a wheel, with the model of a GGUF file."""
  import xllamacpp

  settings = xllamacpp.CommonParams()
  settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = str(model), 2048, 2, 0
  settings.cpuparams.n_threads, settings.warmup = 2, False
  server = xllamacpp.Server(settings)
  try:
    yield f'{server.listening_address}/v1'
  finally:
    del server


@pytest.mark.slow
def test_llama_cpp_gives_logprobs(tmp_path):
  """A server that gives log-probabilities: SmolLM2 there, and the same label from our forward."""
  pytest.importorskip('xllamacpp')
  import jax

  from rlhf_jax.interop import gguf_io, pretrained
  from rlhf_jax.models import heads, transformer

  try:
    own = pretrained.open_pretrained('smollm2')
  except UserError as error:
    pytest.skip(str(error))
  model, params, tokenizer = transformer.build_model(own.config), own.load(), own.tokenizer
  pairs = [
    Comparison(
      [dict(role='user', content=f'What is the capital of {country}?')],
      first,
      second,
      'Choose the truth.',
    )
    for country, first, second in (
      ('France', 'Paris.', 'I like to eat cheese.'),
      ('Italy', 'No.', 'It is Rome.'),
      ('Spain', 'Madrid.', 'Lisbon.'),
    )
  ]
  path, settings = tmp_path / 'cache.jsonl', config(model='smollm2', concurrency=2, timeout=120.0)
  with llama_cpp(gguf_io.find_smollm2()) as url:
    with pytest.raises(
      UserError, match='no answer in 0.001 s; tried 3 times; 0 label'
    ):  # too slow for that
      endpoint.build_endpoint_judge(url, config(model='smollm2', timeout=0.001), path)(pairs)
    judged = endpoint.build_endpoint_judge(url, settings, path)(pairs)
  assert [row['by'] for row in rows(path)] == ['logprobs'] * 3 and len(
    set(judged.probabilities)
  ) == 3
  again = endpoint.build_endpoint_judge(url, settings, path)(pairs)  # the server is gone
  np.testing.assert_array_equal(again.probabilities, judged.probabilities)
  for pair, said, probability in zip(pairs, judged.rationales, judged.probabilities):
    begin = said[: min(said.index(option) for option in 'AB' if option in said)]
    request, _ = endpoint.build_request(pair, settings)
    tokens = np.array(
      [tokenizer.prompt(request['messages']) + (tokenizer.encode(begin) if begin else [])]
    )
    hidden, _ = model.apply(params, tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
    logprobs = np.asarray(
      jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[:, -1]))
    )[0]
    a, b = (math.exp(logprobs[tokenizer.encode(option)[0]]) for option in 'AB')
    assert abs(probability - a / (a + b)) < 0.06, (
      said,
      probability,
      a / (a + b),
    )  # llama.cpp rounds to 8 bits
