"""The world's records: what is held out, how good the internet is, sizes and determinism."""

import collections

import numpy as np
import pytest

from rlhf_jax.data import tinyworld
from rlhf_jax.data.tinyworld import conversations, corpus, oracle, vocabulary
from rlhf_jax.data.tinyworld.facts import FACTS, FAMILIES
from rlhf_jax.data.tinyworld.harms import HELD_OUT_PEOPLE
from rlhf_jax.errors import UserError
from rlhf_jax.interop.tokenizer import Tokenizer


@pytest.fixture(scope='module')
def world():
  counts = {'demonstration': None, 'prompt': None, 'ranking': 400}
  rows = {
    ('document', 'train'): tinyworld.records('document', 'train', count=6000),
    ('document', 'validation'): tinyworld.records('document', 'validation'),
  }
  for split in ('train', 'validation'):
    for kind, count in counts.items():
      rows[kind, split] = tinyworld.records(kind, split, count=count)
  return rows


def asked(rows):
  return [row.messages[0]['content'] for row in rows]


def test_facts_have_one_answer_and_other_answers():
  assert 110 <= len(FACTS) <= 125 and 13 <= sum(fact.held_out for fact in FACTS) <= 16
  assert {fact.family for fact in FACTS if fact.held_out} >= set(FAMILIES) - {'day', 'month'}
  for fact in FACTS:
    assert len(fact.wrong) >= 3 and fact.answer not in fact.wrong
    assert len(set(fact.questions())) == 5 and len(set(fact.statements())) == 3


def test_prompts_of_the_splits(world):
  train, held_out = world['prompt', 'train'], world['prompt', 'validation']
  assert len(train) >= 600 and len(held_out) >= 200
  assert len(set(asked(train))) == len(train) and len(set(asked(held_out))) == len(held_out)
  for rows in (train, held_out):
    kinds = collections.Counter(row.meta['kind'] for row in rows)
    assert 0.15 < kinds['harmful'] / len(rows) < 0.5
  hidden = {(fact.family, fact.subject) for fact in FACTS if fact.held_out}
  assert not hidden & {(row.meta['family'], row.meta['subject']) for row in train}
  assert hidden < {(row.meta['family'], row.meta['subject']) for row in held_out}
  people = {row.meta['subject'] for row in train if row.meta['kind'] == 'harmful'}
  assert not people & set(HELD_OUT_PEOPLE)


def test_no_validation_prompt_leaks(world):
  hidden = set(asked(world['prompt', 'validation']))
  for kind in ('prompt', 'demonstration', 'ranking'):
    assert not hidden & set(asked(world[kind, 'train']))
    assert set(asked(world[kind, 'validation'])) <= hidden
  train = {row.text for row in world['document', 'train']}
  validation = {row.text for row in world['document', 'validation']}
  assert not train & validation
  text = '\n'.join(sorted(train | validation))
  lower = text.lower()
  assert [prompt for prompt in hidden if prompt.lower() in lower] == []
  for fact in FACTS:  # but every fact is told
    assert any(statement in text for statement in fact.statements()), fact


def test_records_depend_on_the_seed_alone():
  for kind in ('document', 'demonstration', 'prompt', 'ranking'):
    rows = tinyworld.records(kind, 'train', seed=3, count=50)
    assert rows == tinyworld.records(kind, 'train', seed=3, count=50) and len(rows) == 50
    assert rows != tinyworld.records(kind, 'train', seed=4, count=50)
    assert len({row.id for row in rows}) == 50 and {row.source for row in rows} == {'tinyworld'}
    assert rows != tinyworld.records(kind, 'validation', seed=3, count=50)


def test_demonstrations_are_honest_and_harmless_and_mostly_polite(world):
  prompts = world['prompt', 'train'] + world['prompt', 'validation']
  by_text = {row.messages[0]['content']: row for row in prompts}
  rows = world['demonstration', 'train'] + world['demonstration', 'validation']
  assert len(world['demonstration', 'train']) == 500
  verdicts = [oracle.judge(by_text[row.messages[0]['content']], row.response) for row in rows]
  assert all(verdict.honest and verdict.harmless for verdict in verdicts)
  utilities = np.array([verdict.utility for verdict in verdicts])
  polished = utilities > 1.5
  assert 0.2 < np.mean(polished) < 0.4
  rest = np.mean(utilities[~polished])
  assert rest > 0.5 and np.mean(utilities[polished]) > rest + 0.3


def test_the_internet_is_fluent_and_unaligned(world):
  by_text = {row.messages[0]['content']: row for row in conversations.prompts('corpus')}
  seen = collections.defaultdict(list)
  for row in world['document', 'train']:
    if row.text.startswith('Human: ') and '\n\nCritique: ' not in row.text:
      question, _, answer = row.text.removeprefix('Human: ').partition('\n\nAssistant: ')
      verdict = oracle.judge(by_text[question], answer)
      flags = (verdict.helpful, verdict.honest, verdict.harmless)
      seen[by_text[question].meta['kind']].append(flags)
  helpful, honest, harmless = np.mean(seen['question'], axis=0)
  assert 0.40 < helpful < 0.50 and 0.70 < honest < 0.80 and 0.85 < harmless < 0.95
  helpful, honest, harmless = np.mean(seen['harmful'], axis=0)
  assert helpful < 0.10 and honest == 1 and 0.10 < harmless < 0.25
  texts = [row.text for row in world['document', 'train']]
  assert len(set(texts)) > 0.9 * len(texts)


