"""Inputs of text: JSON Lines of records, lines of the commands, constitutions."""

from collections.abc import Iterator
import gzip
import json
from pathlib import Path
from typing import Any

from breaking.cases import (
  Case,
  changed_values,
  find_value,
  flips,
  is_other_type,
  odd_files,
  truncations,
)

USER = {'role': 'user', 'content': 'Why?'}
GOOD: dict[str, dict] = {
  'document': {'text': 'Some text.'},
  'demonstration': {'messages': [USER], 'response': 'So.'},
  'preference': {'messages': [USER], 'chosen': 'So.', 'rejected': 'No.'},
  'ranking': {'messages': [USER], 'responses': ['a', 'b', 'c'], 'ranks': [1, 2, 2]},
  'prompt': {'messages': [USER], 'meta': {'answer': 'x'}},
}
BAD_MESSAGES: tuple[Any, ...] = (
  [],
  [5],
  [None],
  ['x'],
  [{}],
  [{'role': 'user'}],
  [{'content': 'x'}],
  [{'role': 5, 'content': 'x'}],
  [{'role': 'user', 'content': 5}],
  [{'role': 'user', 'content': {'x': 1}}],
  [{'role': 'wizard', 'content': 'x'}],
  [USER, {'role': 'assistant', 'content': 'x'}],
  [[USER]],
  {'role': 'user', 'content': 'x'},
)


def record_cases() -> Iterator[Case]:
  """Yields files of records of all kinds."""
  for kind, good in GOOD.items():
    line = json.dumps(good).encode() + b'\n'
    for name, data in odd_files():
      yield _records(kind, f'second line: {name}', line + data + b'\n', bool(data.strip()))
      yield _records(kind, f'whole file: {name}', data, True)
    for name, data in truncations(line, 12):
      yield _records(kind, f'cut line: {name}', line + data, bool(data.strip()))
    for key, wrong, row in changed_values(good):
      refuse = is_other_type(find_value(good, key), wrong) and not key.startswith('meta')
      data = line + json.dumps(row).encode() + b'\n'
      yield _records(kind, f'{key} is {wrong!r}', data, refuse)
    if 'messages' in good:
      for messages in BAD_MESSAGES:
        asked = isinstance(messages, list) and messages[:1] == [USER]
        data = line + json.dumps({**good, 'messages': messages}).encode()
        refuse = not (asked and kind == 'prompt')
        yield _records(kind, f'messages {messages!r:.60}', data, refuse)
    packed = gzip.compress(line * 200)
    for name, data in truncations(packed, 8):
      yield _records(kind, f'gzip, {name}', data, True, 'train.jsonl.gz')
    for name, data in flips(packed, 8):
      yield _records(kind, f'gzip, {name}', data, False, 'train.jsonl.gz')
    for name, data in _bombs(line):
      yield _records(kind, f'gzip, {name}', data, True, 'train.jsonl.gz')
    for depth in (200, 900, 990):
      deep = json.dumps({**good, 'meta': 0})[:-2] + '{"a":' * depth + '1' + '}' * (depth + 1)
      yield _records(kind, f'{depth} objects deep', line + deep.encode(), True)
    for name in ('train.parquet', 'train.arrow'):
      for magic in (b'PAR1', b'ARROW1\x00\x00', b''):
        yield _records(kind, f'{name} beginning {magic!r}', magic + line, bool(magic), name)


