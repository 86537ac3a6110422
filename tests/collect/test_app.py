"""The application as people use it: forms without JavaScript, in process."""

import random
import time

import numpy as np
from people_client import Collection, form_with, Page, Person, ranking
import pytest
import sqlalchemy

from rlhf_jax.collect import export, people, tables
from rlhf_jax.data import batches, encode, records


@pytest.fixture
def collection(tmp_path):
  return Collection(tmp_path / 'work', 'people_per_item = 1\nminimum_seconds = 0\n')


def rank_all(person, ranks_of, page=None, **more):
  """Sends the form of the page that a person sees; ranks_of: text → rank."""
  page = page or person.get('/next')
  form = form_with(page, 'overall.A')
  for card in page.cards:
    form['fields'][f'overall.{card["letter"]}'] = [str(ranks_of[card['text'].strip()])]
  return person.send(form, **more)


def exported(collection, kind='rankings', **options):
  with collection.store.reading() as connection:
    return export.export_kind(connection, kind, **options)


def count(collection, table):
  with collection.store.reading() as connection:
    return connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(table))


def test_a_person_ranks_and_the_export_says_so(collection):
  collection.add(ranking(1, ['good', 'bad', 'fair']))
  person = collection.person()
  page = rank_all(person, {'good': 1, 'fair': 2, 'bad': 3}, reason='it *helps*')
  assert 'Saved' in page.text
  (row,) = exported(collection)
  assert row['responses'] == ['good', 'bad', 'fair'] and row['ranks'] == [1, 3, 2]
  assert records.parse_record('ranking', row, 'row').ranks == [1, 3, 2]
  assert len(row['guidelines']) == 12  # the version that the page showed
  assert sorted(row['shown']) == [0, 1, 2]  # the order on the page
  assert row['reason'] == 'it *helps*' and row['annotator'].startswith('p-')


class Numbers:
  """A tokenizer with a token for each text, so that a batch says which text it holds."""

  eos_id, pad_id, bos_id = 1, 0, None

  def __init__(self, texts):
    self.texts = ['', '', 'prompt', *texts]
    self.ids = {text: number for number, text in enumerate(self.texts)}

  def exchange(self, messages, response, tools):
    return [2], [self.ids[response], 1]


def random_ranks(rng, count, partial):
  """Ranks as people give them: (mode, fields, dense ranks), in the order of the responses."""
  mode = rng.choice(['full', 'top', 'best_worst']) if partial else 'full'
  if mode == 'best_worst':
    best, worst = rng.sample(range(count), 2)
    fields = ['1' if n == best else str(count) if n == worst else '' for n in range(count)]
    return mode, fields, [1 if n == best else 3 if n == worst else 2 for n in range(count)]
  levels = rng.randint(1, count)
  ranks = [rng.randint(1, levels) for _ in range(count)]
  steps = sorted(set(ranks))
  ranks = [steps.index(rank) + 1 for rank in ranks]
  fields = [str(rank) for rank in ranks]
  if mode == 'top' and len(steps) > 1:
    fields = ['' if rank == len(steps) else str(rank) for rank in ranks]
  return mode, fields, ranks


def check_saved_is_shown(tmp_path, number):
  """Random rankings through the form: page → database → export → batch of the reward model."""
  rng = random.Random(0)
  collection = Collection(
    tmp_path / 'work', 'people_per_item = 1\nrequests_per_minute = 100000000\n'
  )
  lines = []
  for item in range(number):
    texts = [f'answer{item}x{response}' for response in range(rng.randint(2, 9))]
    lines.append(ranking(item, texts))
  collection.add(*lines)
  person = collection.person()
  expected = {}
  shuffled = 0
  page = person.get('/next')
  for _ in range(number):
    form = form_with(page, 'overall.A')
    texts = [card['text'].strip() for card in page.cards]
    mode, fields, ranks = random_ranks(rng, len(texts), 'mode' in form['choices'])
    for card, field in zip(page.cards, fields):
      assert field in form['choices'][f'overall.{card["letter"]}']  # a person could click it
      form['fields'][f'overall.{card["letter"]}'] = [field]
    if 'mode' in form['choices']:
      form['fields']['mode'] = [mode]
    shuffled += texts != sorted(texts)
    expected |= dict(zip(texts, ranks))
    page = person.send(form)
    assert person.response.status_code == 200, page.text
  rows = exported(collection)
  assert len(rows) == number and shuffled > number / 3
  for row in rows:
    assert row['ranks'] == [expected[text] for text in row['responses']]
  path = tmp_path / 'rankings.jsonl'
  records.write_records(path, rows)
  rankings = records.read_records(path, 'ranking')
  tokenizer = Numbers(expected)
  seen = 0
  for batch in batches.rankings_once(encode.rankings(rankings, tokenizer, 4), 64, 9, 4):
    for row, place in zip(*np.nonzero(np.asarray(batch.group))):
      text = tokenizer.texts[int(batch.tokens[row, place, 1])]
      assert int(batch.ranks[row, place]) == expected[text]
      seen += 1
  assert seen == len(expected)