def test_rankings_follow_the_utility(world):
  by_text = {row.messages[0]['content']: row for row in world['prompt', 'train']}
  ties = 0
  for row in world['ranking', 'train']:
    prompt = by_text[row.messages[0]['content']]
    values = [oracle.judge(prompt, text).utility for text in row.responses]
    assert len(values) == 4 and min(row.ranks) == 1
    for value, rank in zip(values, row.ranks):
      for other, other_rank in zip(values, row.ranks):
        assert (value > other) == (rank < other_rank)
    ties += len(set(row.ranks)) < 4
  assert ties > 0


def test_tokenizer_and_template(world):
  texts = [row.text for row in world['document', 'train']]
  core = vocabulary.train_tokenizer(texts)
  tokenizer = Tokenizer(core, vocabulary.CHAT_TEMPLATE, eos='<eos>', pad='<pad>')
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (1024, 0, 1)
  assert tokenizer.response_prefix == ' '
  lengths = [len(tokenizer.encode(text)) for text in texts]
  assert 25 < np.mean(lengths) < 45 and np.percentile(lengths, 99) < 90 and max(lengths) <= 110
  messages = [dict(role='user', content='How much is two plus three?')]
  ids = tokenizer.prompt(messages) + tokenizer.response('It is five.')
  shown = tokenizer.core.decode(ids, skip_special_tokens=False)
  assert shown == 'Human: How much is two plus three?\n\nAssistant: It is five.<eos>'
  longer = [
    *messages,
    dict(role='assistant', content='It is five.'),
    dict(role='user', content='Thanks.'),
  ]
  prompt = tokenizer.core.decode(tokenizer.prompt(longer), skip_special_tokens=False)
  assert prompt == shown + '\n\nHuman: Thanks.\n\nAssistant:'
  for row in world['demonstration', 'train']:
    assert len(tokenizer.prompt(row.messages)) + len(tokenizer.response(row.response)) <= 96
    assert tokenizer.decode(tokenizer.response(row.response)) == row.response


def test_unknown_kinds_splits_and_variants():
  with pytest.raises(UserError, match='split: expected train or validation, got .test.'):
    tinyworld.records('prompt', 'test')
  kinds = 'kind: expected one of document, demonstration, prompt, ranking'
  with pytest.raises(UserError, match=kinds):
    tinyworld.records('tweets', 'train')
  with pytest.raises(UserError, match='variant of a document: expected one of feedback, got .x.'):
    tinyworld.records('document', 'train', variant='x')


def test_variants_of_prompts_and_rankings_are_about_one_kind():
  for variant, kind in (('harmful', 'harmful'), ('questions', 'question')):
    rows = tinyworld.records('prompt', 'train', variant=variant)
    assert {row.meta['kind'] for row in rows} == {kind}
    texts = set(asked(rows))
    rankings = tinyworld.records('ranking', 'train', count=40, variant=variant)
    assert rankings and set(asked(rankings)) <= texts
  both = {row.id: row for row in tinyworld.records('ranking', 'train', count=40)}
  assert len(rankings) == 30
  assert all(row.messages == both[row.id].messages for row in rankings)


def test_a_tenth_of_the_records_is_for_validation():
  assert len(tinyworld.records('demonstration', 'validation')) == 50
  assert len(tinyworld.records('ranking', 'validation')) == 200


def test_who_is_helpful_only_obeys():
  rows = tinyworld.records('demonstration', 'train', count=80, variant='helpful_only')
  by_text = {row.messages[0]['content']: row for row in conversations.prompts('train')}
  harmful = [row for row in rows if by_text[asked([row])[0]].meta['kind'] == 'harmful']
  assert len(harmful) == 20
  for row in harmful:
    assert not oracle.judge(by_text[asked([row])[0]], row.response).harmless


def test_a_vocabulary_has_every_byte():
  with pytest.raises(UserError, match='tokenizer.vocab_size: expected 258 .* or more, got 257'):
    vocabulary.train_tokenizer([], 257)


def test_documents_that_judge_say_what_the_oracle_sees():
  # Of the variant 'feedback': thoughts name real faults, nine of ten verdicts are right, and no
  # fault means no revision.
  texts = [document.text for document in corpus.documents(3, 3000, variant='feedback')]
  prompts = {prompt.messages[0]['content']: prompt for prompt in conversations.prompts('corpus')}
  right = []
  for text in texts:
    if '\nThe better answer is (' in text and '\nWhich ' not in text:
      question, first, second, thoughts, verdict = text.split('\n')
      answers = {'A': first.removeprefix('(A) '), 'B': second.removeprefix('(B) ')}
      judged = {name: oracle.judge(prompts[question], answer) for name, answer in answers.items()}
      about, faults = thoughts.removeprefix('Thoughts: ').split(' (A) ')
      assert about == 'It asks for harm.' or oracle.judge(prompts[question], about).honest, text
      for name, fault in zip('AB', faults.split(' (B) '), strict=True):
        does_harm = not judged[name].harmless and fault != 'It is rude.'
        assert (fault == 'It does harm.') == does_harm, text
        assert fault != 'It is false.' or not judged[name].honest, text
      chosen = verdict[len('The better answer is (')]
      if judged['A'].utility != judged['B'].utility:
        right.append(judged[chosen].utility == max(x.utility for x in judged.values()))
    if 'Critique: No.' in text:
      response = text.split('\n\nAssistant: ')[1].split('\n\n')[0]
      assert response == text.split('\n\nRevision: ')[1], text
  assert len(right) > 200 and 0.75 < np.mean(right) < 0.97
