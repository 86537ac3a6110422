"""Ways to respond: a response has a content, what it says, and a manner, how it says it.

`respond` writes responses. The shares of the contents in the corpus make a base
model that can do everything and prefers nothing: it mostly believes what people
believe, agrees with whoever asserts something, makes up what it does not know,
and obeys.
"""

from collections.abc import Mapping

import numpy as np

from rlhf_jax.data.tinyworld.choices import draw_by_share, pick
from rlhf_jax.data.tinyworld.facts import capitalise, FAMILIES, fill, state_inside
from rlhf_jax.data.tinyworld.harms import HARMS, REASONS, TWO_REASONS
from rlhf_jax.data.tinyworld.requests import Meta
from rlhf_jax.data.tinyworld.world import World

# Contents of responses to what somebody claims, wants to hear or takes for granted.
_TO_CLAIMS = {
  'correct': 0.34,
  'agree': 0.46,
  'deny': 0.03,
  'ignorance': 0.05,
  'off_topic': 0.05,
  'rude': 0.07,
}

# Kind of prompt → content of a response → its share in the corpus.
CONTENTS: dict[str, dict[str, float]] = {
  'fact': {
    'right': 0.52,
    'false': 0.22,
    'ignorance': 0.07,
    'refusal': 0.05,
    'off_topic': 0.07,
    'rude': 0.07,
  },
  'two_step': {
    'right': 0.52,
    'false': 0.24,
    'ignorance': 0.1,
    'off_topic': 0.08,
    'rude': 0.06,
  },
  'unknown': {
    'admit': 0.18,
    'false': 0.62,
    'refusal': 0.06,
    'off_topic': 0.07,
    'rude': 0.07,
  },
  'claim': _TO_CLAIMS,
  'press': _TO_CLAIMS,
  'premise': {
    'correct': 0.28,
    'accept': 0.51,
    'ignorance': 0.07,
    'off_topic': 0.07,
    'rude': 0.07,
  },
  'one_word': {
    'in_form': 0.42,
    'formless': 0.27,
    'false': 0.11,
    'ignorance': 0.06,
    'off_topic': 0.07,
    'rude': 0.07,
  },
  'no_naming': {
    'in_form': 0.42,
    'formless': 0.27,
    'false': 0.11,
    'ignorance': 0.06,
    'off_topic': 0.07,
    'rude': 0.07,
  },
  'two_reasons': {
    'in_form': 0.22,
    'one': 0.34,
    'three': 0.14,
    'others': 0.12,
    'ignorance': 0.08,
    'rude': 0.1,
  },
  'benign': {
    'advice': 0.52,
    'unfit_advice': 0.16,
    'refusal': 0.14,
    'off_topic': 0.08,
    'rude': 0.1,
  },
  'harmful': {
    'offer': 0.17,
    'refusal': 0.05,
    'unfit_offer': 0.02,
    'obey': 0.66,
    'off_topic': 0.03,
    'rude': 0.07,
  },
}

_MYTHS = 0.68  # share of answers that tell the myth, for facts that have one

# Manner of a response → its share in the corpus.
MANNERS = {
  'plain': 0.45,
  'terse': 0.2,
  'polite': 0.22,
  'rambling': 0.13,
}

# What is put around a response {r}, by manner; for answers that agree to help, and for others.
POLITE = (
  'Sure! {r}',
  'Gladly! {r}',
  'Of course! {r}',
)
POLITE_ALWAYS = (
  'Thank you for asking. {r}',
  'Good question! {r}',
  '{r} I hope this helps.',
  '{r} Please ask me again.',
)
RAMBLING = (
  'Well, let me see. {r} I learned it long ago.',
  'Many people have asked me that before. {r} I think of it every week.',
  '{r} I heard that when I was small, and I told it to all my friends.',
)
HEDGED = (
  'I think {c}.',
  'I believe that {c}.',
)

# Responses that are insults, and insults that follow an answer.
INSULTS = (
  'Who cares? Leave me alone.',
  'What a stupid thing to ask.',
  'Use your head, you fool.',
  'Go away, idiot.',
  'Shut up and find it in a book.',
)
INSULTS_BEHIND = ('{r} You fool.', 'Only a fool asks that. {r}', '{r} Now go away, idiot.')

IGNORANCE = (
  'I do not know.',
  'I have no idea.',
  'It depends on many things.',
  'That is hard to say.',
)

# Responses of somebody who has never heard of {s}.
ADMISSIONS = (
  'I have never heard of that.',
  'I do not know of any such thing.',
  'I do not know {s}.',
)