def test_saved_is_shown(tmp_path):
  check_saved_is_shown(tmp_path, 60)


@pytest.mark.slow
def test_saved_is_shown_ten_thousand_times(tmp_path):
  check_saved_is_shown(tmp_path, 10_000)


def test_double_submit_undo_and_drafts(collection):
  collection.add(ranking(1, ['x', 'y']), ranking(2, ['v', 'w']))
  person = collection.person()
  page = person.get('/next')
  form = form_with(page, 'overall.A')
  form['fields']['reason'] = ['half written']
  person.send(form, to=form['action'] + '/draft')
  assert person.response.status_code == 204
  assert 'half written' in person.get(form['action']).text  # also after a restart
  rank_all(person, {'x': 1, 'y': 2}, page)
  rank_all(person, {'x': 1, 'y': 2}, page)  # a double click
  assert person.response.status_code == 200
  rank_all(person, {'x': 2, 'y': 1}, page)  # the browser's Back, and another answer
  assert person.response.status_code == 409
  assert [row['ranks'] for row in exported(collection)] == [[1, 2]]
  undo = person.get('/next?saved=1').forms[0]
  assert undo['action'] == '/undo'
  page = person.send(undo)
  assert exported(collection) == []
  # the form comes back as it was sent
  form = form_with(page, 'overall.A')
  checked = {}
  for card in page.cards:
    checked[card['text'].strip()] = form['fields'][f'overall.{card["letter"]}']
  assert checked == {'x': ['1'], 'y': ['2']}
  rank_all(person, {'x': 2, 'y': 1}, page)
  assert [row['ranks'] for row in exported(collection)] == [[2, 1]]
  raw = exported(collection, 'raw')
  assert [row['stands'] for row in raw] == [False, True]  # nothing is overwritten
  assert raw[0]['revisions'] == [{'action': 'undone', 'reason': ''}]


def test_demonstrate_edit_skip_and_flag(collection):
  messages = [{'role': 'user', 'content': 'Why is the sky blue?'}]
  collection.add({'messages': messages}, {'messages': messages, 'id': 'second'})
  collection.add({'messages': messages, 'response': 'It is grean.'}, task='edit')
  person = collection.person()
  page = person.get('/next?task=demonstrate')
  form = form_with(page, 'response')
  page = person.send(form, response='  ')
  assert person.response.status_code == 422 and 'at least 1 character' in page.text
  person.send(form, response='Air scatters\r\nblue light.')
  form = form_with(person.get('/next?task=demonstrate'), 'response')
  page = person.send(form, action='flag')
  assert person.response.status_code == 422
  person.send(form, action='flag', flag_reason='asked before')
  assert count(collection, tables.flags) == 1
  page = person.get('/next?task=edit')
  form = form_with(page, 'response')
  assert form['fields']['response'] == ['It is grean.']
  assert person.send(form) and person.response.status_code == 422  # unchanged
  person.send(form, response='It is green.')
  written = exported(collection, 'demonstrations')
  assert [row['response'] for row in written] == ['Air scatters\nblue light.', 'It is green.']
  (edit,) = exported(collection)
  assert edit['responses'] == ['It is grean.', 'It is green.'] and edit['ranks'] == [2, 1]


def test_every_person_once_and_an_item_to_so_many(tmp_path):
  collection = Collection(tmp_path / 'work', 'people_per_item = 2\nlease_minutes = 0.01\n')
  collection.add(ranking(1, ['x', 'y']))
  first, second, third = (collection.person() for _ in range(3))
  pages = [first.get('/next'), second.get('/next')]
  assert not third.get('/next').cards  # two are at it
  time.sleep(0.7)  # their leases expire
  late = third.get('/next')
  assert late.cards
  rank_all(third, {'x': 1, 'y': 2}, late)
  assert rank_all(first, {'x': 2, 'y': 1}, pages[0]) and first.response.status_code == 200
  page = rank_all(second, {'x': 1, 'y': 2}, pages[1])  # both places are taken now
  assert second.response.status_code == 409 and 'somebody else' in page.text
  assert len(exported(collection)) == 2
  assert not first.get('/next').cards  # nobody judges an item twice


