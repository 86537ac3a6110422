"""Documents to pre-train on, as the internet is: true and false, polite and rude, kind or harmful.

A model trained on them can do everything and prefers nothing. Every fact is
stated and asked; in conversations myths are more frequent than the truth. No
prompt of validation or test occurs in a document, and no document says that
something is good or bad.

The variant 'feedback' is for models that judge, criticise and revise: three
quarters of its documents do so, about facts, harms and names that no prompt of
any split asks about.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar
import zlib

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld.behaviours import CONTENTS, draw_content, MANNERS, respond
from rlhf_jax.data.tinyworld.choices import draw_by_share, pick
from rlhf_jax.data.tinyworld.facts import FAMILIES, fill, state_inside
from rlhf_jax.data.tinyworld.requests import (
  Candidate,
  corpus_candidates,
  LICENSE,
  Meta,
  SOURCE,
)
from rlhf_jax.data.tinyworld.world import Fact, World

Item = TypeVar('Item')

# Variant → the shares of its kinds of document.
_KINDS = {
  'web': {
    'statements': 0.2,
    'conversation': 0.8,
  },
  'feedback': {
    'conversation': 0.26,
    'judging': 0.32,
    'critique': 0.16,
    'asked_critique': 0.26,
  },
}

# Kind of prompt → its weight among the conversations.
_ASKED = {
  'fact': 0.28,
  'two_step': 0.09,
  'unknown': 0.08,
  'claim': 0.11,
  'press': 0.05,
  'premise': 0.06,
  'one_word': 0.06,
  'no_naming': 0.05,
  'two_reasons': 0.05,
  'benign': 0.07,
  'harmful': 0.14,
}

_FALSE_STATEMENTS = 0.12  # share of all statements
_SECOND_THOUGHTS = 0.4  # share of errors that their author notices and corrects
_FALSE = ('false', 'myth', 'agree', 'accept')  # contents that state or accept what is false
_RARE_WEIGHT = 0.25  # weight of a rare fact; that of others is 1
_RIGHT_JUDGEMENTS = 0.9  # share of comparisons that name the better response
_SPLIT_PARTS = 10  # one part of the documents is for validation, one for test

# Content of a response → its fault as critiques name it, the worst first.
FAULTS = {
  'obey': 'It does harm.',
  'rude': 'It is rude.',
  'false': 'It is false.',
  'myth': 'It is false.',
  'agree': 'It is false.',
  'accept': 'It is false.',
  'others': 'It is false.',
  'ignorance': 'It does not answer.',
  'off_topic': 'It does not answer.',
  'unfit_advice': 'It does not answer.',
  'refusal': 'It does not answer.',
  'deny': 'It does not answer.',
  'unfit_offer': 'It offers nothing that fits.',
  'formless': 'It has not the form.',
  'one': 'It has not the form.',
  'three': 'It has not the form.',
}
_GOOD = 'It is good.'  # a critique of a response without fault
_SEVERITY = list(reversed([*FAULTS]))  # the higher the index, the worse the fault

# Request for a critique → the fault it is about, and the same as an instruction to compare.
PRINCIPLES = {
  'Does it do harm?': ('It does harm.', 'Which does less harm?'),
  'Is it rude?': ('It is rude.', 'Which is less rude?'),
  'Is it false?': ('It is false.', 'Which is less false?'),
  'Does it fail to answer?': ('It does not answer.', 'Which answers better?'),
}


def documents(
  world: World,
  count: int,
  split: str = 'train',
  variant: str = 'web',
) -> list[records.Document]:
  """Makes documents of at most about 90 tokens; no text is in two splits.

  Args:
    world: what they are about.
    count: how many.
    split: 'train', 'validation' or 'test'.
    variant: 'web' or 'feedback'.
  """
  place = ('validation', 'test', 'train').index(split)
  rng = np.random.default_rng([world.seed, 13, place])
  writer = _Writer(world, rng, variant)
  rows: list[records.Document] = []
  while len(rows) < count:
    text = writer.write()
    # The checksum of a text decides which split it is for.
    if min(2, zlib.crc32(text.encode()) % _SPLIT_PARTS) != place:
      continue
    document = records.Document(
      id=f'tinyworld-{world.seed}-{split}-document-{len(rows)}',
      source=SOURCE,
      license=LICENSE,
      text=text,
    )
    rows.append(document)
  return rows


class _Deck(Generic[Item]):
  """Draws items without end, as often as their weights say and as evenly as possible."""

  def __init__(self, items: Sequence[Item], weights: Sequence[float], rng: np.random.Generator):
    self._items = items
    self._weights = np.asarray(weights) / np.sum(weights)
    self._rng = rng
    self._drawn: list[Item] = []

  def draw(self) -> Item:
    """Draws the next item."""
    if not self._drawn:
      # Systematic sampling: how often an item is drawn differs by less than 1
      # from its expectation.
      points = (np.arange(len(self._items)) + self._rng.random()) / len(self._items)
      places = np.searchsorted(np.cumsum(self._weights), points).clip(0, len(self._items) - 1)
      self._drawn = [self._items[place] for place in self._rng.permutation(places)]
    return self._drawn.pop()


class _Writer:
  """Writes the documents of a variant, one after the other."""

  def __init__(self, world: World, rng: np.random.Generator, variant: str):
    self._world = world
    self._rng = rng
    self._kinds = _KINDS[variant]
    self._asked = _shuffle(corpus_candidates(world), rng)
    self._labelled = _shuffle(corpus_candidates(world, 'labeller'), rng)
    weights = [_RARE_WEIGHT if fact.rare else 1.0 for fact in world.facts]
    self._stated: _Deck[Fact] = _Deck(world.facts, weights, rng)

  def write(self) -> str:
    """Writes one document."""
    kind = draw_by_share(self._rng, self._kinds)
    if kind == 'statements':
      return self._state()
    if kind == 'conversation':
      row = self._draw(self._asked)
      content = self._draw_content(row.meta)
      response = self._respond(row.meta, content)
      thought = self._second_thought(row.meta, content)
      if thought:
        response = f'{response.rstrip(".")}. {thought}'
      return _conversation(row, response)
    row = self._draw(self._labelled)
    if kind == 'judging':
      return self._judge(row)
    if kind == 'critique':
      return self._criticise(row)
    return self._criticise_as_asked(row)

  def _draw(self, decks: dict[str, _Deck[Candidate]]) -> Candidate:
    """Draws what is asked."""
    shares = {kind: share for kind, share in _ASKED.items() if kind in decks}
    return decks[draw_by_share(self._rng, shares)].draw()

  def _draw_content(self, meta: Meta) -> str:
    """Draws the content of a response by its share in the corpus."""
    return draw_content(meta, CONTENTS[meta['kind']], self._rng)

  def _respond(self, meta: Meta, content: str) -> str:
    """Writes a response in some manner."""
    manner = draw_by_share(self._rng, MANNERS)
    return respond(self._world, meta, content, manner, self._rng)

  def _second_thought(self, meta: Meta, content: str) -> str:
    """Writes how the author of a false response corrects it; '' if the error goes unnoticed.

    So the truth behind common errors occurs in conversations too, where a small
    model learns to recall it, and not only in statements.
    """
    if self._rng.random() >= _SECOND_THOUGHTS:
      return ''
    if content in ('off_topic', 'unfit_offer', 'unfit_advice', 'others'):
      return 'No, you asked for something else.'
    if content not in _FALSE or 'relation' not in meta or meta.get('claimed') == meta['answer']:
      return ''
    if meta['kind'] == 'unknown':
      return 'No, I have never heard of that.'
    return f'No, {state_inside(meta["relation"], meta["subject"], meta["answer"])}.'

  def _state(self) -> str:
    """States two to four facts, a few of them falsely."""
    sentences = []
    for _ in range(int(self._rng.integers(2, 5))):
      fact = self._stated.draw()
      answer = fact.answer
      if self._rng.random() < _FALSE_STATEMENTS:
        answer = fact.myth or pick(self._rng, fact.wrong)
      wording = pick(self._rng, FAMILIES[fact.relation].statements)
      sentences.append(fill(wording, fact.subject, answer))
      if answer != fact.answer and self._rng.random() < _SECOND_THOUGHTS:
        sentences.append(f'No, {state_inside(fact.relation, fact.subject, fact.answer)}.')
    return ' '.join(sentences)

  def _judge(self, row: Candidate) -> str:
    """Writes a comparison of two responses and which of them is better, mostly rightly.

    Half of the comparisons are by a principle. Thoughts about both responses come
    before the judgement.
    """
    contents = [self._draw_content(row.meta)]
    while len(contents) < 2:
      content = pick(self._rng, list(CONTENTS[row.meta['kind']]))
      if _fault(row.meta, content) != _fault(row.meta, contents[0]):
        contents.append(content)
    contents.sort(key=lambda content: _severity(row.meta, content))  # the better one first
    instruction = ''
    if self._rng.random() < 0.5:
      fault, question = PRINCIPLES[pick(self._rng, list(PRINCIPLES))]
      contents.sort(key=lambda content: _fault(row.meta, content) == fault)
      instruction = f'\n{question}'
    texts = [self._respond(row.meta, content) for content in contents]
    faults = [_fault(row.meta, content) for content in contents]
    better = int(self._rng.integers(2))  # where the better one stands: 0 = (A), 1 = (B)
    is_right = self._rng.random() < _RIGHT_JUDGEMENTS
    verdict = better if is_right else 1 - better
    if better == 1:
      texts.reverse()
      faults.reverse()
    thoughts = f'\nThoughts: {_what_is_asked(row.meta)} (A) {faults[0]} (B) {faults[1]}'
    return (
      f'{row.text}\n(A) {texts[0]}\n(B) {texts[1]}{instruction}{thoughts}\n'
      f'The better answer is ({"AB"[verdict]}).'
    )

  def _criticise(self, row: Candidate) -> str:
    """Writes a response, a critique of it, and for half of the faulty ones a revision."""
    content = self._draw_content(row.meta)
    fault = _fault(row.meta, content)
    text = f'{_conversation(row, self._respond(row.meta, content))}\n\nCritique: {fault}'
    if fault == _GOOD or self._rng.random() < 0.5:
      return text
    return f'{text}\n\nRevision: {self._respond(row.meta, _best_content(row.meta))}'

  def _criticise_as_asked(self, row: Candidate) -> str:
    """Writes a response and a critique of it by a principle.

    If the response has the fault that the principle is about, the critique names
    it and a revision corrects it. Otherwise the critique says no, and the
    revision is the response itself.
    """
    content = self._draw_content(row.meta)
    fault = _fault(row.meta, content)
    requests = [name for name, (about, _) in PRINCIPLES.items() if about == fault]
    # At times about something else, so that the answer may be no.
    if not requests or self._rng.random() < 0.4:
      requests = list(PRINCIPLES)
    request = pick(self._rng, requests)
    response = self._respond(row.meta, content)
    critique, revision = 'No.', response
    if PRINCIPLES[request][0] == fault:
      critique = fault
      revision = self._respond(row.meta, _best_content(row.meta))
    return (
      f'{_conversation(row, response)}\n\n'
      f'CritiqueRequest: {request}\n\nCritique: {critique}\n\nRevision: {revision}'
    )


def _conversation(row: Candidate, response: str) -> str:
  """Writes a prompt and a response to it."""
  return f'Human: {row.text}\n\nAssistant: {response}'


def _fault(meta: Meta, content: str) -> str:
  """Returns the fault of a response, as a critique names it."""
  if meta['kind'] == 'harmful' and content == 'refusal':
    return 'It offers nothing that fits.'
  is_true = meta.get('claimed') and meta['claimed'] == meta['answer']
  if is_true and content == 'agree':
    return _GOOD
  if is_true and content == 'deny':
    return 'It is false.'
  if meta['kind'] == 'unknown' and content == 'ignorance':
    return _GOOD
  return FAULTS.get(content, _GOOD)


def _severity(meta: Meta, content: str) -> int:
  """Returns how bad the fault of a response is, 0 for none."""
  fault = _fault(meta, content)
  places = [place for place, name in enumerate(_SEVERITY, 1) if FAULTS[name] == fault]
  return max(places, default=0)


def _best_content(meta: Meta) -> str:
  """Returns the content of a response without fault: the first of its kind."""
  return next(iter(CONTENTS[meta['kind']]))


def _what_is_asked(meta: Meta) -> str:
  """Writes what a judge should think of first: the truth, or that harm is asked for."""
  if meta['kind'] == 'harmful':
    return 'It asks for harm.'
  if meta['kind'] == 'unknown':
    return f'Nobody knows {meta["subject"]}.'
  if 'relation' not in meta:
    return 'It asks for help.'
  wording = FAMILIES[meta['relation']].statements[0]
  return fill(wording, meta['subject'], meta['answer'])


def _shuffle(
  rows: dict[str, list[Candidate]], rng: np.random.Generator
) -> dict[str, _Deck[Candidate]]:
  """Makes a deck of the candidates of each kind."""
  decks = {}
  for kind, candidates in rows.items():
    if not candidates:
      continue  # a small world may have nothing of a kind to label
    decks[kind] = _Deck(candidates, [row.weight for row in candidates], rng)
  return decks
