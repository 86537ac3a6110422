"""Bad input: refused with a clear answer, and nothing changed."""

import itsdangerous
from people_client import Collection, form_with, Person, ranking
import pytest
import sqlalchemy
from starlette.testclient import TestClient

from rlhf_jax.collect import database, items, people, settings, tables
from rlhf_jax.errors import UserError


@pytest.fixture(scope='module')
def collection(tmp_path_factory):
  made = Collection(tmp_path_factory.mktemp('work'), 'people_per_item = 9\n')
  made.add(ranking(1, [f'r{n}' for n in range(3)]), ranking(2, [f's{n}' for n in range(7)]))
  return made


@pytest.fixture(scope='module')
def person(collection):
  return collection.person()


def state(collection):
  """All that must not change, whatever is sent."""
  with collection.store.reading() as connection:
    return [
      connection.execute(sqlalchemy.select(table)).all()
      for table in (tables.judgements, tables.items, tables.people, tables.invitations)
    ]


@pytest.mark.parametrize(
  'link, words',
  [
    ('nonsense', 'not valid'),
    ('MQ.' + 'A' * 27, 'not valid'),
    ('..%2f..%2fetc%2fpasswd', ''),
    (itsdangerous.URLSafeSerializer('other', salt='invitation').dumps(1), 'not valid'),
  ],
)
def test_forged_invitations(collection, link, words):
  before = state(collection)
  http = TestClient(collection.app, base_url='http://127.0.0.1')
  for answer in (http.get(f'/join/{link}'), http.post(f'/join/{link}', data={'consent': 'yes'})):
    assert answer.status_code in (403, 404) and words in answer.text
  assert state(collection) == before


def test_expired_revoked_and_full_invitations(collection):
  link = collection.link(days=1e-9)
  with pytest.raises(AssertionError, match='expired'):
    Person(collection.app, link)
  link = collection.link(places=1)
  with collection.store.writing() as connection:
    number = people.invite(connection, 'annotator', places=2)
    people.revoke(connection, number)
  with pytest.raises(AssertionError, match='withdrawn'):
    Person(collection.app, people.make_token(collection.store, number))
  link = collection.link(places=2)
  Person(collection.app, link), Person(collection.app, link)
  assert Person(collection.app, link).response.status_code == 403
  answer = TestClient(collection.app, base_url='http://127.0.0.1').post(
    f'/join/{link}', data={'consent': ''}
  )
  assert answer.status_code == 422 and 'consent' in answer.text


def test_what_is_not_signed_in_sees_nothing(collection):
  http = TestClient(collection.app, base_url='http://127.0.0.1')
  for address in ('/next', '/lead', '/review', '/item/x', '/me', '/lead/export/raw.jsonl'):
    assert http.get(address).status_code == 403
  http.cookies.set('collect_session', 'forged.value.here')
  assert http.get('/next').status_code == 403
  assert http.get('/nowhere').status_code == 404
  assert http.get('/static/../app.py').status_code == 404
  assert http.get('/static/%2e%2e/app.py').status_code == 404
  assert http.put('/next').status_code == 405


def test_roles_and_items_of_others(collection, person):
  for address in ('/lead', '/review', '/review/1', '/lead/export/raw.jsonl'):
    assert person.http.get(address).status_code == 403
  person.get('/next')
  address = str(person.response.url)
  other = collection.person()
  before = state(collection)
  form = {'form_token': [other.token], 'overall.A': ['1'], 'overall.B': ['2'], 'overall.C': ['3']}
  for where in (address, address + '/draft'):
    assert other.http.get(where).status_code in (404, 405)
    assert other.http.post(where, data=form).status_code == 404
  assert other.http.post('/item/unknown', data=form).status_code == 404
  assert other.http.post("/item/' OR 1=1 --", data=form).status_code == 404
  assert state(collection) == before


RANKS = [
  ('', 'no rank yet'),
  ('0', 'must be a number from 1 to'),
  ('4', 'must be a number from 1 to'),
  ('-1', 'must be a number from 1 to'),
  ('1.5', 'must be a number from 1 to'),
  ('one', 'must be a number from 1 to'),
  ('١', 'must be a number from 1 to'),  # a digit, but not of ASCII
  ("1'; DROP TABLE judgements; --", 'must be a number from 1 to'),
]


@pytest.mark.parametrize('rank, words', RANKS)
def test_ranks_that_are_none(collection, person, rank, words):
  before = state(collection)
  form = form_with(person.get('/next'), 'overall.A')
  page = person.send(form, overall__A=rank, overall__B='1', overall__C='2')
  assert person.response.status_code == 422 and words in page.text
  assert state(collection) == before


@pytest.mark.parametrize('ranks', ['223', '133', '333', '122x'])
def test_ranks_that_are_no_ordering(collection, person, ranks):
  before = state(collection)
  form = form_with(person.get('/next'), 'overall.A')
  chosen = {f'overall__{letter}': rank for letter, rank in zip('ABC', ranks)}
  page = person.send(form, **chosen, mode='top' if 'x' in ranks else 'full')
  assert person.response.status_code == 422 and 'Rank' in page.text
  assert state(collection) == before


