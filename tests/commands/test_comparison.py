"""The command `compare`, as a user starts it."""

import http.server
import json
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from rlhf_jax import json_lines
from rlhf_jax.commands import compare, contestants

QUESTIONS = [f'Why is number {number} odd?' for number in range(40)]
JUDGE = """
  def longer(comparisons):
    '''Likes long responses, and whatever stands first where both are as long.'''
    gaps = [len(row.first) - len(row.second) for row in comparisons]
    return [1.0 if gap >= 0 else 0.0 for gap in gaps]
"""


def ask(text):
  return [{'role': 'user', 'content': text}]


def write_answers(path, answer):
  rows = [{'prompt': ask(text), 'responses': answer(n)} for n, text in enumerate(QUESTIONS)]
  json_lines.write_values(path, rows)
  return str(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A folder with prompts, the responses of two models, and a judge."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.delitem(sys.modules, 'own_judge', raising=False)
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'own_judge.py').write_text(textwrap.dedent(JUDGE))
  json_lines.write_values('prompts.jsonl', [{'prompt': ask(text)} for text in QUESTIONS])
  write_answers(tmp_path / 'short.jsonl', lambda n: ['It is.', 'Yes.'])
  # Longer on three prompts of four, equal on the others.
  write_answers(tmp_path / 'long.jsonl', lambda n: ['It is odd.' if n % 4 else 'It is.'])
  return tmp_path


def run(*words):
  return compare.main([*words, '--output=out.json'])


def results():
  return json.loads(open('out.json').read())


def test_files_of_responses_and_a_function(place, capsys):
  words = ['--prompts=prompts.jsonl', '--judge=own_judge:longer', '--baseline=short']
  assert run('short.jsonl', 'long.jsonl', *words, '--training=prompts.jsonl') == 0
  found = results()
  [pair] = found['judges']['own_judge:longer']['pairs']
  assert (pair['ours'], pair['theirs']) == ('long', 'short')
  assert pair['win_rate'] == 0.75 + 0.25 / 2 and pair['verdicts'] == 2 * len(QUESTIONS)
  low, high = pair['win_rate_ci95']
  assert 0.75 < low < pair['win_rate'] < high < 1
  assert abs(pair['controlled'] - 0.5) < 0.2  # all of it is length
  assert 0 < pair['detectable_difference'] < 0.2 and pair['prompts_needed'] > len(QUESTIONS)
  assert found['judges']['own_judge:longer']['order']['consistency'] == 1.0  # equal texts are ties
  assert found['overlap']['copies'] == len(QUESTIONS)
  printed = capsys.readouterr().out
  assert '87.5%' in printed and 'overlap with training: 40 of 40' in printed
  kept = [row for _, row in json_lines.read_values('out.answers.jsonl')]
  assert kept[1]['responses_of'] == {'short': ['It is.'], 'long': ['It is odd.']}
  assert [row['wins'] for row in kept[1]['verdicts']['own_judge:longer']] == [0.0, 1.0]


def test_people(place):
  rng = np.random.default_rng(0)
  rows = []
  for number, text in enumerate(QUESTIONS):
    for person in ('ann', 'bob'):
      ranks = [1, 2] if rng.random() < 0.8 else [2, 1]
      models = ['ours', 'theirs']
      if number % 2:
        models, ranks = models[::-1], ranks[::-1]
      rows.append(
        dict(messages=ask(text), responses=['a', 'b'], ranks=ranks, models=models, annotator=person)
      )
  json_lines.write_values('people.jsonl', rows)
  assert run('theirs', 'ours', '--judge=people:people.jsonl') == 0
  [pair] = results()['judges']['people:people.jsonl']['pairs']
  assert pair['ours'] == 'ours' and 0.7 < pair['win_rate'] < 0.9
  assert pair['prompts'] == len(QUESTIONS) and pair['variance']['rest'] > 0.05


def test_people_who_take_the_first_are_told_from_a_better_model(place, capsys):
  """The export says what stood first on the page; here that always wins."""
  rows = []
  for number, text in enumerate(QUESTIONS):
    shown = [0, 1] if number % 4 else [1, 0]  # ours stands first three times in four
    ranks = [1, 2] if number % 4 else [2, 1]
    texts = ['abc', 'xyz']
    rows.append(
      dict(messages=ask(text), responses=texts, ranks=ranks, models=['ours', 'theirs'], shown=shown)
    )
  json_lines.write_values('people.jsonl', rows)
  assert run('theirs', 'ours', '--judge=people:people.jsonl') == 0
  found = results()['judges']['people:people.jsonl']
  assert found['order'] == {'first': 1.0}
  assert found['pairs'][0]['win_rate'] == 0.75 and abs(found['pairs'][0]['controlled'] - 0.5) < 0.2
  assert 'what is shown first wins 100.0%; its place is controlled' in capsys.readouterr().out
  rows[3]['shown'] = [0, 0]
  json_lines.write_values('people.jsonl', rows)
  assert run('theirs', 'ours', '--judge=people:people.jsonl') == 2
  assert 'people.jsonl:4: shown: expected the numbers 0 to 1' in capsys.readouterr().err


