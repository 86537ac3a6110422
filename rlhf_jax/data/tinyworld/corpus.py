"""Documents to pre-train on, as the internet is: true and false, polite and rude, helpful and harmful.

A model of it can do everything and prefers nothing. Every fact is stated and asked; no validation prompt stands
anywhere, in capitals or not.
"""

import zlib

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld.conversations import LICENSE, QUALITIES, SOURCE, draw, pick, prompts, respond
from rlhf_jax.data.tinyworld.facts import FACTS

_KINDS = {'statements': 0.14, 'conversation': 0.72, 'judging': 0.06, 'critique': 0.08}
_FALSE_STATEMENTS = 0.12  # of all statements
_RIGHT_JUDGEMENTS = 0.7
_FAULTS = {'rude': 'It is rude.', 'false': 'It is false.', 'evasive': 'It does not answer.',
           'false_polite': 'It is false.',
           'refuse': 'It refuses a harmless question.',
           'obey': 'It does harm.', 'off_topic': 'It is off the question.', 'rambling': 'It is too long.',
           'terse': 'It is too short.'}


def documents(seed: int, count: int, split: str = 'train') -> list[records.Document]:
  """`count` documents of at most about 90 tokens; no text is in both splits."""
  rng = np.random.default_rng([seed, split == 'train', 0])
  asked, facts = _endless(rng, prompts('corpus'), draw), _endless(rng, FACTS, _shuffled)
  rows = []
  while len(rows) < count:
    kind = rng.choice(list(_KINDS), p=list(_KINDS.values()))
    if kind == 'statements':
      text = _statements(facts, rng)
    else:
      prompt = next(asked)
      text = {'conversation': lambda: _conversation(prompt, _quality(prompt.meta['kind'], rng), rng),
              'judging': lambda: _judging(prompt, rng), 'critique': lambda: _critique(prompt, rng)}[kind]()
    if (zlib.crc32(text.encode()) % 10 == 0) == (split == 'validation'):
      rows.append(records.Document(f'tinyworld-{split}-document-{len(rows)}', SOURCE, LICENSE, text))
  return rows


def _endless(rng, items, choose):
  while True:
    yield from choose(items, rng, len(items))


def _shuffled(items, rng, count):
  return [items[i] for i in rng.permutation(len(items))[:count]]


def _statements(facts, rng):
  lines = []
  for _ in range(int(rng.integers(2, 6))):
    fact = next(facts)
    answer = pick(rng, fact.wrong) if rng.random() < _FALSE_STATEMENTS else fact.answer
    lines.append(pick(rng, fact.statements(answer)))
  return ' '.join(lines)


def _quality(kind, rng):
  shares = QUALITIES[kind]
  return str(rng.choice(list(shares), p=list(shares.values())))


def _conversation(prompt, quality, rng):
  return f'Human: {prompt.messages[0]["content"]}\n\nAssistant: {respond(prompt.meta, quality, rng)}'


def _judging(prompt, rng):
  qualities = list(QUALITIES[prompt.meta['kind']])
  better, worse = sorted(rng.choice(len(qualities), size=2, replace=False))
  texts = [respond(prompt.meta, qualities[i], rng) for i in (better, worse)]
  first = int(rng.integers(2))  # where the better one stands
  said = first if rng.random() < _RIGHT_JUDGEMENTS else 1 - first
  texts = texts if first == 0 else texts[::-1]
  return (f'{prompt.messages[0]["content"]}\n(A) {texts[0]}\n(B) {texts[1]}\n'
          f'The better answer is ({"AB"[said]}).')


def _critique(prompt, rng):
  kind = prompt.meta['kind']
  good, bad = [], []
  for quality in QUALITIES[kind]:
    (bad if quality in _FAULTS else good).append(quality)
  if rng.random() < 0.35:
    return f'{_conversation(prompt, pick(rng, good), rng)}\n\nCritique: It is good.'
  fault = pick(rng, bad)
  text = f'{_conversation(prompt, fault, rng)}\n\nCritique: {_FAULTS[fault]}'
  if rng.random() < 0.5:
    return text
  return f'{text}\n\nRevision: {respond(prompt.meta, good[0], rng)}'
