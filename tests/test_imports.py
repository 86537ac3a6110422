"""The layers of the house: imports run downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # from the bottom up; a room imports only from those of the lines above its own
  ('errors', 'files', 'plain_text', 'random_keys', 'text_table'),
  ('options', 'storage'),
  ('named_functions', 'json_lines', 'hub', 'fingerprints', 'file_lock'),
  ('types',),
  ('objectives',),
  ('models', 'data', 'runtime'),
  ('interop',),
  ('generation',),
  ('evaluation',),
  ('report',),
  ('feedback',),
  ('rewards',),
  ('collect',),
  ('planning',),
  ('stages',),
  ('experiment',),
  ('testing',),
  ('commands',),
  ('__main__', 'chat', 'generate', 'score', 'plan', 'compare', 'evaluate'),
)
STANDARD = {'collections', 'dataclasses', 'functools', 'math', 'typing'}
BELOW = {}
for number, rooms in enumerate(LAYERS):
  for room in rooms:
    BELOW[room] = [other for layer in LAYERS[:number] for other in layer]


def imported(path):
  """(line, dotted name) of everything a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}:{node.lineno}: a relative import'
      yield from ((node.lineno, f'{node.module}.{alias.name}') for alias in node.names)


def files(folder):
  return sorted(
    path
    for path in (ROOT / folder).rglob('*.py')
    if path.name != '__init__.py' or path.stat().st_size
  )


@pytest.mark.parametrize('path', files('rlhf_jax'), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
  part = path.relative_to(ROOT / 'rlhf_jax').parts[0].removesuffix('.py')
  if path.name == '__main__.py':
    part = '__main__'  # the entry of a package stands on the roof
  for line, name in imported(path):
    package, *rest = name.split('.')
    if package == 'rlhf_jax' and rest:  # the package itself imports nothing
      assert rest[0] in (part, *BELOW[part]), f'{path}:{line}: {part} imports {name}'
    if name.startswith('flax.nnx'):
      assert part == 'models', f'{path}:{line}: flax.nnx outside models'
    if part == 'objectives' and package != 'rlhf_jax':
      message = f'{path}:{line}: a formula needs jax and chex alone, not {name}'
      assert package in {'jax', 'chex', *STANDARD}, message


@pytest.mark.parametrize('path', files('experiments'), ids=lambda path: path.name)
def test_experiments_need_only_their_config_and_each_other(path):
  neighbours = {other.stem for other in files('experiments')}
  assert {name.split('.')[0] for _, name in imported(path)} <= {
    'ml_collections',
    *STANDARD,
    *neighbours,
  }