def test_an_interrupted_comparison_goes_on_after_the_models_that_responded(place, monkeypatch):
  words = ['short.jsonl', 'long.jsonl', '--prompts=prompts.jsonl', '--judge=own_judge:longer']
  asked = []
  respond = contestants.respond

  def stop_at_the_second(model, *rest):
    asked.append(model.name)
    if len(asked) == 2:
      raise KeyboardInterrupt
    return respond(model, *rest)

  monkeypatch.setattr(contestants, 'respond', stop_at_the_second)
  assert run(*words) == 130 and not (place / 'out.json').exists()
  assert run(*words) == 0 and asked == ['short', 'long', 'long']
  assert not (place / 'out.responses').exists()
  asked.clear()
  assert run(*words) == 130  # done before, so all respond
  write_answers(place / 'short.jsonl', lambda n: ['Other.'])
  assert run(*words) == 0 and asked == ['short', 'long', 'short', 'long']


@pytest.mark.parametrize(
  'words, message',
  [
    (['short.jsonl', 'none.jsonl'], 'none.jsonl: there is no such file'),
    (['short.jsonl', 'runs/none:ppo'], 'runs/none:ppo: not found'),
    (['short.jsonl'], 'two models'),
    (['short.jsonl', 'short.jsonl'], "name 'short'"),
    (['short.jsonl', 'http://localhost:1/v1'], 'name of a model'),
    (['short.jsonl', 'long.jsonl', '--judge=oracle'], 'TinyWorld only'),
    (['short.jsonl', 'long.jsonl', '--judge=reward:none'], 'none'),
    (['short.jsonl', 'long.jsonl', '--judge=people:none.jsonl'], 'in a command of their own'),
    (['short.jsonl', 'long.jsonl', '--baseline=other'], 'short, long'),
    (['short.jsonl', 'long.jsonl', '--samples=0'], '--samples'),
    (['short.jsonl', 'long.jsonl', '--prompts=tinyworld:train'], 'tinyworld:test'),
  ],
)
def test_what_is_missing_is_said_before_anything_runs(place, capsys, monkeypatch, words, message):
  def fail(*_):
    raise AssertionError('a model responded')

  monkeypatch.setattr(contestants, 'respond', fail)
  base = ['--prompts=prompts.jsonl', '--judge=own_judge:longer']
  assert run(*words[:2], *base, *words[2:]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
  assert not (place / 'out.json').exists()


def test_a_prompt_without_a_response_is_named(place, capsys):
  json_lines.write_values('some.jsonl', [{'prompt': ask(QUESTIONS[0]), 'responses': ['Well.']}])
  words = ['--prompts=prompts.jsonl', '--judge=own_judge:longer']
  assert run('short.jsonl', 'some.jsonl', *words) == 2
  assert 'some.jsonl: no response to the prompt' in capsys.readouterr().err


class Echo(http.server.BaseHTTPRequestHandler):
  """Fails once, then responds with the number of the sample."""

  failed = False

  def do_POST(self):
    request = json.loads(self.rfile.read(int(self.headers['content-length'])))
    status = 200 if Echo.failed else 503
    Echo.failed = True
    text = f'{request["model"]} {request["seed"]}: {request["messages"][-1]["content"]}'
    body = json.dumps({'choices': [{'message': {'content': text}}]}).encode()
    self.send_response(status)
    self.send_header('content-length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


def test_a_server(place):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Echo) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/v1#echo'
    words = ['--prompts=prompts.jsonl', '--judge=own_judge:longer', '--limit=5', '--samples=2']
    assert run('short.jsonl', address, *words) == 0
    server.shutdown()
  kept = [row for _, row in json_lines.read_values('out.answers.jsonl')]
  assert len(kept) == 5
  assert kept[0]['responses_of']['echo'] == [f'echo {n}: {QUESTIONS[0]}' for n in range(2)]


def test_help_is_there_at_once():
  command = [sys.executable, '-X', 'importtime', '-m', 'rlhf_jax.compare', '--help']
  answer = subprocess.run(command, capture_output=True, text=True, check=True)
  assert 'oracle' in answer.stdout
  assert 'jax._src' not in answer.stderr and 'import numpy' not in answer.stderr
