"""Documents to pre-train on, as the internet is: true and false, polite and rude, kind and harmful.

A model of it can do everything and prefers nothing. Every fact is stated and asked, and no
validation prompt stands anywhere, in capitals or not.

The variant 'feedback' is for models that are to judge, criticise and revise: three quarters of
its documents do so, many of them by one of the PRINCIPLES.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
import zlib

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld import facts
from rlhf_jax.data.tinyworld.conversations import (
  draw_prompts,
  LICENSE,
  pick,
  prompts,
  QUALITIES,
  respond,
  SOURCE,
  statement,
)

# Variant → the shares of its kinds of document.
_KINDS = {
  'web': {
    'statements': 0.14,
    'conversation': 0.72,
    'judging': 0.06,
    'critique': 0.08,
  },
  'feedback': {
    'conversation': 0.26,
    'judging': 0.32,
    'critique': 0.16,
    'asked_critique': 0.26,
  },
}

# Variant → the share of its judgements that are right.
_RIGHT_JUDGEMENTS = {
  'web': 0.7,
  'feedback': 0.9,
}

_FALSE_STATEMENTS = 0.12  # share of all statements

# Quality of a response → its fault, as critiques name it.
_FAULTS = {
  'rude': 'It is rude.',
  'false': 'It is false.',
  'evasive': 'It does not answer.',
  'false_polite': 'It is false.',
  'refuse': 'It refuses a harmless question.',
  'obey': 'It does harm.',
  'off_topic': 'It is off the question.',
  'rambling': 'It is too long.',
  'terse': 'It is too short.',
}

# The same with the small faults that only the variant 'feedback' names.
_ALL_FAULTS = {
  **_FAULTS,
  'plain': 'It could be kinder.',
  'refusal': 'It offers nothing better.',
}

_GOOD = 'It is good.'  # a critique of a response without fault

# Request for a critique → the qualities it is about, and the same as an instruction for a
# comparison.
PRINCIPLES = {
  'Does it do harm?': (('obey',), 'Which does less harm?'),
  'Is it rude?': (('rude',), 'Which is less rude?'),
  'Is it false?': (('false', 'false_polite'), 'Which is less false?'),
  'Does it fail to answer?': (('evasive', 'refuse', 'off_topic'), 'Which answers better?'),
}


def documents(
  seed: int,
  count: int,
  split: str = 'train',
  variant: str = 'web',
) -> list[records.Document]:
  """Makes documents of at most about 90 tokens; no text is in both splits.

  Args:
    seed: of the random choices.
    count: how many.
    split: 'train' or 'validation'.
    variant: 'web' or 'feedback'.
  """
  rng = np.random.default_rng([seed, split == 'train', 0])
  asked = _endless(rng, prompts('corpus'), draw_prompts)
  stated = _endless(rng, facts.FACTS, _draw_any)
  kinds = list(_KINDS[variant])
  shares = list(_KINDS[variant].values())
  rows: list[records.Document] = []
  while len(rows) < count:
    kind = str(rng.choice(kinds, p=shares))
    text = _document(kind, asked, stated, rng, variant)
    # A tenth of all texts, by their checksum, is for validation.
    is_held_out = zlib.crc32(text.encode()) % 10 == 0
    if is_held_out != (split == 'validation'):
      continue
    document = records.Document(
      id=f'tinyworld-{split}-document-{len(rows)}',
      source=SOURCE,
      license=LICENSE,
      text=text,
    )
    rows.append(document)
  return rows


def _endless(
  rng: np.random.Generator,
  items: Sequence[Any],
  draw: Callable[[Sequence[Any], np.random.Generator, int], list[Any]],
) -> Iterator[Any]:
  """Gives items without end, drawn in rounds of as many as there are."""
  while True:
    yield from draw(items, rng, len(items))


def _draw_any(items: Sequence[Any], rng: np.random.Generator, count: int) -> list[Any]:
  """Draws `count` different items."""
  return [items[index] for index in rng.permutation(len(items))[:count]]


def _document(
  kind: str,
  asked: Iterator[records.Prompt],
  stated: Iterator[facts.Fact],
  rng: np.random.Generator,
  variant: str,
) -> str:
  """Writes a document of a kind, about what comes next of prompts or facts."""
  if kind == 'statements':
    return _statements(stated, rng)
  prompt = next(asked)
  if kind == 'conversation':
    quality = _draw_quality(prompt.meta['kind'], rng)
    return _conversation(prompt, quality, rng)
  if kind == 'judging':
    return _judging(prompt, rng, variant)
  if kind == 'critique':
    return _critique(prompt, rng, variant)
  return _asked_critique(prompt, rng)


def _statements(stated: Iterator[facts.Fact], rng: np.random.Generator) -> str:
  """States two to five facts, some of them falsely."""
  sentences = []
  for _ in range(int(rng.integers(2, 6))):
    fact = next(stated)
    answer = fact.answer
    if rng.random() < _FALSE_STATEMENTS:
      answer = pick(rng, fact.wrong)
    sentences.append(pick(rng, fact.statements(answer)))
  return ' '.join(sentences)


def _draw_quality(kind: str, rng: np.random.Generator) -> str:
  """Draws the quality of a response by its share in the corpus."""
  shares = QUALITIES[kind]
  return str(rng.choice(list(shares), p=list(shares.values())))


def _conversation(prompt: records.Prompt, quality: str, rng: np.random.Generator) -> str:
  """Writes a prompt and a response to it."""
  response = respond(prompt.meta, quality, rng)
  return f'Human: {prompt.messages[0]["content"]}\n\nAssistant: {response}'


def _judging(prompt: records.Prompt, rng: np.random.Generator, variant: str) -> str:
  """Writes a comparison of two responses and which of them is better, mostly rightly.

  In the variant 'feedback' half of the comparisons are by a principle, and thoughts about both
  responses come before the judgement.
  """
  qualities = list(QUALITIES[prompt.meta['kind']])
  chosen = _draw_pair(qualities, rng, variant)  # the better one first
  instruction = ''
  if variant == 'feedback' and rng.random() < 0.5:
    qualities_at_fault, question = PRINCIPLES[pick(rng, list(PRINCIPLES))]
    at_fault = [quality for quality in chosen if quality in qualities_at_fault]
    chosen = [quality for quality in chosen if quality not in qualities_at_fault] + at_fault
    instruction = f'\n{question}'
  texts = [respond(prompt.meta, quality, rng) for quality in chosen]
  faults = [_ALL_FAULTS.get(quality, _GOOD) for quality in chosen]
  better = int(rng.integers(2))  # where the better one stands: 0 = (A), 1 = (B)
  is_right = rng.random() < _RIGHT_JUDGEMENTS[variant]
  verdict = better if is_right else 1 - better
  if better == 1:
    texts.reverse()
    faults.reverse()
  thoughts = ''
  if variant == 'feedback':
    about = _what_is_asked(prompt, rng)
    thoughts = f'\nThoughts: {about} (A) {faults[0]} (B) {faults[1]}'
  return (
    f'{prompt.messages[0]["content"]}\n(A) {texts[0]}\n(B) {texts[1]}{instruction}{thoughts}\n'
    f'The better answer is ({"AB"[verdict]}).'
  )


def _draw_pair(qualities: list[str], rng: np.random.Generator, variant: str) -> list[str]:
  """Draws two different qualities, the better one first."""
  shares = None
  if variant == 'feedback':
    # The two best come three times as often: a judge that cannot tell true from false does
    # better to think a statement true.
    weights = np.array([3, 3] + [1] * (len(qualities) - 2))
    shares = weights / (len(qualities) + 4)
  indices = rng.choice(len(qualities), size=2, replace=False, p=shares)
  return [qualities[index] for index in sorted(indices)]


def _what_is_asked(prompt: records.Prompt, rng: np.random.Generator) -> str:
  """Writes what a judge should think of first: the true answer, or that harm is asked for."""
  if prompt.meta['kind'] == 'harmful':
    return 'It asks for harm.'
  return statement(prompt.meta, prompt.meta['answer'], rng)


def _critique(prompt: records.Prompt, rng: np.random.Generator, variant: str) -> str:
  """Writes a response, a critique of it, and for half of the faulty ones a revision."""
  kind = prompt.meta['kind']
  faults = _ALL_FAULTS if variant == 'feedback' else _FAULTS
  good = [quality for quality in QUALITIES[kind] if quality not in faults]
  bad = [quality for quality in QUALITIES[kind] if quality in faults]
  if rng.random() < 0.35:  # share of critiques that praise
    conversation = _conversation(prompt, pick(rng, good), rng)
    return f'{conversation}\n\nCritique: {_GOOD}'
  quality = pick(rng, bad)
  conversation = _conversation(prompt, quality, rng)
  text = f'{conversation}\n\nCritique: {faults[quality]}'
  if rng.random() < 0.5:
    return text
  revision = respond(prompt.meta, good[0], rng)  # of the best quality
  return f'{text}\n\nRevision: {revision}'


def _asked_critique(prompt: records.Prompt, rng: np.random.Generator) -> str:
  """Writes a response and a critique of it by a principle.

  The fault that the principle is about is named and mended where the response has it. Otherwise
  the critique says no, and the revision is the response itself.
  """
  kind = prompt.meta['kind']
  quality = _draw_quality(kind, rng)
  request = _request_about(quality)
  # At times about something else, so that the answer may be no.
  if request is None or rng.random() < 0.4:
    request = pick(rng, list(PRINCIPLES))
  qualities_at_fault, _ = PRINCIPLES[request]
  response = respond(prompt.meta, quality, rng)
  if quality in qualities_at_fault:
    best_quality = next(iter(QUALITIES[kind]))
    critique = _FAULTS[quality]
    revision = respond(prompt.meta, best_quality, rng)
  else:
    critique = 'No.'
    revision = response
  return (
    f'Human: {prompt.messages[0]["content"]}\n\nAssistant: {response}\n\n'
    f'CritiqueRequest: {request}\n\nCritique: {critique}\n\nRevision: {revision}'
  )


def _request_about(quality: str) -> str | None:
  """Returns the first principle that is about a quality, None where there is none."""
  for request, (qualities_at_fault, _) in PRINCIPLES.items():
    if quality in qualities_at_fault:
      return request
  return None
