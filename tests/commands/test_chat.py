"""A chat: what is typed, what is answered, what is written."""

import argparse
import io
import json
import os
import random
import signal
import sys

import jax
import pytest

from rlhf_jax import testing
from rlhf_jax.commands import chat, chat_session, chat_terminal
from rlhf_jax.commands.chat_session import Conversation, Speaker
from rlhf_jax.data import records
from rlhf_jax.errors import UserError
from rlhf_jax.interop import pretrained
from rlhf_jax.models import transformer


class Told:
  """A screen that types what it is told, and keeps what it is shown."""

  def __init__(self, typed=(), votes=()):
    self.typed, self.votes, self.said, self.shown = list(typed), list(votes), [], []

  def read_message(self):
    return self.typed.pop(0) if self.typed else None

  def read_vote(self):
    return self.votes.pop(0)

  def say(self, text):
    self.said.append(text)

  def show_help(self, commands):
    self.said += commands

  def show_response(self, parts):
    self.shown.append(''.join(parts))

  def show_pair(self, parts):
    texts = ['', '']
    for number, part in parts:
      texts[number] += part
    self.shown.append(tuple(texts))


class Parrot:
  """Stands for a compiled model: says the bytes of a text, whatever it is asked."""

  def __init__(self, tokenizer, text, at=None, signum=None):
    self.ids = tokenizer.encode(text) + [tokenizer.eos_id]
    self.at, self.signum = at, signum
    self.asked = []

  def stream(self, prompt, key, temperature, max_new_tokens):
    self.asked.append((list(prompt), temperature))
    for number, token in enumerate(self.ids[:max_new_tokens]):
      if number == self.at:
        os.kill(os.getpid(), self.signum)
      yield token


@pytest.fixture(scope='module')
def tokenizer():
  return testing.make_tokenizer()


@pytest.fixture
def options(tmp_path):
  return argparse.Namespace(max_new_tokens=99, votes=tmp_path / 'votes.jsonl')


def parrot(tokenizer, text, name='parrot', **options):
  return Speaker(name, Parrot(tokenizer, text, **options), tokenizer)


def test_a_response_grows_by_whole_characters(tokenizer, options):
  """Bytes of half a character are held back."""
  speaker = parrot(tokenizer, 'It is ☂ здесь.')
  parts = list(speaker.respond([{'role': 'user', 'content': 'a'}], None, 1.0, 99))
  assert ''.join(parts).strip() == 'It is ☂ здесь.' and '\ufffd' not in ''.join(parts)
  assert len([part for part in parts if part]) > 5


def test_ctrl_c_stops_the_response_and_not_the_program(tokenizer, options):
  before = signal.getsignal(signal.SIGINT)
  conversation, screen = Conversation('', 1.0), Told()
  speaker = parrot(tokenizer, 'one two three four five', at=3, signum=signal.SIGINT)
  chat_session.talk('count', conversation, speaker, screen, options, None)
  (shown,) = screen.shown
  assert 'one two three four five'.startswith(shown.strip()) and shown != ''
  assert conversation.messages[1]['content'] == shown and 'five' not in shown
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize('choice,ranks', [('1', [1, 2]), ('2', [2, 1]), ('=', [1, 1])])
def test_a_vote_is_a_record_that_stages_read(tokenizer, options, choice, ranks):
  conversation, screen = Conversation('Be brief.', 1.0), Told(votes=[choice])
  pair = [parrot(tokenizer, 'yes', 'model-a'), parrot(tokenizer, 'no\x1b[2J', 'model-b')]
  chat_session.compare('Is it so?', conversation, pair, screen, options, jax.random.key(0))
  (record,) = records.read_records(options.votes, 'ranking')
  assert [message['role'] for message in record.messages] == ['system', 'user']
  assert [text.strip() for text in record.responses] == ['yes', 'no\x1b[2J']
  assert record.ranks == ranks
  if choice != '=':
    (preference,) = records.read_records(options.votes, 'preference')
    assert preference.chosen == record.responses[int(choice) - 1]
  better = 1 if choice == '2' else 0
  assert conversation.messages[-1]['content'] == record.responses[better]
  # Who they are is said after the vote only.
  assert 'model-a' not in ''.join(map(str, screen.shown)) and 'model-a' in screen.said[-1]
  assert json.loads(options.votes.read_text())['models'] == ['model-a', 'model-b']


