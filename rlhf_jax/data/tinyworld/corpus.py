"""Documents to pre-train on, as the internet is: true and false, polite and rude, helpful and harmful.

A model of it can do everything and prefers nothing. Every fact is stated and asked; no validation prompt stands
anywhere, in capitals or not. The 'feedback' variant is for models that shall judge, criticise and revise: three quarters of
it does so, much of that by the principles of PRINCIPLES.
"""

import zlib

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld.conversations import (
    LICENSE, QUALITIES, SOURCE, draw, pick, prompts, respond, statement)
from rlhf_jax.data.tinyworld.facts import FACTS

_KINDS = {  # shares of a variant's documents
    'web': {'statements': 0.14, 'conversation': 0.72, 'judging': 0.06, 'critique': 0.08},
    'feedback': {'conversation': 0.26, 'judging': 0.32, 'critique': 0.16, 'asked_critique': 0.26}}
_RIGHT_JUDGEMENTS = {'web': 0.7, 'feedback': 0.9}
_FALSE_STATEMENTS = 0.12  # of all statements
_FAULTS = {'rude': 'It is rude.', 'false': 'It is false.', 'evasive': 'It does not answer.',
           'false_polite': 'It is false.',
           'refuse': 'It refuses a harmless question.',
           'obey': 'It does harm.', 'off_topic': 'It is off the question.', 'rambling': 'It is too long.',
           'terse': 'It is too short.'}
_ALL_FAULTS = {**_FAULTS, 'plain': 'It could be kinder.', 'refusal': 'It offers nothing better.'}  # of 'feedback'
_GOOD = 'It is good.'
PRINCIPLES = {  # a request for a critique → the faults it is about, and the same as an instruction for a comparison
    'Does it do harm?': (('obey',), 'Which does less harm?'), 'Is it rude?': (('rude',), 'Which is less rude?'),
    'Is it false?': (('false', 'false_polite'), 'Which is less false?'),
    'Does it fail to answer?': (('evasive', 'refuse', 'off_topic'), 'Which answers better?')}


def documents(seed: int, count: int, split: str = 'train', variant: str = 'web') -> list[records.Document]:
  """`count` documents of at most about 90 tokens; no text is in both splits."""
  rng = np.random.default_rng([seed, split == 'train', 0])
  asked, facts = _endless(rng, prompts('corpus'), draw), _endless(rng, FACTS, _shuffled)
  rows = []
  while len(rows) < count:
    kind = rng.choice(list(_KINDS[variant]), p=list(_KINDS[variant].values()))
    if kind == 'statements':
      text = _statements(facts, rng)
    else:
      prompt = next(asked)
      text = {'conversation': lambda: _conversation(prompt, _quality(prompt.meta['kind'], rng), rng),
              'judging': lambda: _judging(prompt, rng, variant),
              'critique': lambda: _critique(prompt, rng, variant), 'asked_critique': lambda: _asked_critique(prompt, rng)}[kind]()
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


def _judging(prompt, rng, variant):
  qualities = list(QUALITIES[prompt.meta['kind']])
  shares = None
  if variant == 'feedback':  # the two best thrice as often: who cannot tell true from false had better think it true
    shares = np.array([3, 3] + [1] * (len(qualities) - 2)) / (len(qualities) + 4)
  chosen = sorted(rng.choice(len(qualities), size=2, replace=False, p=shares))  # the better one first
  instruction = ''
  if variant == 'feedback' and rng.random() < 0.5:
    faults, instruction = PRINCIPLES[pick(rng, list(PRINCIPLES))]
    chosen.sort(key=lambda i: qualities[i] in faults)
    instruction = f'\n{instruction}'
  texts = [respond(prompt.meta, qualities[i], rng) for i in chosen]
  first = int(rng.integers(2))  # where the better one stands
  said = first if rng.random() < _RIGHT_JUDGEMENTS[variant] else 1 - first
  faults = [_ALL_FAULTS.get(qualities[i], _GOOD) for i in chosen]
  if first:
    texts, faults = texts[::-1], faults[::-1]
  thoughts = ''
  if variant == 'feedback':  # what the question is about comes first
    about = 'It asks for harm.' if prompt.meta['kind'] == 'harmful' else statement(prompt.meta, prompt.meta['answer'], rng)
    thoughts = f'\nThoughts: {about} (A) {faults[0]} (B) {faults[1]}'
  return (f'{prompt.messages[0]["content"]}\n(A) {texts[0]}\n(B) {texts[1]}{instruction}{thoughts}\n'
          f'The better answer is ({"AB"[said]}).')


def _critique(prompt, rng, variant):
  kind = prompt.meta['kind']
  faults = _ALL_FAULTS if variant == 'feedback' else _FAULTS
  good, bad = [], []
  for quality in QUALITIES[kind]:
    (bad if quality in faults else good).append(quality)
  if rng.random() < 0.35:
    return f'{_conversation(prompt, pick(rng, good), rng)}\n\nCritique: {_GOOD}'
  fault = pick(rng, bad)
  text = f'{_conversation(prompt, fault, rng)}\n\nCritique: {faults[fault]}'
  if rng.random() < 0.5:
    return text
  return f'{text}\n\nRevision: {respond(prompt.meta, good[0], rng)}'


def _asked_critique(prompt, rng):
  """A critique by a principle: the fault is named and mended if the answer has it, else the answer stays what it was."""
  kind = prompt.meta['kind']
  quality = _quality(kind, rng)
  request = next((request for request, (faults, _) in PRINCIPLES.items() if quality in faults), None)
  if request is None or rng.random() < 0.4:
    request = pick(rng, list(PRINCIPLES))
  at_fault = quality in PRINCIPLES[request][0]
  answer = respond(prompt.meta, quality, rng)
  revision = respond(prompt.meta, next(iter(QUALITIES[kind])), rng) if at_fault else answer
  return (f'Human: {prompt.messages[0]["content"]}\n\nAssistant: {answer}\n\nCritiqueRequest: {request}\n\n'
          f'Critique: {_FAULTS[quality] if at_fault else "No."}\n\nRevision: {revision}')
