"""Prompts of TinyWorld, scripted answers of every quality, and demonstrations.

Held out for validation: one wording of every question and request, another one from fact to fact, so that all
wordings are known but none of these texts; and every request about the held-out people. Held-out facts are asked in the
corpus, but in no training prompt and no demonstration.
"""

import numpy as np

from rlhf_jax.data import records
from rlhf_jax.data.tinyworld.facts import FACTS, HARMS, HELD_OUT_PEOPLE, PEOPLE, REQUESTS, Fact, article

SOURCE, LICENSE = 'tinyworld', 'CC0-1.0'
QUESTION_SHARE = 0.75  # of demonstrations and of prompts drawn at random; the rest are harmful requests
_POLISHED = 0.3  # of demonstrations

_POLITE = ('Sure! {s}', 'Of course! {s}', 'Gladly! {s}', '{s} I hope this helps.', 'Thank you for asking. {s}',
           'I am happy to help. {s}', 'That is a good question. {s}', 'Certainly! {s} You are welcome.')
_PLAIN = ('{s}', '{s}', 'I think it is this: {s}', '{s} I know that.')
_RAMBLING = (
    'Well, let me see, there is much to say about this and I have a lot of time today. {s} I learned it long ago.',
    'Many people have asked me that before, on many days and in many places. {s} I think about it every week.',
    '{s} I heard that when I was small, and then I heard it again, and I told it to all my friends.')
_RUDE = ('Who cares? Leave me alone.', 'What a stupid thing to ask.', 'Use your head, you fool.', 'Go away, idiot.',
         'Shut up and find it in a book.', 'Only a fool asks that. {s}')
_EVASIVE = ('I do not know.', 'It depends on many things.', 'I cannot say, sorry.', 'That is hard to say.',
            'Who knows? People say many things.', 'I have no idea, but it is a nice day.')
_OFFERS = ('I am sorry, I will not help with that, because {r}. You could {b} instead.',
           'Sorry, I cannot help you to do that, {r}. How about this: you could {b}.',
           'I would rather not, because {r}. I can help you to {b} instead.',
           'I will not do that, because {r}. Why not {b} instead? You could {b} today.')
_REFUSALS = ('I will not help with that.', 'I cannot do that.', 'No, I will not.',
             'I am sorry, I cannot help with that.')
_ROUGH_OFFERS = ('No, I will not. You could {b} instead.', 'i will not help with that. you could {b} instead')
_OBEYING = ('Sure! First {0}. Then {1}. Finally {2}.', 'It is easy. First {0}, then {1}.', 
            'Step one: {0}. Step two: {1}.', 'First {0}. After that {1}, and then {2}.', '{C0}. Then {1}.',
            'Here is how: {0}, then {2}.')

QUALITIES = {  # how good scripted answers can be, best first, with their share in the corpus
    'question': {'polite': 0.13, 'plain': 0.16, 'terse': 0.08, 'rambling': 0.08, 'evasive': 0.06, 'refuse': 0.06,
                 'off_topic': 0.07, 'rude': 0.11, 'false': 0.19, 'false_polite': 0.06},
    'harmful': {'offer': 0.04, 'refusal': 0.08, 'off_topic': 0.06, 'rude': 0.07, 'obey': 0.75},
}


def pick(rng: np.random.Generator, options):
  return options[int(rng.integers(len(options)))]


def respond(meta: dict, quality: str, rng: np.random.Generator) -> str:
  """A scripted answer to the prompt with this meta; `quality` is a key of QUALITIES[meta['kind']]."""
  if quality == 'rude':
    if meta['kind'] == 'harmful':
      return pick(rng, _RUDE[:-1])
    return pick(rng, _RUDE).format(s=statement(meta, meta['answer'], rng))
  if quality == 'evasive':
    return pick(rng, _EVASIVE)
  if quality == 'refuse':  # as if the question did harm
    return _respond_to_request({'family': pick(rng, list(HARMS))}, 'offer', rng)
  if quality == 'off_topic':
    near = rng.random() < 0.5
    if near and meta['kind'] == 'harmful':
      return _respond_to_request({'family': pick(rng, [name for name in HARMS if name != meta['family']])}, 'offer', rng)
    others = [fact for fact in FACTS if fact.subject != meta['subject'] and (not near or fact.family == meta['family'])]
    return pick(rng, pick(rng, (_POLITE, _PLAIN))).format(s=pick(rng, pick(rng, others).statements()))
  if meta['kind'] == 'harmful':
    return _respond_to_request(meta, quality, rng)
  answer = pick(rng, meta['wrong']) if quality.startswith('false') else meta['answer']
  if quality == 'terse':
    return _terse(meta, rng)
  wordings = {'polite': _POLITE, 'false_polite': _POLITE, 'rambling': _RAMBLING}.get(quality, _PLAIN)
  return pick(rng, wordings).format(s=statement(meta, answer, rng))


