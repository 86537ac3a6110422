"""A real browser: every task by mouse, touch and keyboard alone; three widths, light and dark.

Needs Debian's chromium, and the extra `browser`. `AXE` may name a copy of axe.min.js (npm:
axe-core), with which every page is checked.
"""

import os
from pathlib import Path
import shutil

from people_client import ranking
import pytest
from server_process import command, Server, write_lines

from rlhf_jax.collect import database, export

pytestmark = pytest.mark.slow
EACH = 20  # items of each task
SIZES = ((390, 844), (768, 1024), (1280, 900))


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip('playwright.sync_api')
  program = shutil.which('chromium')
  if program is None:
    pytest.skip("needs Debian's chromium")
  with playwright.sync_playwright() as engine:
    yield engine.chromium.launch(executable_path=program, args=['--no-sandbox'])


class Echo:
  """A server of the OpenAI protocol at loopback that answers with what it was asked."""

  def __init__(self):
    import http.server
    import json
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        text = f'{len(asked["messages"])}: {asked["messages"][-1]["content"]}'
        body = json.dumps({'choices': [{'message': {'content': text}}]}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def log_message(self, *words):
        pass

    self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
    threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  folder = tmp_path_factory.mktemp('browser')
  workdir = folder / 'work'
  workdir.mkdir()
  (workdir / 'collect.toml').write_text(
    'people_per_item = 90\nconverse_turns = 1\nrequests_per_minute = 9999\n'
  )
  messages = [{'role': 'user', 'content': 'How do I keep slugs off my lettuce?'}]
  tasks = {
    'rank': [ranking(n, ['**x**', 'y', 'z', 'w'][: 2 + n % 3]) for n in range(EACH)],
    'demonstrate': [{'id': f'd{n}', 'messages': messages} for n in range(EACH)],
    'edit': [{'id': f'e{n}', 'messages': messages, 'response': f'Salt {n}.'} for n in range(EACH)],
    'converse': [{'id': f'c{n}'} for n in range(EACH)],
  }
  for task, lines in tasks.items():
    path = write_lines(folder / f'{task}.jsonl', lines)
    command(workdir, 'add', f'--input={path}', f'--task={task}')
  echo = Echo()
  server = Server(workdir, f'--endpoint={echo.url}', '--models=echo')
  yield server
  server.stop()
  echo.server.shutdown()


class Visitor:
  """A person with a browser; notes errors, requests to elsewhere, and axe's findings."""

  def __init__(self, browser, site, link=None, **options):
    self.site = site
    self.context = browser.new_context(**options)
    self.page = self.context.new_page()
    self.problems = []
    self.page.on('pageerror', self._note)
    self.page.on('console', lambda line: line.type == 'error' and self._note(line.text))
    self.page.on('request', self._check_request)
    link = link or command(site.workdir, 'invite', f'--public_url={site.base}').strip()
    self.page.goto(link)
    self.page.check('[name=consent]')
    self.page.click('button.primary')

  def _note(self, problem):
    self.problems.append(str(problem))

  def _check_request(self, request):
    if not request.url.startswith(self.site.base):
      self._note(f'outside: {request.url}')

  def order(self):
    """Texts of the cards from top to bottom."""
    return [part.inner_text().strip() for part in self.page.query_selector_all('.response')]


def rank_by_drag(visitor):
  page = visitor.page
  handles = page.query_selector_all('.handle')
  handles[-1].scroll_into_view_if_needed()
  last, first = handles[-1].bounding_box(), handles[0].bounding_box()
  page.mouse.move(last['x'] + 8, last['y'] + 8)
  page.mouse.down()
  page.mouse.move(first['x'] + 8, first['y'] - 10, steps=12)
  page.mouse.up()
  page.wait_for_function('document.querySelectorAll(".ranks input:checked").length > 1')


def rank_by_touch(visitor):
  page = visitor.page
  for number, letter in enumerate(letters(page), 1):
    page.locator(f'.card[data-letter={letter}] .chip', has_text=str(number)).first.tap()


def rank_by_keys(visitor):
  page = visitor.page
  for number, letter in enumerate(letters(page), 1):
    for _ in range(60):  # Tab alone reaches every card
      if page.evaluate('document.activeElement.dataset.letter') == letter:
        break
      page.keyboard.press('Tab')
    page.keyboard.press(str(number))


def letters(page):
  return [card.get_attribute('data-letter') for card in page.query_selector_all('.card')]


def send(visitor, how):
  before = visitor.page.url
  if how == 'keyboard':
    visitor.page.keyboard.press('Control+Enter')
  else:
    button = visitor.page.locator('form.answer button.primary').first
    button.tap() if how == 'touch' else button.click()
  visitor.page.wait_for_url(lambda url: url != before)


RANK = {'mouse': rank_by_drag, 'touch': rank_by_touch, 'keyboard': rank_by_keys}


@pytest.mark.parametrize('how', RANK)
def test_every_task(browser, site, how):
  size = {'width': 390, 'height': 844} if how == 'touch' else {'width': 1280, 'height': 900}
  visitor = Visitor(browser, site, viewport=size, has_touch=how == 'touch')
  page = visitor.page
  page.goto(f'{site.base}/me')
  pseudonym = page.inner_text('code')
  shown = []
  for _ in range(EACH):
    page.goto(f'{site.base}/next?task=rank')
    RANK[how](visitor)
    shown.append(visitor.order())
    send(visitor, how)
    assert 'Saved' in page.inner_text('main')
  for task, text in (('demonstrate', 'Beer traps.'), ('edit', 'Use a board.')):
    for number in range(EACH):
      page.goto(f'{site.base}/next?task={task}')
      if how == 'keyboard':
        page.focus('[name=response]')
        page.keyboard.press('Control+A')
        page.keyboard.type(f'{text} {number}')
      else:
        page.fill('[name=response]', f'{text} {number}')
      send(visitor, how)
  for number in range(EACH):
    page.goto(f'{site.base}/next?task=converse')
    page.fill('[name=message]', f'hello {number}')
    page.locator('form#say button.primary').click()
    page.wait_for_selector('.card')
    RANK[how](visitor)
    send(visitor, how)
  store = database.open_database(site.workdir)
  with store.reading() as connection:
    rows = [row for row in export.export_rankings(connection) if row['source'] == pseudonym]
    written = export.export_demonstrations(connection)
  ranked = [row for row in rows if row['id'].startswith('q')]
  assert len(ranked) == EACH and len(rows) == 3 * EACH
  for row, order in zip(ranked, shown):  # saved = shown
    by_rank = sorted(zip(row['ranks'], [text.strip('*') for text in row['responses']]))
    assert [text for _, text in by_rank] == order
  assert sum(row['source'] == pseudonym for row in written) == 2 * EACH
  assert visitor.problems == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', SIZES)
def test_pages(browser, site, size, scheme, tmp_path):
  viewport = {'width': size[0], 'height': size[1]}
  lead = Visitor(browser, site, site.lead, viewport=viewport, color_scheme=scheme, bypass_csp=True)
  page = lead.page
  axe = os.environ.get('AXE')
  pages = ['/', '/guidelines', '/me', '/review', '/lead']
  pages += [f'/next?task={task}' for task in ('rank', 'demonstrate', 'edit', 'converse')]
  for address in pages:
    page.goto(site.base + address)
    name = address.strip('/').replace('?task=', '-') or 'home'
    page.screenshot(path=tmp_path / f'{name}-{size[0]}-{scheme}.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= size[0], address
    if axe:
      page.evaluate(Path(axe).read_text())
      found = page.evaluate('axe.run()')['violations']
      assert [one for one in found if one['impact'] in ('serious', 'critical')] == [], address
  assert lead.problems == []
