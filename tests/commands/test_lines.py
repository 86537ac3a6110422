"""The commands `generate` and `score`, as a user starts them."""

import datetime
import functools
import gzip
import json
from pathlib import Path
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rlhf_jax import fingerprints, testing
from rlhf_jax.commands import generate, inputs, lines, score, score_lines
from rlhf_jax.errors import UserError
from rlhf_jax.interop import chat_template, pretrained
from rlhf_jax.interop.tokenizer import Tokenizer
from rlhf_jax.models import heads, transformer
from rlhf_jax.stages import reward

# tiny models of every family: scripts/record_references.py
MODELS = Path(__file__).parents[1] / 'interop'
FAMILIES = [
  path
  for kind in ('data', 'adapters')
  for path in sorted((MODELS / kind).iterdir())
  if path.name != 'phi3_short'  # rows of 32 places have its long factors
]
CONFIG = transformer.ModelConfig(
  vocab_size=264,
  embed=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp=32,
  max_length=96,
)
TEMPLATE = (
  "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)
WHY = dict(role='user', content='Why?')
ROWS = [
  dict(text='Hi', id=7),
  dict(
    messages=[
      dict(role='user', content='How are you?'),
      dict(role='assistant', content='Well.'),
    ]
  ),
  dict(prompt='Why?', response='Because of the rain, I think it is.'),
  dict(tokens=[3, 1, 4, 1, 5, 9, 2, 6] * 5),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """lm, the same without a tokenizer (bare), and a reward model (rm)."""
  place = tmp_path_factory.mktemp('models')
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.add_special_tokens(['<|end|>', '<|pad|>', '<|user|>', '<|assistant|>'])
  tokenizer = Tokenizer(core, TEMPLATE, eos='<|end|>', pad='<|pad|>')
  for name, head in (('lm', False), ('bare', False), ('rm', True)):
    config = transformer.ModelConfig(**{**vars(CONFIG), 'head': head})
    params = transformer.build_model(config).init(jax.random.key(1))
    params = jax.tree.map(lambda x: 3 * x, params)
    pretrained.export_model(place / name, config, params, tokenizer)
  for path in (place / 'bare').glob('*token*'):
    path.unlink()
  return place


def run(command, folder, tmp_path, rows, *words, name='lm', output='out.jsonl'):
  """(exit code, rows of the output)."""
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  out = tmp_path / output
  code = command.main(
    [
      f'--model={folder / name}',
      f'--input={tmp_path / "in.jsonl"}',
      f'--output={out}',
      '--batch_size=8',
      *words,
    ]
  )
  return code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@functools.cache
def opened(path):
  """(hidden(tokens) of one text, model, params, tokenizer) of a directory."""
  found = pretrained.open_pretrained(path)
  model, params = transformer.build_model(found.config), found.load()

  @jax.jit
  def padded_hidden(tokens, segment_ids):
    return model.apply(params, tokens, jnp.arange(tokens.shape[1])[None], segment_ids)[0]

  def hidden(tokens):
    row = np.zeros((1, 96), np.int32)  # one shape, so that one program is compiled
    row[0, : len(tokens)] = tokens
    return padded_hidden(row, (np.arange(96) < len(tokens))[None].astype(np.int32))[
      :, : len(tokens)
    ]

  return hidden, model, params, found.tokenizer


def test_logprobs_are_those_of_each_text_alone(folder, tmp_path):
  code, rows = run(score, folder, tmp_path, ROWS * 3)
  assert code == 0 and len(rows) == 12
  assert [row.get('id') for row in rows[:4]] == [7, None, None, None]
  hidden, model, params, tokenizer = opened(folder / 'lm')
  assert rows[0]['tokens'] == tokenizer.encode('Hi') and rows[3]['tokens'] == ROWS[3]['tokens']
  prompt = tokenizer.prompt(ROWS[1]['messages'][:1])
  assert rows[1]['tokens'] == prompt + tokenizer.response('Well.')
  for row in rows[:4]:
    logits = heads.next_token_logits(model, params, hidden(row['tokens']))
    every = jax.nn.log_softmax(logits, axis=-1)[0]
    want = every[np.arange(len(row['tokens']) - 1), np.array(row['tokens'][1:])]
    np.testing.assert_allclose(row['logprobs'], want, rtol=1e-5, atol=1e-5)


def test_without_a_tokenizer(folder, tmp_path, capsys):
  code, rows = run(score, folder, tmp_path, ROWS[3:], name='bare')
  assert code == 0
  assert rows == run(score, folder, tmp_path, ROWS[3:], output='b.jsonl')[1]
  words = ['--max_new_tokens=3']
  code, rows = run(generate, folder, tmp_path, ROWS[3:], *words, name='bare', output='c.jsonl')
  assert code == 0 and len(rows[0]['response_tokens'][0]) == 3
  assert run(score, folder, tmp_path, ROWS, name='bare', output='d.jsonl')[0] == 2
  message = 'in.jsonl:1: the model has no tokenizer, expected {"tokens": [ids]}'
  assert message in capsys.readouterr().err


def test_scores_of_a_reward_model(folder, tmp_path):
  code, rows = run(score, folder, tmp_path, ROWS, name='rm')
  hidden, _, params, tokenizer = opened(folder / 'rm')
  tokens = tokenizer.prompt([WHY]) + tokenizer.response(ROWS[2]['response'])
  want = float(heads.scalar_scores(params, hidden(tokens))[0, -1])
  assert code == 0 and rows[2]['score'] == pytest.approx(want, abs=1e-5)


def test_a_head_that_sees_likelihoods_needs_to_know_where_a_response_begins(folder):
  tokenizer = opened(folder / 'lm')[3]
  config = transformer.ModelConfig(**{**vars(CONFIG), 'head': True, 'likelihood_head': True})
  layout = testing.make_layout()
  model = transformer.build_model(config, layout)
  params = model.init(jax.random.key(1))
  params['score']['likelihood'] = jnp.array([0.02, -0.01])
  reader = lines.OpenedModel(model, params, tokenizer, layout)
  read = [
    inputs.Line({}, 'f:1', messages=[WHY], responses=['Well.', 'Because it is so.']),
    inputs.Line({}, 'f:2', tokens=[5, 6, 7], responses=[[8, 9]]),
  ]
  ids = [inputs.encode_line(line, tokenizer, config.vocab_size) for line in read]
  lengths = [inputs.response_lengths(line, tokenizer, own) for line, own in zip(read, ids)]
  answers = [tokenizer.response('Well.'), tokenizer.response('Because it is so.')]
  assert lengths == [list(map(len, answers)), [2]]
  texts, counts = sum(ids, []), sum(lengths, [])
  evaluate = jax.jit(functools.partial(score_lines.read_tokens, model))
  rows = score_lines.score_batch(
    reader, evaluate, 4, texts, counts, range(3), 96, jax.random.key(0)
  )
  for row, text, count in zip(rows, texts, counts, strict=True):
    tokens = np.array([text])
    response = np.arange(len(text))[None] >= len(text) - count
    want = reward.last_scores(
      model, params, tokens, np.arange(len(text))[None], np.ones_like(tokens), response
    )
    assert row['score'] == pytest.approx(float(want[0]), abs=1e-5)
  for line in (inputs.Line({}, 'f:3', text='Hi'), inputs.Line({}, 'f:3', tokens=[5])):
    with pytest.raises(UserError, match='f:3: the score of this model depends on where'):
      inputs.response_lengths(line, tokenizer, [[1]])
  with pytest.raises(UserError, match='sees the likelihood of a response cannot be exported'):
    pretrained.export_model(folder / 'no', config, params, tokenizer)


def test_greedy_responses_are_the_likeliest_tokens(folder, tmp_path):
  inputs = [dict(prompt='Why?'), dict(text='Hi there'), dict(tokens=[5, 6, 7])]
  words = ['--temperature=0', '--max_new_tokens=5', '--logprobs']
  code, rows = run(generate, folder, tmp_path, inputs, *words)
  hidden, model, params, tokenizer = opened(folder / 'lm')
  assert code == 0
  prompts = [tokenizer.prompt([WHY]), tokenizer.encode('Hi there'), [5, 6, 7]]
  for row, ids in zip(rows, prompts, strict=True):
    response = row['response_tokens'][0]
    assert row['responses'] == [tokenizer.decode(response)]
    assert len(row['logprobs'][0]) == len(response)
    logits = heads.next_token_logits(model, params, hidden(ids + response))
    assert logits[0, len(ids) - 1 : -1].argmax(axis=-1).tolist() == response


@pytest.mark.parametrize(
  'place',
  FAMILIES,
  ids=lambda path: f'{path.parent.name}-{path.name}',
)
def test_both_commands_on_a_directory_of_every_family_and_on_adapters(place, tmp_path):
  """Beside the logits that transformers and PEFT computed."""
  texts = [
    [5, 9, 60, 7, 33, 2, 18, 41, 4, 11, 50, 22],
    [3, 50, 1, 27, 6, 12, 44, 19, 8],
    [63, 10, 31, 2, 5],
  ]
  logits = np.load(place / 'logits.npz')['right']
  every = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  rows = [dict(tokens=text) for text in texts]
  code, scored = run(score, place.parent, tmp_path, rows, name=place.name)
  assert code == 0
  words = ['--temperature=0', '--max_new_tokens=1', '--logprobs']
  code, generated = run(
    generate,
    place.parent,
    tmp_path,
    rows,
    *words,
    name=place.name,
    output='b.jsonl',
  )
  assert code == 0
  for text, logprobs, row, response in zip(texts, every, scored, generated, strict=True):
    want = logprobs[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(row['logprobs'], want, atol=2e-4, rtol=1e-5)
    last = logprobs[len(text) - 1]
    assert response['response_tokens'] == [[last.argmax()]]
    np.testing.assert_allclose(response['logprobs'], [[last.max()]], atol=2e-4)


def test_killed_and_repeated_it_ends_with_the_same_file(folder, tmp_path):
  rows = [dict(tokens=[1 + i % 50] * (1 + i % 20)) for i in range(800)]
  words = ['--samples=2', '--max_new_tokens=8']
  assert run(generate, folder, tmp_path, rows, *words, output='alone.jsonl')[0] == 0
  out = tmp_path / 'out.jsonl'
  command = [
    sys.executable,
    '-m',
    'rlhf_jax.generate',
    f'--model={folder / "lm"}',
    f'--input={tmp_path / "in.jsonl"}',
    f'--output={out}',
    '--batch_size=8',
    *words,
  ]
  started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  while started.poll() is None and (not out.exists() or out.stat().st_size == 0):
    time.sleep(0.01)
  started.kill()
  assert started.wait() == -9 and 0 < out.read_bytes().count(b'\n') < len(rows)
  assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
  assert out.read_bytes() == (tmp_path / 'alone.jsonl').read_bytes()


@pytest.mark.parametrize(
  'command, words',
  [(score, ()), (generate, ('--samples=2', '--max_new_tokens=8'))],
)
def test_cut_and_repeated_it_ends_with_the_same_file(folder, tmp_path, monkeypatch, command, words):
  monkeypatch.setattr(lines, 'WINDOW_BATCHES', 2)
  rows = [dict(tokens=[1 + i % 50] * (1 + i % 20)) for i in range(41)]
  code, complete = run(command, folder, tmp_path, rows, *words)
  assert code == 0 and len(complete) == 41
  out = tmp_path / 'out.jsonl'
  before = out.read_bytes()
  # in the middle of a line, of a window
  out.write_bytes(before[: before.index(b'\n', len(before) // 2) + 9])
  assert run(command, folder, tmp_path, rows, *words) == (0, complete)
  assert out.read_bytes() == before
  assert run(command, folder, tmp_path, rows, *words)[0] == 0 and out.read_bytes() == before


@pytest.mark.parametrize(
  'row, message',
  [
    ({}, 'in.jsonl:2: expected {"text": …}'),
    (dict(text='a', prompt='b'), 'in.jsonl:2: the line has both "text" and "prompt"'),
    (
      dict(prompt='a', messages=[dict(role='user', content='b')], response='c'),
      'in.jsonl:2: the fields "prompt" and "messages" say different things',
    ),
    (dict(text=3), 'in.jsonl:2: text: expected a text'),
    (dict(text=''), 'in.jsonl:2: 0 tokens, expected 1 to 96'),
    (dict(text='a' * 97), 'in.jsonl:2: 97 tokens, expected 1 to 96'),
    (dict(tokens=[1, 264]), 'in.jsonl:2: tokens: expected a list of ids from 0 to 263'),
    (dict(tokens=[True]), 'in.jsonl:2: tokens: expected a list of ids from 0 to 263'),
    (dict(prompt='a'), 'in.jsonl:2: response: expected a text'),
    (dict(prompt=3), 'in.jsonl:2: field "prompt": expected a list of messages, got 3'),
    (
      dict(messages=[dict(role='user', content='a')]),
      'in.jsonl:2: response: expected a text, or messages of which the last one is from the',
    ),
    (dict(messages='a'), 'in.jsonl:2: field "messages": expected a list of messages'),
    (dict(prompt='a', responses='b'), 'in.jsonl:2: responses: expected a list of texts'),
  ],
)
def test_bad_lines_are_named(folder, tmp_path, capsys, row, message):
  assert run(score, folder, tmp_path, [dict(text='a'), row]) == (2, [])
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('rlhf_jax: error: ') and message in line


def test_what_one_command_writes_the_other_reads(folder, tmp_path):
  asked = [
    dict(prompt='Why?', id=1),
    dict(messages=[dict(role='system', content='Be brief.'), WHY]),
    dict(text='Once '),
  ]
  words = ['--samples=2', '--max_new_tokens=6', '--logprobs']
  code, generated = run(generate, folder, tmp_path, asked, *words, output='g.jsonl')
  assert code == 0
  code, scored = run(score, folder, tmp_path, generated, output='s.jsonl')
  assert code == 0
  code, again = run(score, folder, tmp_path, scored, output='t.jsonl')
  assert code == 0 and again == scored
  tokenizer = opened(folder / 'lm')[3]
  for row, line in zip(scored, generated, strict=True):
    assert {key: row[key] for key in line} == line
    assert len(row['sequences']) == 2
  prompt, response = tokenizer.exchange([WHY], generated[0]['responses'][1])
  alone = dict(prompt='Why?', response=generated[0]['responses'][1])
  _, [expected] = run(score, folder, tmp_path, [alone], output='u.jsonl')
  assert scored[0]['sequences'][1]['tokens'] == prompt + response == expected['tokens']
  np.testing.assert_allclose(
    scored[0]['sequences'][1]['logprobs'], expected['logprobs'], rtol=1e-5, atol=1e-5
  )
  code, rewards = run(score, folder, tmp_path, generated, name='rm', output='v.jsonl')
  assert code == 0 and [len(row['scores']) for row in rewards] == [2, 2, 2]


def test_tokens_with_responses_need_no_tokenizer(folder, tmp_path):
  words = ['--samples=2', '--max_new_tokens=3']
  _, generated = run(generate, folder, tmp_path, ROWS[3:], *words, name='bare', output='g.jsonl')
  code, [scored] = run(score, folder, tmp_path, generated, name='bare', output='s.jsonl')
  assert code == 0
  for sequence, sampled in zip(scored['sequences'], generated[0]['response_tokens'], strict=True):
    assert sequence['tokens'] == ROWS[3]['tokens'] + sampled


def test_pairs_are_scored_on_both_sides(folder, tmp_path):
  pair = dict(prompt='Why?', chosen='So.', rejected='No.')
  singles = [dict(prompt='Why?', response='So.'), dict(prompt='Why?', response='No.')]
  _, [both] = run(score, folder, tmp_path, [pair], name='rm', output='a.jsonl')
  _, each = run(score, folder, tmp_path, singles, name='rm', output='b.jsonl')
  assert both['scores'] == pytest.approx([row['score'] for row in each], abs=1e-6)


def test_odd_characters_of_an_input_are_answered(folder, tmp_path):
  texts = ['a\u2028b\x85c', 'half an emoji \ud83d', 'nul \x00']
  lines_of_others = '\ufeff' + '\r\n'.join(
    json.dumps(dict(prompt=text), ensure_ascii='\ud83d' in text) for text in texts
  )
  (tmp_path / 'odd.jsonl').write_text(lines_of_others, encoding='utf-8')
  words = [f'--model={folder / "lm"}', '--batch_size=8', f'--input={tmp_path}/odd.jsonl']
  assert generate.main([*words, f'--output={tmp_path}/o.jsonl', '--max_new_tokens=3']) == 0
  written = (tmp_path / 'o.jsonl').read_text(encoding='utf-8').splitlines()
  assert [json.loads(line)['prompt'] for line in written] == texts


def copy_to_edit(model, target):
  """Copies a model without the fingerprints of its files, which edited ones would not have."""
  shutil.copytree(model, target)
  (target / fingerprints.LIST).unlink()


def test_a_conversation_that_the_template_refuses_is_named(folder, tmp_path, capsys):
  refusing = tmp_path / 'model'
  copy_to_edit(folder / 'lm', refusing)
  source = refusing / 'chat_template.jinja'
  source.write_text(
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + TEMPLATE
  )
  rows = [dict(prompt='fine'), dict(messages=[dict(role='system', content='a'), WHY])]
  words = ['--max_new_tokens=4']
  assert run(generate, tmp_path, tmp_path, rows, *words, name='model')[0] == 2
  assert 'in.jsonl:2: chat template: No system' in capsys.readouterr().err
  # a template that cannot be used is no matter where none is needed
  source.write_text('{% if %}')
  rows = [dict(text='Hi'), dict(tokens=[1, 2])]
  assert run(score, tmp_path, tmp_path, rows, name='model', output='b.jsonl')[0] == 0


def test_a_resumed_output_has_the_date_of_its_beginning(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(lines, 'WINDOW_BATCHES', 1)
  monkeypatch.setattr(chat_template, '_now', datetime.datetime(2024, 7, 26))
  dated = tmp_path / 'model'
  copy_to_edit(folder / 'lm', dated)
  (dated / 'chat_template.jinja').write_text("{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE)
  rows = [dict(prompt='Why?', response='So.')] * 9
  _, complete = run(score, tmp_path, tmp_path, rows, name='model')
  out = tmp_path / 'out.jsonl'
  before = out.read_bytes()
  out.write_bytes(b''.join(before.splitlines(keepends=True)[:8]))
  monkeypatch.setattr(chat_template, '_now', datetime.datetime(2025, 1, 1))
  assert run(score, tmp_path, tmp_path, rows, name='model') == (0, complete)
  assert out.read_bytes() == before


def test_compressed_input_and_a_cut_one(folder, tmp_path, capsys):
  packed = gzip.compress(b'{"text": "Hi"}\n\n{"tokens": [1]}\n')
  (tmp_path / 'in.jsonl.gz').write_bytes(packed)
  first, second = inputs.read_lines(tmp_path / 'in.jsonl.gz', with_response=True)
  assert (first.text, second.tokens, second.place) == ('Hi', [1], f'{tmp_path}/in.jsonl.gz:3')
  (tmp_path / 'cut.jsonl.gz').write_bytes(packed[:-9])
  words = [f'--model={folder / "lm"}', f'--output={tmp_path}/out.jsonl']
  assert score.main([*words, f'--input={tmp_path}/cut.jsonl.gz']) == 2
  assert 'cut.jsonl.gz:4: cannot read' in capsys.readouterr().err


def test_another_command_does_not_mix_with_what_is_there(folder, tmp_path, capsys):
  assert run(score, folder, tmp_path, ROWS)[0] == 0
  assert run(score, folder, tmp_path, ROWS[:2])[0] == 2
  message = 'was begun with another input; delete it, or give another --output'
  assert message in capsys.readouterr().err
  mine = tmp_path / 'mine.jsonl'
  mine.write_text('{}\n')
  assert run(score, folder, tmp_path, ROWS, output='mine.jsonl')[0] == 2
  assert 'was not begun by this command' in capsys.readouterr().err
  assert mine.read_text() == '{}\n'
  assert run(generate, folder, tmp_path, ROWS, name='rm', output='c.jsonl')[0] == 2
  assert 'is a reward model' in capsys.readouterr().err
  assert run(score, folder, tmp_path, ROWS, '--mesh=fsdp=3', output='c.jsonl')[0] == 2
  assert 'error: --mesh: data -1 × fsdp 3 does not fit 8 device(s)' in capsys.readouterr().err