def test_no_vote_writes_nothing(tokenizer, options):
  screen = Told(votes=[''])
  pair = [parrot(tokenizer, 'yes'), parrot(tokenizer, 'no')]
  chat_session.compare('So?', Conversation('', 1.0), pair, screen, options, jax.random.key(0))
  assert not options.votes.exists() and 'no vote' in screen.said[-1]


def test_the_models_stand_in_both_orders():
  order = random.Random(0)
  assert {tuple(order.sample(['a', 'b'], 2)) for _ in range(20)} == {('a', 'b'), ('b', 'a')}


def test_commands(tmp_path):
  conversation, screen = Conversation('', 1.0), Told()

  def obey(text):
    return chat_session.obey(text, conversation, screen)

  assert obey('/system Be kind.') and conversation.system == 'Be kind.'
  assert obey('/temperature 0.5') and conversation.temperature == 0.5
  for text in ('/temperature -1', '/temperature x', '/temperature nan', '/nothing', '/save'):
    with pytest.raises(UserError):
      obey(text)
  with pytest.raises(UserError, match='nothing was said yet'):
    obey(f'/save {tmp_path}/x.jsonl')
  chat_session._add_turn(conversation, 'Why?', 'Because.')
  chat_session._add_turn(conversation, 'And?', 'So.')
  assert obey('/undo') and [m['content'] for m in conversation.messages] == ['Why?', 'Because.']
  assert obey(f'/save {tmp_path}/kept.jsonl') and obey(f'/save {tmp_path}/kept.jsonl')
  first, second = records.read_records(tmp_path / 'kept.jsonl', 'demonstration')
  assert (first.messages[0]['content'], first.response) == ('Be kind.', 'Because.')
  assert second.response == 'Because.'
  assert obey('/undo') and obey('/undo') and conversation.messages == []
  assert screen.said[-1] == 'nothing to take back'
  assert obey('/help') and '/undo' in screen.said and not obey('/quit')


def test_lines_of_a_pipe(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo \\\nlines\n2\nlast\\\n'))
  screen = chat_terminal.Pipe()
  assert screen.read_message() == 'one'
  assert screen.read_message() == 'two \nlines'
  assert screen.read_vote() == '2'
  assert screen.read_message() == 'last' and screen.read_message() is None
  screen.show_pair(iter([(1, 'b\x1b[2J'), (0, 'a')]))
  assert capsys.readouterr().out == '1: a\n2: b\\x1b[2J\n'


def test_two_columns_need_room(capsys):
  for width, lines in ((100, 3), (40, 6)):
    screen = chat_terminal.Terminal.__new__(chat_terminal.Terminal)  # without an input
    screen._console = chat_terminal.rich.console.Console(width=width)
    screen._console.print(screen._draw(['a', '[bold]b']))
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == lines and '[bold]b' in shown  # no markup of models


def test_a_model_in_a_pipe(tmp_path, monkeypatch, capsys, tokenizer):
  """As `echo … | python -m rlhf_jax.chat MODEL`; mistakes leave the session going."""
  config = transformer.ModelConfig(
    vocab_size=tokenizer.vocab_size, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32,
    max_length=96,
  )  # fmt: skip
  params = transformer.build_model(config).init(jax.random.key(0))
  pretrained.export_model(tmp_path / 'model', config, params, tokenizer)
  typed = f'Hello?\n{"x" * 400}\n/nothing\n/save {tmp_path}/kept.jsonl\n'
  monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
  assert chat.main([str(tmp_path / 'model'), '--max_new_tokens=5', '--temperature=0']) == 0
  shown = capsys.readouterr()
  assert 'the conversation has' in shown.err and '/nothing: expected one of' in shown.err
  (record,) = records.read_records(tmp_path / 'kept.jsonl', 'demonstration')
  assert record.messages[0]['content'] == 'Hello?' and len(shown.out) >= 1


def test_what_cannot_talk_is_refused(tmp_path, capsys):
  assert chat.main([str(tmp_path / 'nowhere')]) == 2
  assert 'nowhere: not found' in capsys.readouterr().err
  for wrong in (['a', 'b', 'c'], ['a', '--max_new_tokens=0']):
    with pytest.raises(SystemExit) as stop:
      chat.main(wrong)
    assert stop.value.code == 2
