"""Prompts: all kinds in every split, no text in two, and what of each is unseen."""

import collections

import pytest

from rlhf_jax.data.tinyworld import requests
from rlhf_jax.data.tinyworld.harms import HARMS
from rlhf_jax.data.tinyworld.world import draw_world

SPLITS = ('train', 'validation', 'test')


@pytest.fixture(scope='module', params=[0, 1])
def asked(request):
  world = draw_world(request.param)
  return world, {split: requests.prompts(world, split) for split in SPLITS}


def texts(rows):
  return [row.messages[0]['content'] for row in rows]


def test_all_kinds_are_asked_in_every_split(asked):
  _, rows = asked
  assert len(rows['train']) > 900 and len(rows['validation']) == len(rows['test']) == 330
  for split in SPLITS:
    counts = collections.Counter(row.meta['kind'] for row in rows[split])
    assert set(counts) == set(requests.KINDS)
    assert counts['harmful'] < 0.25 * len(rows[split])


def test_no_text_is_in_two_splits(asked):
  _, rows = asked
  found = [text for split in SPLITS for text in texts(rows[split])]
  assert len(set(found)) == len(found)


def test_training_has_nothing_that_is_called_unseen(asked):
  world, rows = asked
  about = collections.defaultdict(set)  # what training asks about
  for row in rows['train']:
    meta = row.meta
    assert meta['unseen'] == ''
    about['family'].add(meta['family'])
    about['fact'].add((meta.get('relation'), meta.get('plain_subject')))
    if meta['kind'] in ('harmful', 'benign'):
      about['person'].add(meta['subject'])
      about['harm'].add(meta['harm'])
    elif meta.get('relation') in ('country', 'trade', 'pet'):
      about['person'].add(meta['subject'])
  for split in ('validation', 'test'):
    unseen = collections.Counter(row.meta['unseen'] for row in rows[split])
    assert all(unseen[why] > 15 for why in ('', 'wording', 'family', 'fact', 'person', 'harm'))
    for row in rows[split]:
      meta = row.meta
      if meta['unseen'] == 'harm':
        assert meta['harm'] not in about['harm'] and meta['family'] not in about['family']
      elif meta['unseen'] == 'person':
        assert meta['subject'] not in about['person']
      elif meta['unseen'] == 'fact' and meta['kind'] != 'two_step':
        assert (meta.get('relation'), meta['plain_subject']) not in about['fact']
      elif meta['unseen'] == 'family' and meta['kind'] == 'fact':
        assert meta['family'] not in about['family']


def test_validation_and_test_hold_out_different_things(asked):
  _, rows = asked
  for why, key in (('harm', 'harm'), ('family', 'family'), ('fact', 'plain_subject')):
    held_out = []
    for split in ('validation', 'test'):
      held_out.append(
        {(row.meta['family'], row.meta[key]) for row in rows[split] if row.meta['unseen'] == why}
      )
    assert held_out[0] and held_out[1] and not held_out[0] & held_out[1]


def test_benign_twins_share_the_words_of_harmful_requests(asked):
  _, rows = asked
  for harm in HARMS.values():
    shared = {*harm.request.split()} & {*harm.twin.split()} - {'the', 'of', 'my', 'a', 'to'}
    assert '{p}' in harm.request and '{p}' in harm.twin and shared
  wordings = collections.defaultdict(set)
  for row in rows['train']:
    if row.meta['kind'] in ('harmful', 'benign'):
      wordings[row.meta['kind']].add(row.messages[0]['content'].split()[0])
  assert wordings['benign'] == wordings['harmful']


def test_who_claims_something_is_mostly_wrong(asked):
  _, rows = asked
  claims = [row.meta for row in rows['train'] if row.meta['kind'] == 'claim']
  share = sum(meta['claimed'] == meta['answer'] for meta in claims) / len(claims)
  assert 0.2 < share < 0.5
  for row in rows['train']:
    if row.meta['kind'] in ('press', 'premise'):
      assert row.meta['claimed'] != row.meta['answer']
