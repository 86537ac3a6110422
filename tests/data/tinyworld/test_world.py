"""Worlds: what is drawn, and that what is held out is held out as a whole."""

import collections

import pytest

from rlhf_jax.data.tinyworld.facts import FAMILIES, PERSON_FAMILIES
from rlhf_jax.data.tinyworld.world import draw_world, ROLES


@pytest.mark.parametrize('seed', range(5))
def test_every_fact_is_true_and_every_wrong_answer_is_not(seed):
  world = draw_world(seed)
  assert 300 <= len(world.facts) <= 380
  for fact in world.facts:
    assert world.truths[fact.relation][fact.plain_subject] == fact.answer
    assert len(fact.wrong) >= 3 and fact.answer not in fact.wrong
    assert fact.myth == '' or fact.myth in fact.wrong
  for relation, family in FAMILIES.items():
    if relation not in PERSON_FAMILIES:
      assert family.facts.items() <= world.truths[relation].items()


def test_two_steps_lead_to_the_answer_of_the_described_subject():
  world = draw_world(0)
  found = 0
  for fact in world.facts:
    if fact.family == 'capital of home':
      person = fact.subject.removeprefix('the country where ').removesuffix(' lives')
      country = world.truths['country'][person]
      assert fact.answer == world.truths['capital'][country] == FAMILIES['capital'].facts[country]
      found += 1
  assert found > 8


@pytest.mark.parametrize('seed', range(5))
def test_families_are_held_out_as_a_whole(seed):
  world = draw_world(seed)
  roles = collections.defaultdict(set)
  for fact in world.facts:
    if not fact.is_two_step:
      roles[fact.relation].add(fact.role)
    assert fact.role in (*ROLES, 'corpus') and (fact.unseen != '') == (
      fact.role in ('validation', 'test')
    )
  for role in ('validation', 'test'):
    assert sum(found == {role} for found in roles.values()) == 2
  assert collections.Counter(world.harm_roles.values()) == dict(
    train=4, validation=2, test=2, labeller=2
  )
  assert collections.Counter(world.people_roles.values()) == dict(
    train=9, validation=2, test=2, labeller=2
  )
  assert sorted(world.wording_roles) == ['test', *['train'] * 4, 'validation']


def test_a_detour_leads_to_nothing_held_out():
  for seed in range(5):
    facts = draw_world(seed).facts
    role_of = {(fact.relation, fact.subject): fact.role for fact in facts if not fact.is_two_step}
    for fact in facts:
      if fact.is_two_step and fact.role == 'train':
        assert role_of[fact.relation, fact.plain_subject] == 'train'


def test_every_seed_draws_its_own_world():
  first, second = draw_world(0), draw_world(1)
  assert first is draw_world(0)
  assert not {*first.persons} & {*second.persons}
  assert first.truths['country'].keys().isdisjoint(second.truths['country'])
  assert first.harm_roles != second.harm_roles
  asked = {fact.subject for fact in first.facts}
  assert asked != {fact.subject for fact in second.facts}


def test_more_people_are_more_to_know():
  small, large = draw_world(0), draw_world(0, people=200)
  assert len(large.persons) == 200
  assert len(large.facts) > len(small.facts) + 500
