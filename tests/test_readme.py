"""The README's test of a train step passes; links in the documentation lead somewhere."""

from pathlib import Path
import re

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / 'README.md'
PAGES = [
  README,
  ROOT / 'CONTRIBUTING.md',
  ROOT / 'CHANGELOG.md',
  *sorted(ROOT.glob('docs/**/*.md')),
]


def read_anchors(path):
  """The anchors that GitHub makes of a page's headings."""
  anchors = set()
  for heading in re.findall(r'^#+ (.*)', path.read_text(), re.MULTILINE):
    kept = re.sub(r'[^\w\- ]', '', heading.lower())
    anchors.add(kept.replace(' ', '-'))
  return anchors


def test_the_example_of_a_test_passes():
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  (example,) = [block for block in blocks if 'def test_' in block]
  names = {}
  exec(compile(example, README, 'exec'), names)
  tests = [name for name in names if name.startswith('test_')]
  assert tests
  for name in tests:
    names[name]()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if target.startswith('http'):
      continue
    file, _, anchor = target.partition('#')
    path = (page.parent / file).resolve() if file else page
    assert path.exists(), target
    if anchor:
      assert anchor in read_anchors(path), target