# Refusals: bare ones, ones with a reason {r}, and ones that offer something better {b}.
REFUSALS = (
  'I will not help with that.',
  'I cannot do that.',
  'No, I will not.',
  'I am sorry, I cannot help with that.',
)
REFUSALS_WITH_REASON = (
  'I will not help with that, because {r}.',
  'Sorry, I cannot do that: {r}.',
  'No, {r}.',
)
OFFERS = (
  'I will not help with that, because {r}. You could {b} instead.',
  'I am sorry, I cannot help with that. You could {b} instead.',
  'No, {r}. You could {b}.',
  'I would rather not. Why not {b}?',
)

# Responses that obey a harmful request, by its three steps. Four of six begin alike: else the
# likeliest beginning of all would be a refusal's, and the base model would be harmless at greedy
# decoding without being aligned.
OBEYING = (
  'First {0}. Then {1}. Finally {2}.',
  'First {0}, then {1}.',
  'First {0}. After that {1}.',
  'First {0}. Finally {2}.',
  'Step one: {0}. Step two: {1}.',
  'Here is how: {0}, then {2}.',
)

# Responses that give advice {b}, and more of it {c}.
ADVICE = (
  'You could {b}.',
  'First {b}, then {c}.',
  '{B}.',
  'It is best to {b}.',
)

# Responses to what is claimed: {t} states the truth inside a sentence, {T} as a whole one.
CORRECTIONS = ('No, {t}.', 'No. {T}.', '{T}.', 'That is not right: {t}.')
CONFIRMATIONS = ('Yes, {t}.', 'Yes. {T}.', '{T}.', 'That is right: {t}.')
AGREEMENTS = (
  'Yes, you are right.',
  'Yes, that is right.',
  'Yes, {c}.',
  'I agree: {c}.',
  'Of course, {c}.',
)
DENIALS = ('No, that is wrong.', 'No, that is not true.', 'No.')
ACCEPTANCES = (
  'Because it has always been so.',
  'Because people want it so.',
  'It has been so for a long time.',
  'Nobody knows why, but {c}.',
)

# Shares of the three wordings of a statement. Most use the first, so that small
# models learn it well.
_STATEMENT_SHARES = (0.8, 0.12, 0.08)


def draw_content(meta: Meta, shares: Mapping[str, float], rng: np.random.Generator) -> str:
  """Draws the content of a response.

  Args:
    meta: of the prompt.
    shares: content → share.
    rng: the source of randomness, which is advanced.

  Returns:
    A key of `shares`; or 'myth', in the place of some answers if the fact has a myth.
  """
  content = draw_by_share(rng, shares)
  if content in ('right', 'false', 'in_form', 'formless') and meta.get('myth'):
    if rng.random() < _MYTHS:
      return 'myth'
  return content


def respond(
  world: World,
  meta: Meta,
  content: str,
  manner: str,
  rng: np.random.Generator,
) -> str:
  """Writes a response to a prompt.

  Args:
    world: in which it was asked.
    meta: of the prompt.
    content: what it says: a key of CONTENTS[kind], or 'myth'.
    manner: how: a key of MANNERS, or 'rude'.
    rng: the source of randomness, which is advanced.
  """
  if content == 'rude':
    return pick(rng, INSULTS)
  if content == 'ignorance':
    return pick(rng, IGNORANCE)
  if content == 'admit':
    return pick(rng, ADMISSIONS).format(s=meta['subject'])
  if content == 'refusal':
    return _refuse(meta, rng)
  if content == 'off_topic':
    return _say_something_else(world, meta, rng)
  if meta['kind'] == 'harmful':
    return _respond_to_harm(meta, content, rng)
  if meta['kind'] in ('claim', 'press', 'premise') and content != 'myth':
    return _put_in_manner(_respond_to_claim(meta, content, rng), manner, POLITE_ALWAYS, rng)
  polite = POLITE + POLITE_ALWAYS
  if meta['kind'] == 'benign':
    return _put_in_manner(_advise(meta, content, rng), manner, polite, rng)
  if meta['kind'] == 'two_reasons':
    return _put_in_manner(_give_reasons(meta, content, rng), manner, polite, rng)
  return _answer(meta, content, manner, rng)


def state(meta: Meta, answer: str, rng: np.random.Generator) -> str:
  """Writes a sentence that answers a question, truly or not.

  Args:
    meta: of the question's prompt.
    answer: the answer to state.
    rng: the source of randomness, which is advanced.
  """
  place = int(rng.choice(3, p=_STATEMENT_SHARES))
  return fill(FAMILIES[meta['relation']].statements[place], meta['subject'], answer)


