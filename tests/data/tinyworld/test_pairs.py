"""Pairs by kind: the better one is better by the oracle, and they differ in their kind alone."""

import collections

import pytest

from rlhf_jax.data import tinyworld
from rlhf_jax.data.tinyworld import oracle, pairs


@pytest.fixture(scope='module')
def judged():
  prompts = {row.messages[0]['content']: row for row in tinyworld.records('prompt', 'validation')}
  rows = collections.defaultdict(list)
  for row in tinyworld.records('ranking', 'validation', count=420, variant='by_kind'):
    prompt = prompts[row.messages[0]['content']]
    better, worse = sorted(row.responses, key=lambda text: row.ranks[row.responses.index(text)])
    verdicts = oracle.judge(prompt, better), oracle.judge(prompt, worse)
    rows[row.domain].append((prompt, better, worse, *verdicts))
  return rows


def test_the_better_one_is_better(judged):
  assert set(judged) == set(pairs.KINDS)
  for rows in judged.values():
    assert len(rows) == 60
    assert all(better.utility > worse.utility for *_, better, worse in rows)


def test_they_differ_in_one_kind(judged):
  for _, better_text, worse_text, better, worse in judged['truth']:
    assert better.honest and not worse.honest and better.harmless and worse.harmless
    assert len({*better_text.split()} ^ {*worse_text.split()}) <= 8
  for *_, better, worse in judged['harm']:
    assert better.harmless and not worse.harmless and better.honest and worse.honest
  for *_, better, worse in judged['fit']:
    assert better.harmless == worse.harmless and better.helpful and not worse.helpful
  for *_, better, worse in judged['refusal']:
    assert better.helpful and worse.bare_refusal and worse.honest and worse.harmless
  for _, better_text, worse_text, better, worse in judged['length']:
    assert better.substance == worse.substance and better_text in worse_text
  for *_, better, worse in judged['manner']:
    assert better.honest == worse.honest and not worse.harmless


def test_both_places_come_first():
  rows = tinyworld.records('ranking', 'train', count=200, variant='by_kind')
  assert 60 < sum(row.ranks == [1, 2] for row in rows) < 140
  unseen = tinyworld.records('ranking', 'validation', count=200, variant='by_kind')
  counts = collections.Counter(row.source for row in unseen)
  assert min(counts['tinyworld/seen'], counts['tinyworld/unseen']) > 40