def test_posts_that_no_page_sent(collection, person):
  form = form_with(person.get('/next'), 'overall.A')
  fields = {name: values[0] for name, values in form['fields'].items()}
  fields |= {'overall.A': '1', 'overall.B': '2', 'overall.C': '3'}
  other = collection.person().token
  before = state(collection)
  post = person.http.post
  address = form['action']
  assert post(address, data=fields | {'form_token': ''}).status_code == 403
  assert post(address, data=fields | {'form_token': 'é'}).status_code == 403
  assert post(address, data=fields | {'form_token': other}).status_code == 403
  for headers in (
    {'origin': 'https://evil.example'},
    {'origin': 'null'},
    {'sec-fetch-site': 'cross-site'},
    {'sec-fetch-site': 'same-site'},
  ):
    assert post(address, data=fields, headers=headers).status_code == 403
  assert post(address, json=fields).status_code == 415
  assert post(address, data=fields | {'action': 'destroy'}).status_code == 400
  assert post(address, data=fields | {'reason': 'a\0b'}).status_code == 400
  assert post(address, data=fields | {'reason': 'x' * 10_000_000}).status_code == 413
  assert post(address, data=fields | {'reason': 'x' * 30_000}).status_code == 422
  many = {f'field{number}': '1' for number in range(600)}
  assert post(address, data=fields | many).status_code == 400
  raw = {'content-type': 'application/x-www-form-urlencoded'}
  assert post(address, content=b'form_token=%ff%fe', headers=raw).status_code == 400
  assert post(address, data=fields, headers={'host': 'evil.example'}).status_code == 400
  assert state(collection) == before


def test_headers_of_every_answer(collection, person):
  for address in ('/', '/next', '/nowhere', '/static/collect.js', '/lead', '/guidelines'):
    headers = person.http.get(address).headers
    policy = headers['content-security-policy']
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert 'unsafe' not in policy and 'http' not in policy
    assert headers['x-frame-options'] == 'DENY' and headers['x-content-type-options'] == 'nosniff'
    assert headers['referrer-policy'] == 'same-origin'
  page = person.http.get('/').text
  assert 'https://' not in page and 'style=' not in page  # nothing from outside, nothing inline


def test_a_cookie_is_unreadable_for_scripts(collection):
  http = TestClient(collection.app, base_url='http://127.0.0.1', follow_redirects=False)
  answer = http.post(f'/join/{collection.link()}', data={'consent': 'yes'})
  cookie = answer.headers['set-cookie'].lower()
  assert 'httponly' in cookie and 'samesite=lax' in cookie


def test_too_many_requests(tmp_path):
  collection = Collection(tmp_path / 'work', 'requests_per_minute = 5\n')
  person = collection.person()
  codes = [person.http.get('/guidelines').status_code for _ in range(10)]
  assert 200 in codes and codes[-1] == 429


def test_settings_that_cannot_be_meant():
  for values, words in (
    ({'people_per_itme': 3}, 'did you mean people_per_item'),
    ({'people_per_item': 0}, 'collect.toml: people_per_item: expected a number from 1, got 0'),
    ({'lease_minutes': float('nan')}, 'lease_minutes: expected a number from 0.01, got nan'),
    ({'qualification': 1.5}, 'qualification: expected a number from 0 and at most 1'),
    ({'people_per_item': '3'}, 'expected int'),
    ({'axes': []}, 'different names'),
    ({'axes': ['a b']}, 'names of letters'),
    ({'converse_responses': 12}, 'a number from 2 and at most 9'),
  ):
    with pytest.raises(UserError, match=words):
      settings.parse_settings(values, 'collect.toml')


@pytest.mark.parametrize(
  'line, words',
  [
    ({}, 'messages'),
    ({'messages': []}, 'at least one message'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'responses': ['a']}, '2 to 9 to rank'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'responses': 'ab'}, 'a list of texts'),
    ({'messages': [{'role': 'user', 'content': 'q'}], 'task': 'judge'}, 'expected one of'),
    (ranking(1, 'ab', gold=[1]), 'expected 2 ranks'),
    (ranking(1, 'ab', gold='x'), 'expected ranks'),
    (ranking(1, 'ab', models=['m']), 'expected 2 names'),
    (ranking(1, 'ab', priority='high'), 'expected a number'),
  ],
)
def test_items_that_cannot_be_shown(line, words):
  with pytest.raises(UserError, match=words):
    items.item_from_fields(line, 'file:1', '', 'items')


def test_a_database_of_another_version(tmp_path):
  store = database.open_database(tmp_path)
  with store.writing() as connection:
    connection.execute(sqlalchemy.update(tables.facts).values(value='0'))
  with pytest.raises(UserError, match='schema'):
    database.open_database(tmp_path)
  with pytest.raises(UserError, match='cannot open') as caught:
    database.open_database(tmp_path, 'postgresql+psycopg://me:hidden@127.0.0.1:1/x')
  assert 'hidden' not in str(caught.value)
