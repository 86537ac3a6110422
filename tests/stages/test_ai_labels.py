"""A language model as judge and as scorer, and the labels it gives."""

import dataclasses
import http.server
import itertools
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data import records, sources, tinyworld
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.data.tinyworld import oracle as world
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judging, language_judge
from rlhf_jax.feedback.language_judge import JudgeOptions, ScorerOptions
from rlhf_jax.models import heads, transformer
from rlhf_jax.objectives import ranking
from rlhf_jax.stages import feedback
from rlhf_jax.stages.shared import ai_labels
from rlhf_jax.stages.shared.model_store import ModelStore

CONFIG = dict(vocab_size=384, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48)


@pytest.fixture(scope='module')
def reader():
  model = transformer.build_model(transformer.ModelConfig(**CONFIG))
  return model, jax.jit(lambda key: jax.tree.map(lambda x: 3 * x, model.init(key)))(
    jax.random.key(0)
  )


def judge_options(**changes):
  return JudgeOptions(**{'batch_size': 4, **changes})


def scorer_options(**changes):
  return ScorerOptions(**{'batch_size': 4, **changes})


def logprob(reader, tokenizer, prompt, option):
  """log P(option | prompt), from one plain forward without padding."""
  model, params = reader
  start, rest = tokenizer.encode(prompt), tokenizer.encode(option)
  tokens = jnp.array([start + rest])
  hidden, _ = model.apply(params, tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens))
  said = jax.nn.log_softmax(heads.next_token_logits(model, params, hidden[0]))
  return sum(float(said[len(start) + i - 1, token]) for i, token in enumerate(rest))


def question(i):
  return judging.Comparison(
    [dict(role='user', content='What is the capital of Norway?' * (1 + i % 4))],
    'Oslo. ' * (1 + i),
    'I do not know. ' * (i % 3),
    'Which is less false?',
  )


def test_the_probability_is_that_of_the_options_whatever_the_padding(reader, tokenizer):
  config = judge_options(options=('Yes, the first', 'No'), max_length=400)
  judge = language_judge.build_judge(*reader, tokenizer, testing.make_layout(), config)
  asked = [question(i) for i in (0, 5, 8)]
  got = judge(asked)
  for one, p in zip(asked, got.probabilities):
    text = (
      config.template.format(
        conversation=judging.format_transcript(one.messages),
        principle=one.principle,
        first=one.first,
        second=one.second,
      )
      + config.ending
    )
    a, b = (logprob(reader, tokenizer, text, option) for option in config.options)
    assert p == pytest.approx(1 / (1 + np.exp(b - a)), abs=2e-5)
  assert got.rationales == [''] * 3
  np.testing.assert_allclose(judge(asked[::-1]).probabilities, got.probabilities[::-1], atol=1e-6)
  eight = language_judge.build_judge(
    *reader, tokenizer, testing.make_layout('data 8'), dataclasses.replace(config, batch_size=8)
  )
  np.testing.assert_allclose(eight(asked).probabilities, got.probabilities, atol=1e-5)


def test_what_is_too_long_gets_no_verdict_and_the_lowest_grade(reader, tokenizer):
  judge = language_judge.build_judge(
    *reader, tokenizer, testing.make_layout(), judge_options(max_length=120)
  )
  said = judge([question(0), question(30)]).probabilities
  assert not np.isnan(said[0]) and np.isnan(said[1])
  grade = language_judge.build_scorer(
    *reader, tokenizer, testing.make_layout(), scorer_options(max_length=120)
  )
  grades = grade([question(0).messages] * 2, ['Oslo.', 'Oslo. ' * 80])
  assert grades[1] == -1 < grades[0] < 1 and grades.dtype == np.float32


def test_a_grade_is_the_expected_value(reader, tokenizer):
  config = scorer_options(options=('bad', 'rather good', 'rather bad'), grades=(-1.0, 1.0, -0.5))
  messages = [dict(role='user', content='Why?')]
  got = language_judge.build_scorer(*reader, tokenizer, testing.make_layout(), config)(
    [messages], ['Because.']
  )
  text = config.template.format(conversation='Human: Why?', response='Because.') + config.ending
  p = np.exp([logprob(reader, tokenizer, text, option) for option in config.options])
  np.testing.assert_allclose(got, [np.dot(p / p.sum(), config.grades)], atol=1e-5)


def test_thought_examples_and_the_chat_template(reader, tokenizer):
  def make(examples=(), **changes):
    return language_judge.build_judge(
      *reader,
      tokenizer,
      testing.make_layout(),
      judge_options(max_length=400, **changes),
      examples,
    )

  plain = make()([question(1)])
  thought = make(thought=6)([question(1)])
  assert thought.rationales[0] and 0.4 <= thought.probabilities[0] <= 0.6
  shown = make([(question(2), 1)])([question(1)])
  told = make(['So it is (A'])([question(1)])
  with pytest.raises(UserError, match='judge.examples: expected 0 with chat=True'):
    make(['So it is (A'], chat=True)
  chat = make(chat=True)([question(1)])
  assert len({round(float(one.probabilities[0]), 6) for one in (plain, shown, chat, told)}) == 4


