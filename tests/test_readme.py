"""What the README shows runs as it stands there; links in the documentation lead somewhere."""

import json
from pathlib import Path
import re
import shlex

import pytest

from rlhf_jax.commands import train

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


def python_block(part):
  """The only Python example of the README in which something stands."""
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  (block,) = [block for block in blocks if part in block]
  return block


def test_your_own_experiment_runs_on_your_own_data(tmp_path, monkeypatch, capsys):
  (tmp_path / 'my_experiment.py').write_text(python_block('config.stages'))
  (tmp_path / 'my_rewards.py').write_text(python_block('def brief'))
  (tmp_path / 'my_data').mkdir()
  texts = [{'text': f'The key number {number} lies on the shelf.' * 3} for number in range(24)]
  asked = [f'Where is key {number}?' for number in range(24)]
  prompts = [{'prompt': text, 'completion': 'On the shelf.'} for text in asked[:12]]
  answer = {'role': 'assistant', 'content': 'There.'}
  chats = [{'messages': [{'role': 'user', 'content': text}, answer]} for text in asked[12:]]
  for split in ('train', 'validation'):
    for name, rows in (('texts', texts), ('chats', prompts + chats)):
      lines = ''.join(json.dumps(row) + '\n' for row in rows)
      (tmp_path / 'my_data' / f'{name}.{split}.jsonl').write_text(lines)
  monkeypatch.chdir(tmp_path)
  commands = re.findall(r'^python -m rlhf_jax (--config=my_exp[^#\n]*)', README.read_text(), re.M)
  tiny, show = (next(c for c in commands if part in c) for part in (':tiny', '--show'))
  assert train.main(shlex.split(show)) == 0
  shown = json.loads(capsys.readouterr().out)
  for name in (*shown['stages'], 'tokenizer', 'evaluation'):
    assert shown[name]['data']['path'][0].startswith('my_data/'), name
  assert train.main(shlex.split(tiny)) == 0
  results = json.loads((tmp_path / 'runs' / 'mine_tiny' / 'results.json').read_text())
  assert {'base', 'sft', 'ppo'} <= {*results['models']}
  said = capsys.readouterr().err
  assert 'read as prompts with the field completion: 12' in said
  assert 'read as conversations that end with the response: 12' in said


def test_the_example_of_a_test_passes():
  example = python_block('def test_')
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