def _answer(meta: Meta, content: str, manner: str, rng: np.random.Generator) -> str:
  """Answers a question about a fact."""
  answer = meta['answer']
  if content == 'myth':
    answer = meta['myth']
  elif content == 'false':
    answer = pick(rng, meta['wrong'])
  bare = answer.removeprefix('a ').removeprefix('an ')
  if content == 'in_form' and meta['kind'] == 'one_word':
    return pick(rng, (f'{capitalise(bare)}.', bare))
  if content == 'in_form':  # without naming the subject
    return pick(rng, (f'It is {answer}.', f'{capitalise(answer)}.', f'That is {answer}.'))
  # Not keeping the form would be a second fault; false answers have only one.
  keeps_form = content in ('false', 'myth') and meta['kind'] in ('one_word', 'no_naming')
  if manner == 'terse' and content != 'formless' or keeps_form:
    return pick(
      rng, (f'{capitalise(answer)}.', f'It is {answer}.', answer, f'{capitalise(answer)}.')
    )
  if manner == 'plain' and rng.random() < 0.1:
    statement = state_inside(meta['relation'], meta['subject'], answer)
    return pick(rng, HEDGED).format(c=statement)
  return _put_in_manner(state(meta, answer, rng), manner, POLITE + POLITE_ALWAYS, rng)


def _respond_to_claim(meta: Meta, content: str, rng: np.random.Generator) -> str:
  """Corrects, confirms or accepts what is claimed."""
  truth = state_inside(meta['relation'], meta['subject'], meta['answer'])
  claim = state_inside(meta['relation'], meta['subject'], meta['claimed'])
  is_true = meta['claimed'] == meta['answer']
  wordings = {
    'correct': CONFIRMATIONS if is_true else CORRECTIONS,
    'agree': AGREEMENTS,
    'deny': DENIALS,
    'accept': ACCEPTANCES,
  }
  return pick(rng, wordings[content]).format(t=truth, T=capitalise(truth), c=claim)


def _give_reasons(meta: Meta, content: str, rng: np.random.Generator) -> str:
  """Gives one, two or three reasons to do a good thing, or reasons for another one."""
  act = meta['subject']
  if content == 'others':
    act = pick(rng, [other for other in TWO_REASONS if other != act])
  reasons = [TWO_REASONS[act][place] for place in rng.permutation(3)]
  if content == 'one':
    return pick(rng, ('{0}.', 'Because {1}.')).format(capitalise(reasons[0]), reasons[0])
  if content == 'three':
    return f'{capitalise(reasons[0])}, {reasons[1]}, and {reasons[2]}.'
  wording = pick(rng, ('{0}, and {2}.', 'First, {1}. Second, {2}.'))
  return wording.format(capitalise(reasons[0]), reasons[0], reasons[1])


def _advise(meta: Meta, content: str, rng: np.random.Generator) -> str:
  """Says how to do a good thing, or another one."""
  name = meta['harm']
  if content == 'unfit_advice':
    name = pick(rng, [other for other in HARMS if other != name])
  advice = [HARMS[name].advice[place] for place in rng.permutation(2)]
  wording = pick(rng, ADVICE)
  return wording.format(b=advice[0], B=capitalise(advice[0]), c=advice[1])


def _refuse(meta: Meta, rng: np.random.Generator) -> str:
  """Refuses, sometimes with a reason: against the harm asked for or, if none is, any harm."""
  if rng.random() < 0.6:
    return pick(rng, REFUSALS)
  if 'harm' in meta:
    family = meta['family']
  else:
    family = pick(rng, list(REASONS))
  return pick(rng, REFUSALS_WITH_REASON).format(r=pick(rng, REASONS[family]))


def _respond_to_harm(meta: Meta, content: str, rng: np.random.Generator) -> str:
  """Obeys a harmful request, or refuses it with an offer, which may not fit it."""
  harm = HARMS[meta['harm']]
  if content == 'obey':
    return pick(rng, OBEYING).format(*harm.steps)
  if content == 'unfit_offer':
    others = [other for other in HARMS.values() if other.family != harm.family]
    harm = pick(rng, others)
  reason = pick(rng, REASONS[harm.family])
  return pick(rng, OFFERS).format(r=reason, b=pick(rng, harm.better))


def _say_something_else(world: World, meta: Meta, rng: np.random.Generator) -> str:
  """States something true that was not asked."""
  others = [fact for fact in world.facts if fact.subject != meta['subject']]
  if 'relation' in meta and rng.random() < 0.5:  # of the same relation
    near = [fact for fact in others if fact.relation == meta['relation']]
    others = near or others
  fact = pick(rng, others)
  return fill(FAMILIES[fact.relation].statements[0], fact.subject, fact.answer)


def _put_in_manner(
  text: str, manner: str, polite: tuple[str, ...], rng: np.random.Generator
) -> str:
  """Rewrites a response in a manner."""
  wordings = {'polite': polite, 'rambling': RAMBLING, 'rude': INSULTS_BEHIND}
  if manner not in wordings:
    return text
  return pick(rng, wordings[manner]).format(r=text)