def _bombs(line: bytes) -> Iterator[tuple[str, bytes]]:
  """Yields small archives of gigabytes, whose members follow one another."""
  for name, unit in (
    ('zeros', bytes(2**20)),
    ('empty lines', b'\n' * 2**20),
    ('one record again and again', line * (2**20 // len(line))),
    ('an array', b'[' + b' ' * 2**20),
  ):
    yield f'{name}, 4 GiB', gzip.compress(unit, 9) * 2**12


def _records(kind: str, name: str, data: bytes, refuse: bool, file: str = 'train.jsonl') -> Case:
  def run(folder: Path) -> None:
    from rlhf_jax.data import sources

    (folder / file).write_bytes(data)
    options = sources.DataOptions(source='jsonl', path=(str(folder / file),))
    for record in sources.load_records(options, kind, 'train'):
      del record

  return Case('JSON Lines', f'{kind}: {name}', run, 'train', refuse)


LINES: tuple[dict[str, Any], ...] = (
  {'text': 'abc'},
  {'prompt': 'abc'},
  {'messages': [USER]},
  {'tokens': [1, 2, 3]},
  {'prompt': 'abc', 'response': 'x'},
  {'messages': [USER], 'responses': ['x', 'y']},
  {'text': 'abc', 'responses': ['x']},
  {'tokens': [1, 2], 'response_tokens': [[1], [2]]},
)


def line_cases() -> Iterator[Case]:
  """Yields inputs of `generate` and `score`."""
  for scored in (False, True):
    command = 'score' if scored else 'generate'
    for good in LINES:
      for key, wrong, row in changed_values(good):
        refuse = not scored and is_other_type(find_value(good, key), wrong)
        refuse = refuse and key in ('text', 'tokens')
        yield _lines(command, f'{good}: {key} is {wrong!r}', json.dumps(row).encode(), refuse)
    for name, data in odd_files():
      yield _lines(command, name, data, True)
    for ids in ([-1], [10**9], [1.5], ['1'], [None], [[1]], [True], []):
      yield _lines(command, f'tokens {ids}', json.dumps({'tokens': ids}).encode(), True)
    for row in ({'text': 'a', 'prompt': 'b'}, {'text': '\ud800'}, {'prompt': '\x1b[2J\x00'}):
      yield _lines(command, f'{row!r}', json.dumps(row).encode(), False)


def _lines(command: str, name: str, data: bytes, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    from breaking import models
    from rlhf_jax.commands import inputs
    from rlhf_jax.errors import UserError

    path = folder / 'in.jsonl'
    path.write_bytes(data + b'\n')
    tokenizer = models.tokenizer()
    for line in inputs.read_lines(path, with_response=command == 'score'):
      encoded = inputs.encode_line(line, tokenizer, tokenizer.vocab_size)
      if not all(0 < len(ids) < 1000 for ids in encoded):  # lines.encode_lines
        raise UserError(f'{line.place}: expected 1 to 1000 tokens')

  return Case("commands' lines", f'{command}: {name}', run, 'in.jsonl', refuse)


CONSTITUTION = {
  'principles': [
    {'id': 'a', 'critique': 'Criticise.', 'revision': 'Revise.', 'weight': 1.0},
    {'id': 'b', 'choose': 'Choose.'},
  ],
  'critique_examples': ['Human: x'],
  'comparison_examples': [{'human': 'x', 'better': 'y', 'worse': 'z'}],
  'thought_examples': ['Because {}'],
}
ALIASES = '\n'.join(
  ['a0: &a0 ["lol","lol","lol","lol","lol","lol","lol","lol","lol"]']
  + [f'a{n}: &a{n} [{",".join([f"*a{n - 1}"] * 9)}]' for n in range(1, 12)]
)
YAMLS = (
  'principles: {{id: a}}',
  'principles: [',
  '\tprinciples: a',
  'principles: &x [*x]',
  '!!python/object/apply:os.system ["true"]',
  'principles: !!python/name:os.system',
  f'{ALIASES}\nprinciples: *a11',
  f'principles:\n- id: x\n  choose: text\n{ALIASES}',
  'principles: ' + '[' * 5000,
  'a: b: c',
  '- 1\n- 2',
  '- {corrects: 5}',
  '- corrects: [x]\n  prompt: 7',
  '{x: {prompt: [], edit_request: y}}',
  '{x: {prompt: 5, edit_request: y}}',
  '{1: 2}',
  '5',
  '2020-01-01',
  'principles: 5',
  'principles: text',
  'principles: null',
  'principles: []\ncritique_examples: 5',
  'principles: []\ncritique_examples: [5]',
  'principles: []\nthought_examples: [{}]',
  'principles: []\nthought_examples: text',
  'principles: []\ncomparison_examples: 7',
)


def constitution_cases() -> Iterator[Case]:
  """Yields constitutions."""
  for number, text in enumerate(YAMLS):
    yield _constitution(f'YAML {number}: {text[:40]!r}', text.encode(), 'c.yaml', True)
  for name, data in odd_files():
    for file in ('c.yaml', 'c.json', 'c.jsonl'):
      yield _constitution(f'{file}: {name}', data, file, name != 'a text' or file != 'c.yaml')
  text = json.dumps(CONSTITUTION).encode()
  for name, data in truncations(text, 20):
    yield _constitution(name, data, 'c.json', True)
  for key, wrong, content in changed_values(CONSTITUTION):
    refuse = is_other_type(find_value(CONSTITUTION, key), wrong)
    yield _constitution(f'{key} is {wrong!r}', json.dumps(content).encode(), 'c.json', refuse)
  for key in CONSTITUTION['principles'][0]:
    for wrong in ([], {}, None, -1, float('nan')):
      item = {**CONSTITUTION['principles'][0], key: wrong}
      data = json.dumps({'principles': [item]}).encode()
      yield _constitution(f'principle: {key} is {wrong!r}', data, 'c.json', True)


def _constitution(name: str, data: bytes, file: str, refuse: bool) -> Case:
  def run(folder: Path) -> None:
    import numpy as np

    from rlhf_jax.feedback import constitution

    (folder / file).write_bytes(data)
    loaded = constitution.load_constitution(str(folder / file))
    for use in ('critique', 'choose'):
      if any(getattr(principle, use) for principle in loaded.principles):
        loaded.draw(use, np.random.default_rng(0))
    if refuse and not loaded.principles:
      loaded.draw('choose', np.random.default_rng(0))

  return Case('constitutions', name, run, f'{file}|constitution', refuse)
