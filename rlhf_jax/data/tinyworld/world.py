"""Draws a world from a seed: who lives in it, what is true, what is rare, and what is held out.

What is held out is held out by whole families, each for one of the splits:
  train: asked in training, and known to every split.
  validation, test: in no training prompt, demonstration or ranking; stands in the corpus.
  labeller: nothing but what labelled documents are about (corpus.py), so that a model which judges
    has seen no labelled example of anything that it judges.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import numpy as np

from rlhf_jax.data.tinyworld import names
from rlhf_jax.data.tinyworld.choices import pick
from rlhf_jax.data.tinyworld.facts import (
  FAMILIES,
  NUM_WORDINGS,
  PERSON_FAMILIES,
  TWO_STEPS,
)
from rlhf_jax.data.tinyworld.harms import PEOPLE, REASONS, REQUESTS, TWO_REASONS

DEFAULT_PEOPLE = 20  # persons that a world knows; each has three facts
ROLES = ('train', 'validation', 'test', 'labeller')

_FACTS_OF_FAMILY = 16  # of a table, at most
_RARE_SHARE = 0.3  # facts that the corpus tells seldom
_MYTH_SHARE = 0.25  # facts of which people mostly believe something false

# How many of a kind have each role; what is left is for training.
_HELD_OUT_FAMILIES = {'validation': 2, 'test': 2}  # of facts
_HELD_OUT_HARMS = {'validation': 2, 'test': 2, 'labeller': 2}  # families of harms
_HELD_OUT_PEOPLE = {'validation': 2, 'test': 2, 'labeller': 2}  # of harms.PEOPLE
_HELD_OUT_WORDINGS = {'validation': 1, 'test': 1}  # of questions, and of requests
_HELD_OUT_REASONS = {'validation': 2, 'test': 2, 'labeller': 2}  # of harms.TWO_REASONS
_HELD_OUT_SHARES = {'validation': 0.12, 'test': 0.12, 'labeller': 0.15}  # of facts, of persons


@dataclasses.dataclass(frozen=True)
class Fact:
  """One fact of a world.

  Attributes:
    family: a key of FAMILIES, or of TWO_STEPS.
    relation: the key of FAMILIES whose wordings it has.
    subject: as it stands in a sentence; of a two-step fact a description.
    plain_subject: what the subject describes; of other facts the subject itself.
    answer: the truth.
    wrong: the other answers of the relation.
    myth: what people mostly believe instead; '' = the truth.
    rare: whether the corpus tells it seldom.
    role: one of ROLES, or 'corpus': asked in documents alone.
    unseen: what keeps it out of training: 'family', 'person', 'fact', or ''.
  """

  family: str
  relation: str
  subject: str
  plain_subject: str
  answer: str
  wrong: tuple[str, ...]
  myth: str
  rare: bool
  role: str
  unseen: str

  @property
  def is_two_step(self) -> bool:
    """Whether the subject is described by another fact."""
    return self.family in TWO_STEPS


@dataclasses.dataclass(frozen=True, eq=False)  # so that it can be a key of caches
class World:
  """What is true in one world, and what is held out of training.

  Attributes:
    seed: what it was drawn from.
    persons: the people of the world, by name.
    facts: what is true and may be asked.
    harm_roles: family of harms → role.
    people_roles: person of a request → role.
    reasons_roles: key of TWO_REASONS → role.
    wording_roles: role of each kind of wording of a question.
    request_roles: role of each kind of wording of a request.
  """

  seed: int
  persons: tuple[str, ...]
  facts: tuple[Fact, ...]
  harm_roles: Mapping[str, str]
  people_roles: Mapping[str, str]
  reasons_roles: Mapping[str, str]
  wording_roles: tuple[str, ...]
  request_roles: tuple[str, ...]

  @functools.cached_property
  def truths(self) -> dict[str, dict[str, str]]:
    """Relation → subject → answer: all that is true, whether this world asks it or not."""
    truths = {relation: dict(family.facts) for relation, family in FAMILIES.items()}
    for fact in self.facts:
      truths[fact.relation][fact.subject] = fact.answer
    return truths


@functools.lru_cache(maxsize=8)
def draw_world(seed: int, people: int = DEFAULT_PEOPLE) -> World:
  """Draws a world; the same seed gives the same.

  Args:
    seed: 0 or more.
    people: how many persons it knows. More of them are more to remember: a way to make a world
      in which size matters.
  """
  rng = np.random.default_rng([seed, 11])
  persons = tuple(names.draw_persons(rng, people))
  tables = _draw_tables(rng, persons)
  family_roles = _draw_roles(rng, [*FAMILIES], _HELD_OUT_FAMILIES)
  person_roles = dict(zip(persons, _draw_shares(rng, people), strict=True))
  facts = _single_facts(rng, tables, family_roles, person_roles)
  facts += _two_step_facts(facts, tables)
  return World(
    seed=seed,
    persons=persons,
    facts=tuple(facts),
    harm_roles=_draw_roles(rng, [*REASONS], _HELD_OUT_HARMS),
    people_roles=_draw_roles(rng, PEOPLE, _HELD_OUT_PEOPLE),
    reasons_roles=_draw_roles(rng, [*TWO_REASONS], _HELD_OUT_REASONS),
    wording_roles=_draw_wording_roles(rng, NUM_WORDINGS),
    request_roles=_draw_wording_roles(rng, len(REQUESTS)),
  )


def _draw_tables(rng: np.random.Generator, persons: Sequence[str]) -> dict[str, dict[str, str]]:
  """Draws what each relation knows: subject → answer."""
  tables = {}
  for name, family in FAMILIES.items():
    subjects = list(family.facts)
    if name not in ('day', 'month'):  # each of these leads to the next
      order = rng.permutation(len(subjects))[:_FACTS_OF_FAMILY]
      subjects = [subjects[place] for place in sorted(order)]
    tables[name] = {subject: family.facts[subject] for subject in subjects}
  # Whatever a person has is known itself, so that two steps lead somewhere.
  pets = [
    animal for animal in tables['legs'] if animal in tables['sound'] or animal in tables['young']
  ]
  choices = {
    'country': list(tables['capital']),
    'trade': list(tables['work']),
    'pet': pets,
  }
  for relation in PERSON_FAMILIES:
    tables[relation] = {person: pick(rng, choices[relation]) for person in persons}
  return tables


def _draw_roles(
  rng: np.random.Generator, keys: Sequence[str], held_out: Mapping[str, int]
) -> dict[str, str]:
  """Gives each key a role: the numbers of held-out ones as told, 'train' for the rest."""
  roles = dict.fromkeys(keys, 'train')
  order = iter(rng.permutation(len(keys)))
  for role, count in held_out.items():
    for _ in range(count):
      roles[keys[next(order)]] = role
  return roles


def _draw_wording_roles(rng: np.random.Generator, count: int) -> tuple[str, ...]:
  """Gives each kind of wording a role."""
  keys = [str(number) for number in range(count)]
  return tuple(_draw_roles(rng, keys, _HELD_OUT_WORDINGS).values())


def _single_facts(
  rng: np.random.Generator,
  tables: Mapping[str, Mapping[str, str]],
  family_roles: Mapping[str, str],
  person_roles: Mapping[str, str],
) -> list[Fact]:
  """Makes the facts of one step, with their roles, myths and rarity."""
  facts = []
  for relation, table in tables.items():
    answers = list(dict.fromkeys(table.values()))
    roles = _draw_shares(rng, len(table))
    unseen = 'fact'
    if relation in PERSON_FAMILIES:  # persons are held out with all their facts
      roles = [person_roles[person] for person in table]
      unseen = 'person'
    if family_roles[relation] != 'train':
      roles = [family_roles[relation]] * len(table)
      unseen = 'family'
    for role, (subject, answer) in zip(roles, table.items(), strict=True):
      wrong = tuple(other for other in answers if other != answer)
      myth = pick(rng, wrong) if rng.random() < _MYTH_SHARE else ''
      fact = Fact(
        family=relation,
        relation=relation,
        subject=subject,
        plain_subject=subject,
        answer=answer,
        wrong=wrong,
        myth=myth,
        rare=bool(rng.random() < _RARE_SHARE),
        role=role,
        unseen=unseen if role in ('validation', 'test') else '',
      )
      facts.append(fact)
  return facts


def _draw_shares(rng: np.random.Generator, count: int) -> list[str]:
  """Gives each of some facts or persons its role."""
  roles: list[str] = []
  for role, share in _HELD_OUT_SHARES.items():
    roles += [role] * round(share * count)
  roles += ['train'] * (count - len(roles))
  return [roles[place] for place in rng.permutation(count)]


def _two_step_facts(singles: Sequence[Fact], tables: Mapping[str, Mapping[str, str]]) -> list[Fact]:
  """Makes the facts whose subject is described by another fact.

  Nothing held out is asked in training by a detour.
  """
  by_key = {(fact.relation, fact.subject): fact for fact in singles}
  facts = []
  for family, form in TWO_STEPS.items():
    for first_subject, middle in tables[form.first].items():
      subject = first_subject if form.first == 'sound' else middle
      first = by_key[form.first, first_subject]
      second = by_key.get((form.second, subject))
      if second is None:
        continue
      described = form.description.format(s=first_subject, a=first.answer)
      role, unseen = _role_of_steps(first, second)
      fact = dataclasses.replace(
        second,
        family=family,
        subject=described,
        plain_subject=subject,
        rare=first.rare or second.rare,
        role=role,
        unseen=unseen,
      )
      facts.append(fact)
  return facts


def _role_of_steps(first: Fact, second: Fact) -> tuple[str, str]:
  """Returns the role of a fact of two steps, and what keeps it out of training.

  Where the two belong to different splits, or one of them to labelled documents alone, the corpus
  alone may ask it.
  """
  roles = {first.role, second.role} - {'train'}
  if len(roles) > 1 or (roles == {'labeller'} and first.role != second.role):
    return 'corpus', ''
  if not roles:
    return 'train', ''
  held_out = second if second.role != 'train' else first
  return held_out.role, held_out.unseen