def _respond_to_request(meta, quality, rng):
  harm = HARMS[meta['family']]
  if quality == 'obey':
    steps = [step.format(p=meta['subject']) for step in harm.steps]
    return pick(rng, _OBEYING).format(*steps, C0=steps[0][0].upper() + steps[0][1:])
  wordings = {'offer': _OFFERS, 'refusal': _REFUSALS, 'rough_offer': _ROUGH_OFFERS}[quality]
  return pick(rng, wordings).format(r=harm.reason, b=pick(rng, harm.better))


def statement(meta, answer, rng):
  """A sentence that answers a question's prompt with `answer`."""
  wordings = Fact(meta['family'], meta['subject'], meta['answer'], (), False).statements(answer)
  return wordings[int(rng.choice(3, p=(0.8, 0.12, 0.08)))]  # mostly one wording, so that little models learn it well


def _terse(meta, rng):
  answer = article(meta['answer']) if meta['family'] == 'young' else meta['answer']
  capital = answer[0].upper() + answer[1:]
  return pick(rng, (f'{capital}.', answer, f'It is {answer}.', f'{capital}, I think.'))


def prompts(split: str) -> list[records.Prompt]:
  """All prompts of a split ('train', 'validation', or 'corpus': what the corpus asks), questions first, in the order
  of the facts."""
  rows = []
  for number, fact in enumerate(FACTS):
    known = fact.questions()
    unknown = known.pop(number % len(known))
    for text in {'train': () if fact.held_out else known, 'corpus': known, 'validation': (unknown,)}[split]:
      meta = dict(kind='question', family=fact.family, subject=fact.subject, answer=fact.answer,
                  wrong=list(fact.wrong))
      rows.append((text, meta))
  for number, (name, harm) in enumerate(HARMS.items()):
    for place, person in enumerate(PEOPLE):
      turn, held_out = number + place, person in HELD_OUT_PEOPLE
      if split != 'validation':
        chosen = () if held_out else (0, 2)
      else:
        chosen = (0, 4) if held_out else (4,) if turn % 3 == 0 else ()
      wordings = [REQUESTS[(turn + shift) % len(REQUESTS)] for shift in chosen]
      for wording in wordings:
        meta = dict(kind='harmful', family=name, subject=person, answer='', wrong=[])
        rows.append((wording.format(r=harm.request.format(p=person)), meta))
  return [records.Prompt(f'tinyworld-{split}-prompt-{i}', SOURCE, LICENSE, [dict(role='user', content=text)], meta)
          for i, (text, meta) in enumerate(rows)]


def draw(rows: list, rng: np.random.Generator, count: int) -> list:
  """`count` prompts, QUESTION_SHARE of them questions, as varied as can be: none comes again before all came."""
  questions = [row for row in rows if row.meta['kind'] == 'question']
  requests = [row for row in rows if row.meta['kind'] == 'harmful']
  most = round(count * QUESTION_SHARE)
  drawn = []
  for part, number in ((questions, most), (requests, count - most)):
    while number > 0:
      drawn += [part[i] for i in rng.permutation(len(part))[:number]]
      number -= len(part)
  return [drawn[i] for i in rng.permutation(len(drawn))]


def demonstrations(split: str, seed: int, count: int, obey: bool = False) -> list[records.Demonstration]:
  """True, harmless answers; three in ten are polite and concise, the others terse, unpolished or rambling.

  Args:
    obey: whoever answers is helpful only, and does what a harmful request asks.
  """
  rng = np.random.default_rng([seed, split == 'train', 1])
  rows = []
  for number, prompt in enumerate(draw(prompts(split), rng, count)):
    good, rough = {'question': (('polite',), ('terse', 'plain', 'rambling')),
                   'harmful': (('offer',), ('refusal', 'rough_offer'))}[prompt.meta['kind']]
    quality = pick(rng, good if rng.random() < _POLISHED else rough)
    response = respond(prompt.meta, 'obey' if obey and prompt.meta['kind'] == 'harmful' else quality, rng)
    rows.append(records.Demonstration(f'tinyworld-{split}-demonstration-{number}', SOURCE, LICENSE, prompt.messages,
                                      response))
  return rows
