"""Pins the versions of all that rlhf_jax needs, and checks that the pins are complete.

  python scripts/constraints.py --update     # writes constraints.txt from this environment
  python scripts/constraints.py              # checks it: exit code 1 if a pin is missing or unfit

`pip install -c constraints.txt .` then installs what the tests have run with. The pins are those of
one version of Python, and pip ignores them on others.
"""

import argparse
from collections.abc import Iterator
import importlib.metadata
from pathlib import Path
import sys

from packaging import requirements
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / 'constraints.txt'
PACKAGE = 'rlhf_jax'
EXTRAS = ('test',)
HEADER = """\
# What the tests run with, written by: python scripts/constraints.py --update
# pip install -c constraints.txt .
"""


def main() -> int:
  """Writes or checks the file; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--update', action='store_true', help='write constraints.txt')
  options = parser.parse_args()
  if options.update:
    FILE.write_text(HEADER + ''.join(f'{line}\n' for line in pins()), encoding='utf-8')
    return 0
  problems = find_problems(FILE.read_text(encoding='utf-8'))
  for problem in problems:
    print(f'{FILE.name}: {problem}; run: python scripts/constraints.py --update', file=sys.stderr)
  return int(bool(problems))


def pins() -> list[str]:
  """Returns a pin for each package that is needed, with all that it needs in turn."""
  python = f'{sys.version_info.major}.{sys.version_info.minor}'
  lines = []
  for name in sorted(find_needed()):
    version = importlib.metadata.version(name).partition('+')[0]  # without a local label
    lines.append(f'{name}=={version} ; python_version == "{python}"')
  return lines


def find_needed() -> set[str]:
  """Returns the names of all packages that this package and its tests need, in any depth."""
  needed: set[str] = set()
  waiting = [(PACKAGE, EXTRAS)]
  seen = set()
  while waiting:
    name, extras = waiting.pop()
    if (name, extras) in seen:
      continue
    seen.add((name, extras))
    for requirement in list_requirements(name, extras):
      found = canonicalize_name(requirement.name)
      try:
        importlib.metadata.version(found)
      except importlib.metadata.PackageNotFoundError:
        continue  # for another platform, or left out on purpose
      needed.add(found)
      waiting.append((found, tuple(sorted(requirement.extras))))
  return needed - {canonicalize_name(PACKAGE)}


def list_requirements(name: str, extras: tuple[str, ...]) -> Iterator[requirements.Requirement]:
  """Yields what a package needs in this environment, with some of its extras."""
  for text in importlib.metadata.requires(name) or ():
    requirement = requirements.Requirement(text)
    environments = [{'extra': extra} for extra in ('', *extras)]
    marker = requirement.marker
    if marker is None or any(marker.evaluate(environment) for environment in environments):
      yield requirement


def find_problems(text: str) -> list[str]:
  """Returns what is wrong with the pins: those that are missing, and those that do not fit."""
  pinned = {}
  for line in text.splitlines():
    if line and not line.startswith('#'):
      requirement = requirements.Requirement(line)
      pinned[canonicalize_name(requirement.name)] = requirement
  problems = []
  for requirement in list_requirements(PACKAGE, EXTRAS):
    name = canonicalize_name(requirement.name)
    pin = pinned.get(name)
    if pin is None:
      problems.append(f'no pin of {name}')
      continue
    version = next(iter(pin.specifier)).version
    if not requirement.specifier.contains(version, prereleases=True):
      problems.append(f'{name}=={version} does not fit {requirement.specifier} of setup.py')
  unpinned = sorted(find_needed() - {*pinned})
  if unpinned:
    problems.append(f'no pins of {", ".join(unpinned)}')
  return problems


if __name__ == '__main__':
  sys.exit(main())