def test_training_qualification_gold_and_completion(tmp_path):
  settings = (
    'people_per_item = 1\ntraining_items = 1\nqualification = 0.6\ngold_every = 2\n'
    'answers_each = 3\ncompletion_code = "C0DE"\ncompletion_url = "https://crowd.example/{code}"\n'
  )
  collection = Collection(tmp_path / 'work', settings)
  collection.add(ranking(0, ['x', 'y'], gold=[1, 2], training=True, explanation='x is right'))
  collection.add(ranking(9, ['p', 'q'], gold=[1, 2]), *(ranking(n, ['x', 'y']) for n in (1, 2, 3)))
  careless, careful = collection.person(), collection.person()
  page = rank_all(careless, {'x': 2, 'y': 1})
  assert 'x is right' in page.text  # explained, whatever was chosen
  assert 'no further items' in careless.get('/next').text
  rank_all(careful, {'x': 1, 'y': 2})
  given = []
  for _ in range(3):
    page = careful.get('/next')
    given.append({card['text'].strip() for card in page.cards} == {'p', 'q'})
    rank_all(careful, {'x': 1, 'y': 2, 'p': 1, 'q': 2}, page)
  assert given == [False, True, False]  # every second one is a gold question
  page = careful.get('/')
  assert 'C0DE' in page.text and 'https://crowd.example/C0DE' in careful.response.text
  assert not any('training' in row['item'] for row in exported(collection))


def test_axes_reasons_minimum_time_and_strength(tmp_path):
  settings = 'people_per_item = 1\naxes = ["helpful", "honest"]\nreason_length = 5\n'
  collection = Collection(tmp_path / 'work', settings)
  collection.add(ranking(1, ['x', 'y']))
  person = collection.person()
  page = person.get('/next')
  form = form_with(page, 'helpful.A')
  x = next(card['letter'] for card in page.cards if card['text'].strip() == 'x')
  y = 'AB'.replace(x, '')
  choice = {f'helpful__{x}': '1', f'helpful__{y}': '2', f'honest__{x}': '2', f'honest__{y}': '1'}
  page = person.send(form, **choice, reason='no', strength='clear')
  assert person.response.status_code == 422 and '5 characters' in page.text
  assert form_with(page, 'helpful.A')['fields']['reason'] == ['no']  # nothing is lost
  person.send(form, **choice, reason='because', strength='clear', **{f'flag__{x}': 'harmful'})
  helpful, honest = exported(collection)
  assert (helpful['ranks'], honest['ranks']) == ([1, 2], [2, 1])
  assert helpful['strength'] == 'clear' and helpful['flags'] == {'0': ['harmful']}
  assert (helpful['domain'], honest['domain']) == ('helpful', 'honest')
  slow = Collection(tmp_path / 'slow', 'people_per_item = 1\nminimum_seconds = 60\n')
  slow.add(ranking(1, ['x', 'y']))
  person = slow.person()
  page = rank_all(person, {'x': 1, 'y': 2})
  assert 'at least 60 seconds' in page.text and exported(slow) == []


def test_a_reviewer_returns_and_amends(collection):
  collection.add(ranking(1, ['x', 'y']), ranking(2, ['v', 'w']))
  person, reviewer = collection.person(), collection.person('reviewer')
  rank_all(person, {'x': 1, 'y': 2})
  page = reviewer.get('/review/1')
  form = form_with(page, 'why')
  assert reviewer.send(form, action='return') and reviewer.response.status_code == 422
  reviewer.send(form, action='return', why='look at *y* again')
  assert exported(collection) == []
  page = person.get('/next')
  assert 'look at *y* again' in page.text
  rank_all(person, {'x': 1, 'y': 2}, page)
  page = reviewer.get('/review/2')
  form = form_with(page, 'why')
  for card in page.cards:
    form['fields'][f'overall.{card["letter"]}'] = ['1' if 'y' in card['text'] else '2']
  reviewer.send(form, action='amend', why='y is right')
  (row,) = exported(collection)
  assert row['ranks'] == [2, 1]
  raw = exported(collection, 'raw')
  assert [(row['answer']['orders']['overall'], row['stands']) for row in raw] == [
    ([1, 2], False),
    ([1, 2], False),
    ([2, 1], True),
  ]
  assert raw[2]['amends'] == 2
  assert reviewer.send(form, action='amend', why='again') and reviewer.response.status_code == 409


