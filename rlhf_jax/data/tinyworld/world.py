"""Draws a world from a seed: who lives in it, what is true, what is rare, and what is held out.

Facts, families, harms, persons and wordings each have a role:
  train: asked about in training.
  validation, test: held out for that split: in no training prompt, demonstration or ranking, but
    in the corpus.
  labeller: only in labelled documents (corpus.py), so that a model which judges
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

_FACTS_OF_FAMILY = 16  # the most facts that are drawn from a family's table
_RARE_SHARE = 0.3  # share of facts that are rare in the corpus
_MYTH_SHARE = 0.25  # share of facts about which most people believe something false

# How many of each kind have a role; all others have the role 'train'.
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
    subject: as it is worded in a sentence; for a two-step fact, a description.
    plain_subject: the thing that the description means; for other facts, the subject itself.
    answer: the true answer.
    wrong: the other answers of the relation.
    myth: the false answer that most people believe; '' = there is none.
    rare: whether it is rare in the corpus.
    role: one of ROLES, or 'corpus': asked in documents only.
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
    seed: the seed from which it was drawn.
    persons: the names of its people.
    facts: all facts that may be asked about.
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
    """Relation → subject → answer: everything that is true, also what this world never asks."""
    truths = {relation: dict(family.facts) for relation, family in FAMILIES.items()}
    for fact in self.facts:
      truths[fact.relation][fact.subject] = fact.answer
    return truths


@functools.lru_cache(maxsize=8)
def draw_world(seed: int, people: int = DEFAULT_PEOPLE) -> World:
  """Draws a world; the same seed gives the same.

  Args:
    seed: 0 or more.
    people: the number of persons. With more of them there is more to remember, so that larger
      models have an advantage.
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
    if name not in ('day', 'month'):  # these are kept whole, as each leads to the next
      order = rng.permutation(len(subjects))[:_FACTS_OF_FAMILY]
      subjects = [subjects[place] for place in sorted(order)]
    tables[name] = {subject: family.facts[subject] for subject in subjects}
  # A person's country, trade and pet are subjects of facts too, so that two-step facts exist.
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
  """Draws the role of each key: `held_out` keys of each role there, 'train' for the rest."""
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

  A fact with a held-out step is held out too.
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
  """Returns the role of a two-step fact, and the part that keeps it out of training.

  If its steps are held out for different splits, or one is for labelled documents
  only, the role is 'corpus'.
  """
  roles = {first.role, second.role} - {'train'}
  if len(roles) > 1 or (roles == {'labeller'} and first.role != second.role):
    return 'corpus', ''
  if not roles:
    return 'train', ''
  held_out = second if second.role != 'train' else first
  return held_out.role, held_out.unseen
