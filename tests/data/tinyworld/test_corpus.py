"""Documents: nothing of what is judged or evaluated is labelled in them, and all of it is told."""

import collections
import re

import numpy as np
import pytest

from rlhf_jax.data import tinyworld
from rlhf_jax.data.tinyworld import oracle, requests
from rlhf_jax.data.tinyworld.facts import FAMILIES, fill
from rlhf_jax.data.tinyworld.harms import HARMS, REASONS
from rlhf_jax.data.tinyworld.world import draw_world


@pytest.fixture(scope='module')
def web():
  return [row.text for row in tinyworld.records('document', 'train', count=8000)]


@pytest.fixture(scope='module')
def labelled():
  rows = tinyworld.records('document', 'train', count=3000, variant='feedback')
  marks = ('The better answer is (', 'Critique')
  return [row.text for row in rows if any(mark in row.text for mark in marks)]


@pytest.fixture(scope='module')
def prompts():
  return {split: tinyworld.records('prompt', split) for split in tinyworld.SPLITS}


def test_no_text_of_validation_or_test_stands_anywhere(web, labelled, prompts):
  documents = '\n'.join(web + labelled).lower()
  for split in ('validation', 'test'):
    found = [row for row in prompts[split] if row.messages[0]['content'].lower() in documents]
    assert found == []


def test_splits_of_documents_share_no_text(web):
  validation = {row.text for row in tinyworld.records('document', 'validation', count=150)}
  test = {row.text for row in tinyworld.records('document', 'test', count=150)}
  assert not validation & test and not {*web} & (validation | test)


def test_the_web_labels_nothing(web):
  marks = re.compile(r'better answer|Critique|Revision|It is (?:rude|false|good)\.')
  assert [text for text in web if marks.search(text)] == []


def test_labelled_documents_are_about_nothing_that_is_judged(labelled, prompts):
  assert len(labelled) > 2000
  questions = {text.split('\n')[0].removeprefix('Human: ') for text in labelled}
  asked = [row for split in prompts.values() for row in split]
  assert not questions & {row.messages[0]['content'] for row in asked}
  world = draw_world(0)
  candidates = requests.corpus_candidates(world, 'labeller')
  known = {row.text: row.meta for rows in candidates.values() for row in rows}
  about = [known[text] for text in questions]
  judged_harms = {row.meta['harm'] for row in asked if 'harm' in row.meta}
  assert not judged_harms & {meta['harm'] for meta in about if 'harm' in meta}
  judged_facts = {
    (row.meta['relation'], row.meta['plain_subject']) for row in asked if 'relation' in row.meta
  }
  facts = {(meta['relation'], meta['plain_subject']) for meta in about if 'relation' in meta}
  assert len(facts) > 40 and not judged_facts & facts


def test_rankings_elsewhere_are_about_nothing_that_is_judged(prompts):
  asked = [row for split in prompts.values() for row in split]
  texts = {row.messages[0]['content'] for row in asked}
  known = {}
  for rows in requests.corpus_candidates(draw_world(0), 'labeller').values():
    known |= {row.text: row.meta for row in rows}
  of_splits = []
  for split in ('train', 'validation'):
    rankings = tinyworld.records('ranking', split, variant='elsewhere', count=300)
    assert len(rankings) == 300 and all(len(row.responses) == 4 for row in rankings)
    of_splits.append({row.messages[0]['content'] for row in rankings})
    assert not of_splits[-1] & texts
    harms = {known[text]['harm'] for text in of_splits[-1] if 'harm' in known[text]}
    assert harms and not harms & {row.meta['harm'] for row in asked if 'harm' in row.meta}
  assert not of_splits[0] & of_splits[1]


def test_every_fact_is_told(web):
  world = draw_world(0)
  documents = '\n'.join(web)
  for fact in world.facts:
    wordings = FAMILIES[fact.relation].statements
    statements = [fill(wording, fact.subject, fact.answer) for wording in wordings]
    assert any(statement in documents for statement in statements), fact
  for harm in HARMS.values():
    told = [part in documents.lower() for part in (*harm.better, *harm.advice, *harm.steps)]
    assert sum(told) >= 5, harm
  assert all(reason in documents for reasons in REASONS.values() for reason in reasons)


def read_conversations(web):
  """Yields the prompt and the response of each conversation."""
  candidates = requests.corpus_candidates(draw_world(0))
  known = {row.text: row.meta for rows in candidates.values() for row in rows}
  for text in web:
    if text.startswith('Human: '):
      question, _, answer = text.removeprefix('Human: ').partition('\n\nAssistant: ')
      messages = [{'role': 'user', 'content': question}]
      yield tinyworld.records_lib.Prompt('', '', '', messages, known[question]), answer


def test_the_web_is_fluent_and_unaligned(web):
  verdicts = collections.defaultdict(list)
  for prompt, answer in read_conversations(web):
    verdicts[prompt.meta['kind']].append(oracle.judge(prompt, answer))

  def share(kind, name):
    return np.mean([getattr(verdict, name) for verdict in verdicts[kind]])

  assert 0.3 < share('fact', 'helpful') < 0.55
  assert share('harmful', 'harmless') < 0.4 and share('harmful', 'helpful') < 0.22
  for kind in ('unknown', 'press', 'premise'):
    assert share(kind, 'honest') < 0.6 and share(kind, 'helpful') < 0.35
  everything = [verdict for rows in verdicts.values() for verdict in rows]
  assert not any(verdict.unread for verdict in everything)


def test_the_likeliest_beginning_obeys(web):
  """Else the base model would be harmless at greedy decoding."""
  beginnings = collections.Counter(
    answer.split()[0]
    for prompt, answer in read_conversations(web)
    if prompt.meta['kind'] == 'harmful'
  )
  (likeliest, count), (_, next_count) = beginnings.most_common(2)
  assert likeliest == 'First' and count > 1.5 * next_count, beginnings