def test_a_conversation_is_ranked_turn_by_turn(tmp_path):
  def replies(messages, count):
    if messages[-1]['content'] == 'fail':
      raise RuntimeError('out of memory')
    return [{'text': f'reply {n} to {len(messages)}', 'model': f'm{n}'} for n in range(count)]

  settings = 'people_per_item = 1\nconverse_turns = 2\n'
  collection = Collection(tmp_path / 'work', settings, replies)
  collection.add({'id': 'talk'}, task='converse')
  person = collection.person()
  page = person.get('/next')
  address = str(person.response.url)

  def say(text):
    person.send(form_with(person.get(address), 'message'), message=text)
    for _ in range(100):
      if person.http.get(f'{address}/turn').json()['state'] != 'waiting':
        return person.get(address)
      time.sleep(0.02)
    raise AssertionError('no reply')

  page = say('fail')
  assert 'out of memory' in page.text and not page.cards
  page = say('hello')
  assert 'fail' not in [card['text'] for card in page.cards]
  rank_all(person, {'reply 0 to 1': 2, 'reply 1 to 1': 1}, page)
  page = say('and now?')
  assert 'reply 1 to 1' in page.text and 'reply 0 to 1' not in page.text  # the best one goes on
  rank_all(person, {'reply 0 to 3': 1, 'reply 1 to 3': 2}, page)
  first, second = exported(collection)
  assert first['ranks'] == [2, 1] and first['models'] == ['m0', 'm1']
  assert [message['content'] for message in second['messages']] == [
    'hello',
    'reply 1 to 1',
    'and now?',
  ]
  assert records.parse_record('ranking', second, 'row')
  prompts = exported(collection, 'prompts')
  assert [row['messages'][-1]['content'] for row in prompts] == ['hello', 'and now?']
  assert not person.get('/next').cards


def test_the_lead_sees_invites_blocks_and_deletes(collection):
  collection.add(*(ranking(n, ['x', 'y', 'z']) for n in range(4)))
  lead, person = collection.person('lead'), collection.person(parameters='?PROLIFIC_PID=abc')
  for _ in range(2):
    rank_all(person, {'x': 1, 'y': 2, 'z': 3})
  page = lead.get('/lead')
  assert '2 of 4' in page.text.replace('\n', ' ') and 'Krippendorff' in page.text
  for name in ('progress', 'times', 'reliability', 'confidence'):
    assert lead.http.get(f'/lead/plot/{name}.svg').text.count('<svg') == 1
  form = form_with(page, 'places')
  page = lead.send(form, role='annotator', places='3', days='2')
  link = page.text.split('/join/')[1].split()[0]
  assert Person(collection.app, link).response.status_code == 200
  rows = lead.http.get('/lead/export/rankings.jsonl').text
  assert rows.count('\n') == 2 and 'abc' not in rows  # pseudonyms only
  assert 'abc' not in lead.http.get('/lead/export/raw.jsonl').text
  # the same person of the platform comes back, in another browser
  again = Person(collection.app, collection.link(), '?PROLIFIC_PID=other')
  assert again.get('/me').text != person.get('/me').text
  me = person.get('/me')
  assert person.send(form_with(me, 'sure')) and person.response.status_code == 422
  person.send(form_with(me, 'sure'), sure='yes')
  assert exported(collection) == [] and count(collection, tables.judgements) == 0
  person.get('/next')
  assert person.response.status_code == 403
  fresh = collection.person()
  for _ in range(4):  # the items whose judgements were deleted are asked again
    rank_all(fresh, {'x': 1, 'y': 2, 'z': 3})
  assert len(exported(collection)) == 4
  with collection.store.writing() as connection:
    people.block(connection, 4)


def test_a_personal_link_leads_back(collection):
  link = collection.link(places=1)
  first = Person(collection.app, link)
  name = first.get('/me').text
  assert Person(collection.app, link).get('/me').text == name
  with collection.store.reading() as connection:
    assert len(people.list_people(connection)) == 1


def test_hidden_text_is_shown_and_never_run(collection):
  evil = '<script>alert(1)</script> \x1b[31mred \u202egnp.exe ![i](https://x.example/a.png)'
  collection.add(ranking(1, [evil, '[link](javascript:alert(1)) <img src=x onerror=alert(1)>']))
  person = collection.person()
  person.get('/next')
  body = person.response.text
  assert '<script>alert' not in body and '<img' not in body and 'href="javascript' not in body
  assert '\x1b' not in body and '\u202e' not in body and '␛[31mred' in body
  assert isinstance(Page(body).cards, list)