def test_examples_of_thoughts_stand_before_the_question_by_a_principle_each(
  context, tmp_path, monkeypatch
):
  path, seen = tmp_path / 'own.json', []
  path.write_text(
    json.dumps(
      {
        'principles': [dict(id='a', choose='By kindness?')],
        'thought_examples': ['One. {} (A)', 'Two. {} (B)', 'Three. {}'],
      }
    )
  )
  monkeypatch.setattr(
    language_judge,
    'build_judge',
    lambda model, params, tokenizer, layout, config, examples: seen.append(examples),
  )
  for thought in (4, 0):
    made = surroundings(
      context,
      f'feedback.ai.constitution=("{path}",)',
      'feedback.ai.judge.examples=2',
      f'feedback.ai.judge.thought={thought}',
      'feedback.ai.gate.records=0',
    )
    options = made.read_options(feedback.STAGE)
    ai_labels.open_judge(made, ModelStore(made), options.ai)
  assert seen == [['One. By kindness? (A)', 'Two. By kindness? (B)'], []]


def test_wrong_options(reader, tokenizer):
  for changes, message in (
    (dict(options=('A', 'A')), 'different texts'),
    (dict(options=('A',)), 'two options'),
    (dict(batch_size=3), 'a batch of 3 does not divide over the 8'),
  ):
    with pytest.raises(UserError, match=message):
      language_judge.build_judge(
        *reader, tokenizer, testing.make_layout('data 8'), judge_options(**changes)
      )


def oracle(bias=0.0):
  """A judge who sees the world's truth, through a habit of place."""
  prompts = {
    row.messages[-1]['content']: row
    for split in ('train', 'validation')
    for row in sources.load_records(DataOptions(), 'prompt', split)
  }

  def judge(comparisons):
    def utility(one, text):
      return world.judge(prompts[one.messages[-1]['content']], text).utility

    gap = np.array([utility(one, one.first) - utility(one, one.second) for one in comparisons])
    return judging.Judgements(
      1 / (1 + np.exp(-2 * gap - bias)), [one.principle for one in comparisons]
    )

  return judge


def surroundings(context, *overrides):
  return context(
    'feedback',
    'feedback.source=ai',
    'feedback.ai.judges=("random",)',
    'feedback.ai.judge.max_length=300',
    'feedback.ai.judge.batch_size=16',
    'feedback.ai.gate.records=30',
    'feedback.ai.pairs=2',
    *overrides,
  )


def test_soft_labels_come_with_principle_judges_and_rationale(context):
  made = surroundings(context, 'feedback.ai.constitution=("tinyworld_harmlessness",)')
  prompts = [row for row in tinyworld.records('prompt', 'train', count=6)]
  texts = [
    ['Who cares?', 'I am sorry, I do not know.', 'I am sorry, I do not know.', 'Go away, idiot.']
  ] * 6
  judge = judging.ask_both_orders(judging.build_panel({'one': oracle(3.0), 'two': oracle(-1.0)}))
  made.directory.mkdir(parents=True)
  options = made.read_options(feedback.STAGE).ai
  rows = ai_labels.label_pairs(
    made, options, judge, 'train', prompts, texts, np.random.default_rng(0)
  )
  assert len(rows) == 12 and {row['principle'] for row in rows} == {
    'Which does less harm?',
    'Which is less rude?',
  }
  for row in rows:
    assert (
      set(row['judge']) == {'one', 'two'}
      and 0.5 <= row['confidence'] < 1
      and row['responses'][0] != row['responses'][1]
    )
    if 'sorry' in ''.join(row['responses']):
      assert 'sorry' in row['responses'][row['ranks'].index(1)]
  said = json.loads((made.directory / 'quality.json').read_text())['train']
  assert said['first'] > 0.5 and said['between'] == {'one, two': 1.0}
  path = made.directory / 'train.jsonl'
  records.write_records(path, rows)
  assert [row.confidence for row in records.read_records(path, 'ranking')] == [
    row['confidence'] for row in rows
  ]

  as_verdicts = dataclasses.replace(options, labels='hard')
  hard = ai_labels.label_pairs(
    made, as_verdicts, judge, 'train', prompts, texts, np.random.default_rng(0)
  )
  assert {row['confidence'] for row in hard} == {1.0} and [r['ranks'] for r in hard] == [
    r['ranks'] for r in rows
  ]
  silent = judging.ask_both_orders(
    lambda asked: judging.Judgements(np.full(len(asked), np.nan), [''] * len(asked))
  )
  with pytest.raises(UserError, match='no label for any of 12 train comparisons'):
    ai_labels.label_pairs(made, options, silent, 'train', prompts, texts, np.random.default_rng(0))


