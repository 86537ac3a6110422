"""The report in a real browser: three widths, light, dark and on paper.

Needs Debian's chromium, and the extra `browser`. `AXE` may name a copy of axe.min.js (npm:
axe-core), with which every page is checked. `RUN` may name the workdir of a finished run, which is
looked at beside the made ones.
"""

import os
from pathlib import Path
import re
import shutil
import time

import pytest

from rlhf_jax.report import page as pages
from rlhf_jax.report import run_files

pytestmark = pytest.mark.slow
SIZES = ((390, 844), (768, 1024), (1280, 900))


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip('playwright.sync_api')
  program = shutil.which('chromium')
  if program is None:
    pytest.skip("needs Debian's chromium")
  with playwright.sync_playwright() as engine:
    yield engine.chromium.launch(executable_path=program, args=['--no-sandbox'])


@pytest.fixture
def written(make_run, tmp_path):
  """Name → the file of a page."""
  finished, killed = make_run('finished'), make_run('killed', finished=False)
  other = make_run('other', seed=1)
  runs = [run_files.read_run(path) for path in (finished, other, killed)]
  texts = {
    'finished': pages.render_run(runs[0]),
    'killed': pages.render_run(runs[2]),
    'followed': pages.render_run(runs[2], is_followed=True),
    'several': pages.render_comparison(runs),
  }
  if 'RUN' in os.environ:
    texts['run'] = pages.render_run(run_files.read_run(os.environ['RUN']))
  files = {}
  for name, text in texts.items():
    files[name] = tmp_path / f'{name}.html'
    files[name].write_text(text)
    assert len(text.encode()) <= 2 * 2**20
  return files


def open_page(browser, path, problems, **options):
  page = browser.new_context(**options).new_page()
  page.on('pageerror', lambda error: problems.append(str(error)))
  page.on('console', lambda line: line.type == 'error' and problems.append(line.text))
  page.on(
    'request',
    lambda asked: asked.url.startswith(('file:', 'data:')) or problems.append(asked.url),
  )
  began = time.monotonic()
  page.goto(f'file://{path}')
  if time.monotonic() - began > 1:
    problems.append('opened in more than a second')
  return page


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_pages(browser, written, tmp_path, scheme, size):
  viewport = {'width': size[0], 'height': size[1]}
  axe = os.environ.get('AXE')
  for name, path in written.items():
    problems = []
    page = open_page(
      browser, path, problems, viewport=viewport, color_scheme=scheme, bypass_csp=True
    )
    page.screenshot(path=tmp_path / f'{name}-{size[0]}-{scheme}.png', full_page=True)
    assert page.evaluate('document.documentElement.scrollWidth') <= size[0], name
    if axe:
      page.evaluate(Path(axe).read_text())
      found = page.evaluate('axe.run()')['violations']
      serious = [one for one in found if one['impact'] in ('serious', 'critical')]
      assert [(one['id'], [node['html'] for node in one['nodes']]) for one in serious] == []
    assert problems == [], name
    page.context.close()


def test_what_can_be_clicked(browser, written):
  problems = []
  page = open_page(browser, written['finished'], problems)
  shown = 'article.case:visible'
  cases = page.locator('#samples').locator(shown)
  assert cases.count() == 3
  page.click('button[data-show=worse]')
  assert (
    cases.count() == 1 and page.get_attribute('button[data-show=worse]', 'aria-pressed') == 'true'
  )
  strength = page.locator('#tokens .m:visible')
  assert strength.first.inner_text().endswith('-1.00')
  page.focus('#tokens button >> nth=1')
  page.keyboard.press('Enter')
  assert strength.first.inner_text().endswith('+1.00')  # its KL: −1 − (−2)
  page.locator('#curves svg').first.hover()
  assert ' at step ' in page.locator('#curves .reading').first.inner_text()
  assert problems == []


def test_on_paper(browser, written, tmp_path):
  """All is open on paper, and nothing is cut at its edge."""
  problems = []
  page = open_page(browser, written['finished'], problems, viewport={'width': 720, 'height': 1000})
  page.emulate_media(media='print')
  for region in page.query_selector_all('.scroll'):
    assert region.evaluate('part => part.scrollWidth <= part.clientWidth + 1'), region.inner_text()
  path = tmp_path / 'paper.pdf'
  page.pdf(path=path, format='A4')
  assert len(re.findall(rb'/Type\s*/Page\b', path.read_bytes())) >= 2 and problems == []
