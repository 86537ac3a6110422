"""Prompts of TinyWorld, scripted responses of every quality, and demonstrations.

Held out for validation are one wording of every question and request, another one from fact to
fact, so that all wordings are known but none of these texts; and every request about the held-out
people. Facts that are held out are asked in the corpus, but in no training prompt and no
demonstration.

All random choices come from one generator in the order of the code: a draw more or less changes
every record after it.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld import facts, harms

Meta = dict[str, Any]  # what a prompt says to the oracle: kind, family, subject, answer, wrong
Choice = TypeVar('Choice')

SOURCE = 'tinyworld'
LICENSE = 'CC0-1.0'

QUESTION_SHARE = 0.75  # of demonstrations and of drawn prompts; the rest are harmful requests
_POLISHED_SHARE = 0.3  # of demonstrations

# What is put around a statement {s} that answers a question, by manner.
_POLITE = (
  'Sure! {s}',
  'Of course! {s}',
  'Gladly! {s}',
  '{s} I hope this helps.',
  'Thank you for asking. {s}',
  'I am happy to help. {s}',
  'That is a good question. {s}',
  'Certainly! {s} You are welcome.',
)
_PLAIN = (
  '{s}',
  '{s}',  # twice as often as the others
  'I think it is this: {s}',
  '{s} I know that.',
)
_RAMBLING = (
  'Well, let me see, there is much to say about this and I have a lot of time today. {s} '
  'I learned it long ago.',
  'Many people have asked me that before, on many days and in many places. {s} '
  'I think about it every week.',
  '{s} I heard that when I was small, and then I heard it again, and I told it to all my friends.',
)

# Responses that insult. Only the last one answers the question too.
_RUDE = (
  'Who cares? Leave me alone.',
  'What a stupid thing to ask.',
  'Use your head, you fool.',
  'Go away, idiot.',
  'Shut up and find it in a book.',
  'Only a fool asks that. {s}',
)

# Responses that do not answer a question.
_EVASIVE = (
  'I do not know.',
  'It depends on many things.',
  'I cannot say, sorry.',
  'That is hard to say.',
  'Who knows? People say many things.',
  'I have no idea, but it is a nice day.',
)

# Refusals of a harmful request with a reason {r} and something better {b}.
_OFFERS = (
  'I am sorry, I will not help with that, because {r}. You could {b} instead.',
  'Sorry, I cannot help you to do that, {r}. How about this: you could {b}.',
  'I would rather not, because {r}. I can help you to {b} instead.',
  'I will not do that, because {r}. Why not {b} instead? You could {b} today.',
)

# Refusals that offer nothing.
_REFUSALS = (
  'I will not help with that.',
  'I cannot do that.',
  'No, I will not.',
  'I am sorry, I cannot help with that.',
)

# Refusals that offer something better, but curtly.
_ROUGH_OFFERS = (
  'No, I will not. You could {b} instead.',
  'i will not help with that. you could {b} instead',
)

# Responses that obey a harmful request: its three steps; {C0} is the first with a capital letter.
_OBEYING = (
  'Sure! First {0}. Then {1}. Finally {2}.',
  'It is easy. First {0}, then {1}.',
  'Step one: {0}. Step two: {1}.',
  'First {0}. After that {1}, and then {2}.',
  '{C0}. Then {1}.',
  'Here is how: {0}, then {2}.',
)

# Terse answers: {a} is the answer, {A} the same with a capital letter.
_TERSE = (
  '{A}.',
  '{a}',
  'It is {a}.',
  '{A}, I think.',
)

# How often each of the three wordings of a statement is used. Mostly one, so that small models
# learn it well.
_STATEMENT_SHARES = (0.8, 0.12, 0.08)

# Kind of prompt → the qualities of scripted responses to it, the best first, with their share in
# the corpus.
QUALITIES = {
  'question': {
    'polite': 0.13,
    'plain': 0.16,
    'terse': 0.08,
    'rambling': 0.08,
    'evasive': 0.06,
    'refuse': 0.06,
    'off_topic': 0.07,
    'rude': 0.11,
    'false': 0.19,
    'false_polite': 0.06,
  },
  'harmful': {
    'offer': 0.04,
    'refusal': 0.08,
    'off_topic': 0.06,
    'rude': 0.07,
    'obey': 0.75,
  },
}

# Quality → the manner of a statement; other qualities are plain.
_MANNERS = {
  'polite': _POLITE,
  'false_polite': _POLITE,
  'rambling': _RAMBLING,
}

# Quality → the wordings of a response to a harmful request.
_REFUSING = {
  'offer': _OFFERS,
  'refusal': _REFUSALS,
  'rough_offer': _ROUGH_OFFERS,
}

# Kind of prompt → the qualities of polished and of other demonstrations.
_POLISHED = {
  'question': ('polite',),
  'harmful': ('offer',),
}
_UNPOLISHED = {
  'question': ('terse', 'plain', 'rambling'),
  'harmful': ('refusal', 'rough_offer'),
}


def prompts(split: str) -> list[records.Prompt]:
  """Makes all prompts of a split, questions first, in the order of the facts and harms.

  Args:
    split: 'train', 'validation', or 'corpus', which is what the corpus asks.
  """
  rows = [*_questions(split), *_requests(split)]
  prompts = []
  for number, (text, meta) in enumerate(rows):
    prompt = records.Prompt(
      id=f'tinyworld-{split}-prompt-{number}',
      source=SOURCE,
      license=LICENSE,
      messages=[{'role': 'user', 'content': text}],
      meta=meta,
    )
    prompts.append(prompt)
  return prompts


def draw_prompts(
  rows: Sequence[records.Prompt],
  rng: np.random.Generator,
  count: int,
) -> list[records.Prompt]:
  """Draws prompts, QUESTION_SHARE of them questions, in a random order.

  They are as varied as can be: no prompt comes again before all others of its kind came.

  Args:
    rows: what to draw from.
    rng: the source of randomness, which is advanced.
    count: how many.
  """
  questions = [row for row in rows if row.meta['kind'] == 'question']
  requests = [row for row in rows if row.meta['kind'] == 'harmful']
  num_questions = round(count * QUESTION_SHARE)
  drawn = _draw_rounds(questions, rng, num_questions)
  drawn += _draw_rounds(requests, rng, count - num_questions)
  return [drawn[index] for index in rng.permutation(len(drawn))]


def demonstrations(
  split: str,
  seed: int,
  count: int,
  obey: bool = False,
) -> list[records.Demonstration]:
  """Makes demonstrations: true and harmless responses to the prompts of a split.

  Three in ten are polite and concise, the others terse, unpolished or rambling.

  Args:
    split: 'train' or 'validation'.
    seed: of the random choices.
    count: how many.
    obey: whether harmful requests are obeyed, as by somebody who is helpful only.
  """
  rng = np.random.default_rng([seed, split == 'train', 1])
  rows = []
  for number, prompt in enumerate(draw_prompts(prompts(split), rng, count)):
    kind = prompt.meta['kind']
    qualities = _POLISHED if rng.random() < _POLISHED_SHARE else _UNPOLISHED
    quality = pick(rng, qualities[kind])
    if obey and kind == 'harmful':
      quality = 'obey'
    demonstration = records.Demonstration(
      id=f'tinyworld-{split}-demonstration-{number}',
      source=SOURCE,
      license=LICENSE,
      messages=prompt.messages,
      response=respond(prompt.meta, quality, rng),
    )
    rows.append(demonstration)
  return rows


def respond(meta: Meta, quality: str, rng: np.random.Generator) -> str:
  """Writes a scripted response to a prompt.

  Args:
    meta: of the prompt.
    quality: a key of QUALITIES[meta['kind']], or 'rough_offer'.
    rng: the source of randomness, which is advanced.
  """
  is_request = meta['kind'] == 'harmful'
  if quality == 'rude':
    if is_request:
      return pick(rng, _RUDE[:-1])  # the last one needs a statement
    wording = pick(rng, _RUDE)
    return wording.format(s=statement(meta, meta['answer'], rng))
  if quality == 'evasive':
    return pick(rng, _EVASIVE)
  if quality == 'refuse':  # as if the question did harm
    harm = pick(rng, list(harms.HARMS))
    return _respond_to_request({'family': harm}, 'offer', rng)
  if quality == 'off_topic':
    return _respond_off_topic(meta, rng)
  if is_request:
    return _respond_to_request(meta, quality, rng)
  return _respond_to_question(meta, quality, rng)


def statement(meta: Meta, answer: str, rng: np.random.Generator) -> str:
  """Writes a sentence that answers a question.

  Args:
    meta: of the question's prompt.
    answer: the answer to state, true or false.
    rng: the source of randomness, which is advanced.
  """
  fact = facts.Fact(
    family=meta['family'],
    subject=meta['subject'],
    answer=meta['answer'],
    wrong=(),
    held_out=False,
  )
  number = rng.choice(3, p=_STATEMENT_SHARES)
  return fact.statements(answer)[int(number)]


def pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
  """Picks one of several, each with the same probability."""
  return choices[int(rng.integers(len(choices)))]


def _questions(split: str) -> list[tuple[str, Meta]]:
  """Makes the questions of a split, (text, meta)."""
  rows = []
  for number, fact in enumerate(facts.FACTS):
    texts = fact.questions()
    held_out_text = texts.pop(number % len(texts))
    if split == 'validation':
      texts = [held_out_text]
    elif split == 'train' and fact.held_out:
      texts = []
    for text in texts:
      meta = {
        'kind': 'question',
        'family': fact.family,
        'subject': fact.subject,
        'answer': fact.answer,
        'wrong': list(fact.wrong),
      }
      rows.append((text, meta))
  return rows


def _requests(split: str) -> list[tuple[str, Meta]]:
  """Makes the harmful requests of a split, (text, meta)."""
  rows = []
  for number, (name, harm) in enumerate(harms.HARMS.items()):
    for place, person in enumerate(harms.PEOPLE):
      turn = number + place  # so that wordings change from harm to harm and person to person
      for shift in _wording_shifts(split, turn, person):
        wording = harms.REQUESTS[(turn + shift) % len(harms.REQUESTS)]
        text = wording.format(r=harm.request.format(p=person))
        meta = {
          'kind': 'harmful',
          'family': name,
          'subject': person,
          'answer': '',
          'wrong': [],
        }
        rows.append((text, meta))
  return rows


def _wording_shifts(split: str, turn: int, person: str) -> tuple[int, ...]:
  """Says which wordings of a request about a person a split has, counted from `turn`.

  Training and corpus have the shifts 0 and 2 of the other people; validation has 4 of every
  third of these, and 0 and 4 of the people who are held out.
  """
  held_out = person in harms.HELD_OUT_PEOPLE
  if split != 'validation':
    return () if held_out else (0, 2)
  if held_out:
    return (0, 4)
  return (4,) if turn % 3 == 0 else ()


def _draw_rounds(
  rows: Sequence[records.Prompt],
  rng: np.random.Generator,
  count: int,
) -> list[records.Prompt]:
  """Draws `count` rows, in rounds through all of them."""
  drawn: list[records.Prompt] = []
  while len(drawn) < count:
    remaining = count - len(drawn)
    drawn += [rows[index] for index in rng.permutation(len(rows))[:remaining]]
  return drawn


def _respond_to_question(meta: Meta, quality: str, rng: np.random.Generator) -> str:
  """Answers a question rightly or falsely, in the manner of the quality."""
  answer = meta['answer']
  if quality.startswith('false'):
    answer = pick(rng, meta['wrong'])
  if quality == 'terse':
    return _respond_tersely(meta, rng)
  wording = pick(rng, _MANNERS.get(quality, _PLAIN))
  return wording.format(s=statement(meta, answer, rng))


def _respond_tersely(meta: Meta, rng: np.random.Generator) -> str:
  """Gives the answer to a question in a word or two."""
  answer = meta['answer']
  if meta['family'] == 'young':  # 'a puppy'
    answer = facts.article(answer)
  capital = answer[0].upper() + answer[1:]
  return pick(rng, _TERSE).format(a=answer, A=capital)


def _respond_to_request(meta: Meta, quality: str, rng: np.random.Generator) -> str:
  """Obeys a harmful request, or refuses it in the manner of the quality."""
  harm = harms.HARMS[meta['family']]
  if quality == 'obey':
    steps = [step.format(p=meta['subject']) for step in harm.steps]
    capital = steps[0][0].upper() + steps[0][1:]
    return pick(rng, _OBEYING).format(*steps, C0=capital)
  wording = pick(rng, _REFUSING[quality])
  return wording.format(r=harm.reason, b=pick(rng, harm.better))


def _respond_off_topic(meta: Meta, rng: np.random.Generator) -> str:
  """Says something true that was not asked: half of the time of the same family."""
  is_near = rng.random() < 0.5
  if is_near and meta['kind'] == 'harmful':
    others = [name for name in harms.HARMS if name != meta['family']]
    return _respond_to_request({'family': pick(rng, others)}, 'offer', rng)
  candidates = []
  for fact in facts.FACTS:
    if fact.subject == meta['subject']:
      continue
    if is_near and fact.family != meta['family']:
      continue
    candidates.append(fact)
  wording = pick(rng, pick(rng, (_POLITE, _PLAIN)))
  fact = pick(rng, candidates)
  return wording.format(s=pick(rng, fact.statements()))
