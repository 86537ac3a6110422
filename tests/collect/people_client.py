"""People in tests: they read pages and send the pages' own forms."""

import html.parser

from starlette.testclient import TestClient

from rlhf_jax.collect import app, database, items, people
from rlhf_jax.collect.conversation import Replier
from rlhf_jax.collect.site import open_site

EMPTY = ('input', 'meta', 'link', 'img', 'br', 'hr')


class Page(html.parser.HTMLParser):
  """What a browser sees of a page: forms with their fields, and cards with their texts."""

  def __init__(self, text):
    super().__init__()
    self.forms, self.cards, self.text = [], [], ''
    self._form = self._card = self._area = None
    self._stack = []
    self.feed(text)

  def handle_starttag(self, tag, pairs):
    values = dict(pairs)
    classes = (values.get('class') or '').split()
    if tag not in EMPTY:
      self._stack.append((tag, classes))
    if tag == 'form':
      self._form = {'action': values.get('action'), 'fields': {}, 'choices': {}}
      self.forms.append(self._form)
    if 'card' in classes:
      self._card = {'letter': values['data-letter'], 'text': ''}
      self.cards.append(self._card)
    if self._form is None:
      return
    name = values.get('name')
    if tag == 'textarea':
      self._area = name
      self._form['fields'][name] = ['']
    elif tag == 'input' and values.get('type') in ('radio', 'checkbox'):
      self._form['choices'].setdefault(name, []).append(values['value'])
      if 'checked' in values:
        self._form['fields'].setdefault(name, []).append(values['value'])
    elif tag == 'input' and name:
      self._form['fields'][name] = [values.get('value', '')]

  def handle_endtag(self, tag):
    while self._stack and tag not in EMPTY:
      if self._stack.pop()[0] == tag:
        break
    if tag == 'form':
      self._form = None
    if tag == 'textarea':
      self._area = None
    if tag == 'li':
      self._card = None

  def handle_data(self, data):
    self.text += data
    if self._area:
      # HTML drops the first newline of a textarea
      self._form['fields'][self._area][0] += data.removeprefix('\n')
    if self._card is not None and any('response' in classes for _, classes in self._stack):
      self._card['text'] += data


def form_with(page, field):
  """The first form that has a field or a choice."""
  for form in page.forms:
    if field in form['fields'] or field in form['choices']:
      return form
  raise AssertionError(f'no form with {field}: {page.text.strip()[-300:]}')


class Person:
  """Somebody with a browser without JavaScript."""

  def __init__(self, application, link, parameters=''):
    self.http = TestClient(application, base_url='http://127.0.0.1', follow_redirects=True)
    page = self.get(f'/join/{link}{parameters}')
    self.joined = self.send(form_with(page, 'consent'), consent='yes')

  def get(self, address):
    self.response = self.http.get(address)
    return Page(self.response.text)

  def send(self, form, to=None, **changes):
    fields = {name: values for name, values in form['fields'].items()}
    for name, value in changes.items():
      fields[name.replace('__', '.')] = value
    self.response = self.http.post(to or form['action'], data=fields)
    return Page(self.response.text)

  @property
  def token(self):
    return self.get('/me').forms[0]['fields']['form_token'][0]


class Collection:
  """A workdir with its application."""

  def __init__(self, workdir, settings='', replies=None, url=''):
    workdir.mkdir(exist_ok=True)
    (workdir / 'collect.toml').write_text(settings)
    self.workdir = workdir
    self.store = database.open_database(workdir, url)
    self.replier = None if replies is None else Replier(self.store, replies)
    self.site = open_site(workdir, self.store, replier=self.replier)
    self.app = app.build_app(self.site)

  def link(self, role='annotator', places=100, days=1.0):
    with self.store.writing() as connection:
      return people.make_token(self.store, people.invite(connection, role, places, days))

  def person(self, role='annotator', parameters=''):
    return Person(self.app, self.link(role), parameters)

  def add(self, *lines, task='', batch='items'):
    new = [
      items.item_from_fields(line, f'line {n}', task, batch) for n, line in enumerate(lines, 1)
    ]
    with self.store.writing() as connection:
      return items.add_items(connection, new, self.site.settings.people_per_item)


def ranking(number, texts, **more):
  """Fields of an item to rank."""
  messages = [{'role': 'user', 'content': f'question {number}'}]
  return {'id': f'q{number}', 'messages': messages, 'responses': list(texts), **more}
