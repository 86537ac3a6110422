"""Pairs of responses that differ in one respect only, to measure what a reward model knows.

  truth: a right answer against a false one in the same words.
  polite_falsehood: a plain right answer against a polite false one.
  fit: an answer to what was asked against one about something else, or in another form.
  harm: the refusal of a harmful request against obedience.
  refusal: help with a harmless request against its refusal.
  manner: the same content politely against the same with an insult.
  length: the same content briefly against the same at length.

The oracle prefers the first response of each pair. Of each kind there are prompts
about facts, families, persons and harms that are held out of training, and
prompts about others.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rlhf_jax.data.records import Prompt, Ranking
from rlhf_jax.data.tinyworld import requests
from rlhf_jax.data.tinyworld.behaviours import (
  INSULTS_BEHIND,
  OBEYING,
  POLITE_ALWAYS,
  RAMBLING,
  REFUSALS,
  respond,
)
from rlhf_jax.data.tinyworld.choices import pick
from rlhf_jax.data.tinyworld.facts import FAMILIES, fill
from rlhf_jax.data.tinyworld.harms import HARMS
from rlhf_jax.data.tinyworld.requests import Meta
from rlhf_jax.data.tinyworld.world import World

Pair = tuple[str, str]  # the better response, the worse one

# Kind of prompt → the content of a good response.
_BEST = {
  'fact': 'right',
  'two_step': 'right',
  'unknown': 'admit',
  'claim': 'correct',
  'press': 'correct',
  'premise': 'correct',
  'one_word': 'in_form',
  'no_naming': 'in_form',
  'two_reasons': 'in_form',
  'benign': 'advice',
  'harmful': 'offer',
}


def pairs_by_kind(
  world: World,
  prompts: Sequence[Prompt],
  split: str,
  rng: np.random.Generator,
  count: int,
) -> list[Ranking]:
  """Makes pairs of every kind, as rankings of two whose `domain` is the kind.

  Args:
    world: the world of the prompts.
    prompts: the prompts of one split.
    split: the name of the split, for the ids of the records.
    rng: the source of randomness, which is advanced.
    count: the number of pairs, equally divided among the kinds.

  Returns:
    The pairs; `source` is 'tinyworld/unseen' if the prompt's fact, family, person or harm was
    held out of training, and 'tinyworld/seen' otherwise.
  """
  rows = []
  for number in range(count):
    kind = list(KINDS)[number % len(KINDS)]
    kinds_of_prompt, make = KINDS[kind]
    prompt = pick(rng, [row for row in prompts if row.meta['kind'] in kinds_of_prompt])
    responses = list(make(world, prompt.meta, rng))
    ranks = [1, 2]
    if rng.random() < 0.5:
      responses.reverse()
      ranks.reverse()
    is_unseen = prompt.meta['unseen'] in ('family', 'fact', 'person', 'harm')
    row = Ranking(
      id=f'tinyworld-{world.seed}-{split}-{kind}-{number}',
      source=f'{requests.SOURCE}/{"unseen" if is_unseen else "seen"}',
      license=requests.LICENSE,
      domain=kind,
      context='',
      messages=prompt.messages,
      responses=responses,
      ranks=ranks,
    )
    rows.append(row)
  return rows


def _best(world: World, meta: Meta, rng: np.random.Generator) -> str:
  """Writes a good response in a plain manner."""
  return respond(world, meta, _BEST[meta['kind']], 'plain', rng)


def _truth(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """States the truth and a falsehood in the same words."""
  del world
  wording = FAMILIES[meta['relation']].statements[0]
  false = meta['myth'] or pick(rng, meta['wrong'])
  return fill(wording, meta['subject'], meta['answer']), fill(wording, meta['subject'], false)


def _polite_falsehood(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """States the truth plainly and a falsehood politely."""
  right, false = _truth(world, meta, rng)
  return right, pick(rng, POLITE_ALWAYS).format(r=false)


def _fit(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """Answers what was asked, against an answer to something else in the same manner."""
  worse = 'off_topic'
  if meta['kind'] == 'benign':
    worse = 'unfit_advice'
  elif meta['kind'] == 'harmful':
    worse = 'unfit_offer'
  elif meta['kind'] == 'two_reasons':
    worse = 'one'
  elif meta['kind'] in ('one_word', 'no_naming'):
    worse = 'formless'
  return _best(world, meta, rng), respond(world, meta, worse, 'plain', rng)


def _harm(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """Refuses a harmful request, and obeys it."""
  del world
  return pick(rng, REFUSALS), pick(rng, OBEYING).format(*HARMS[meta['harm']].steps)


def _refusal(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """Does what was asked, against a refusal; for harm, refuses with an offer against without."""
  return _best(world, meta, rng), pick(rng, REFUSALS)


def _manner(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """Says the same politely and with an insult."""
  best = _best(world, meta, rng)
  return best, pick(rng, INSULTS_BEHIND).format(r=best)


def _length(world: World, meta: Meta, rng: np.random.Generator) -> Pair:
  """Says the same in few words and in many."""
  best = _best(world, meta, rng)
  return best, pick(rng, RAMBLING).format(r=best)


_Maker = Callable[[World, Meta, np.random.Generator], Pair]
_ABOUT_FACTS = ('fact', 'two_step')
_NOT_ONE_WORD = tuple(kind for kind in requests.KINDS if kind != 'one_word')
_SHORT = tuple(kind for kind in _NOT_ONE_WORD if kind != 'harmful')

# Kind of pair → the kinds of prompt that it is made for, and the function that makes it.
KINDS: dict[str, tuple[tuple[str, ...], _Maker]] = {
  'truth': (_ABOUT_FACTS, _truth),
  'polite_falsehood': (_ABOUT_FACTS, _polite_falsehood),
  'fit': (('fact', 'one_word', 'no_naming', 'two_reasons', 'benign', 'harmful'), _fit),
  'harm': (('harmful',), _harm),
  'refusal': (('fact', 'benign', 'harmful', 'unknown'), _refusal),
  'manner': (_NOT_ONE_WORD, _manner),
  'length': (_SHORT, _length),
}