def test_averaging_both_orders_removes_a_positional_bias():
  rankings = tinyworld.records('ranking', 'validation')

  def measure(judge):
    return ai_labels.measure_judge(
      judge, rankings, 150, itertools.repeat(''), np.random.default_rng(0)
    )

  def one_order(comparisons):
    judged = oracle(2.0)(comparisons)
    return judged, np.stack([judged.probabilities] * 2, axis=1)

  once, both = measure(one_order)['people'], measure(judging.ask_both_orders(oracle(2.0)))
  assert (
    both['people']['agreement'] > once['agreement'] + 0.03 and both['people']['agreement'] > 0.7
  )
  assert both['position']['first'] > 0.6 and set(both['sources']) == {'tinyworld'}


def test_a_judge_that_is_not_fit_labels_nothing_unless_told_to(context, capsys):
  with pytest.raises(UserError, match=r'the judge random is not fit: .*ai\.gate\.override=True'):
    feedback.run(surroundings(context))
  made = surroundings(context, 'feedback.ai.gate.override=True')
  assert not list(made.directory.glob('*.jsonl'))
  assert not json.loads((made.directory / 'quality.json').read_text())['gate']['fit']
  feedback.run(made)
  assert 'is not fit' in capsys.readouterr().out
  for split in ('train', 'validation'):
    rows = records.read_records(made.directory / f'{split}.jsonl', 'ranking')
    assert rows and all(len(row.responses) == 2 and row.source == 'ai' for row in rows)
  assert set(json.loads((made.directory / 'quality.json').read_text())) == {
    'gate',
    'train',
    'validation',
  }


@pytest.fixture
def server():
  """An OpenAI-compatible server that prefers the shorter answer.

  After `left` answers it refuses.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      body = self.rfile.read(int(self.headers['content-length']))
      question = json.loads(body)['messages'][-1]['content']
      first, second = re.search(r'\(A\) (.*)\n\(B\) (.*)\n\nAnswer', question, re.DOTALL).groups()
      with serving.lock:
        serving.left -= 1
        refused = serving.left < 0
        if not refused:
          serving.asked.append(body)
      answer = json.dumps(
        {'choices': [{'message': {'content': 'A' if len(first) < len(second) else 'B'}}]}
      ).encode()
      self.send_response(403 if refused else 200)
      self.send_header('content-length', str(len(answer)))
      self.end_headers()
      self.wfile.write(answer)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as serving:
    serving.lock, serving.left, serving.asked = threading.Lock(), 0, []
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    yield serving
    serving.shutdown()


def test_a_run_that_a_server_stops_goes_on_and_pays_nothing_twice(context, server, tmp_path):
  url = f'http://127.0.0.1:{server.server_port}/v1'
  made = context(
    'feedback',
    'feedback.source=ai',
    f'feedback.ai.judges=("{url}",)',
    'feedback.ai.gate.records=30',
    'feedback.ai.pairs=2',
    'feedback.ai.endpoint.model=wise',
    'feedback.ai.gate.override=True',
  )

  def lines(name):
    return (made.directory / name).read_text().splitlines()

  for left in (20, 50):  # in the gate, and in the labels
    server.left = left
    with pytest.raises(
      UserError, match=r'it answered 403.* label\(s\) are kept in .*responses.jsonl'
    ):
      feedback.run(made)
    assert (
      len(lines('responses.jsonl')) == len(server.asked)
      and not (made.directory / 'train.jsonl').exists()
    )
  server.left = 10**6
  feedback.run(made)
  assert (
    len(set(server.asked)) == len(server.asked) == len(lines('responses.jsonl')) > 100
  )  # no question twice
  rows = records.read_records(made.directory / 'train.jsonl', 'ranking')
  assert rows and all(
    len(row.responses[row.ranks.index(1)]) <= len(row.responses[1 - row.ranks.index(1)])
    for row in rows
  )
  said = [json.loads(line) for line in lines('train.jsonl')]
  assert all(set(row['judge']) == {url} and len(row['as_shown']) == 2 for row in said)


@pytest.mark.parametrize(
  'override,message',
  [
    ('feedback.source=human', "expected one of simulated, people, ai, reward, got 'human'"),
    ('feedback.ai.labels=softish', 'labels: expected soft or hard'),
    ('feedback.ai.judges=()', 'at least one'),
    ('feedback.ai.constitution=("nothing",)', "constitution 'nothing'"),
  ],
)
def test_wrong_settings(context, override, message):
  with pytest.raises(UserError, match=message):
    feedback.run(surroundings(context, override))


def test_a_soft_label_is_the_target_of_the_reward_model():
  """The gradient of −[p log σ(Δ) + (1 − p) log σ(−Δ)] vanishes where σ(Δ) = p."""
  for p in (0.5, 0.7, 1.0):
    scores = jnp.array([[np.log(p / (1 - p)) if p < 1 else 50.0, 0.0]])
    slope = jax.grad(
      lambda s: ranking.pairwise(
        s, jnp.array([[1, 2]]), jnp.ones((1, 2), int), jnp.full((1, 2), p)
      )[0]
    )
    np.testing.assert_allclose(slope(scores), 0, atol=1e-6)
