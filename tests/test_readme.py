"""The README's test of a train step is one that passes."""

from pathlib import Path
import re

README = Path(__file__).resolve().parents[1] / 'README.md'


def test_the_example_of_a_test_passes():
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  example, = [block for block in blocks if 'def test_' in block]
  names = {}
  exec(compile(example, README, 'exec'), names)
  tests = [name for name in names if name.startswith('test_')]
  assert tests
  for name in tests:
    names[name]()
