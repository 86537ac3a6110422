"""Constitutions: the written principles by which a model critiques and revises its answers, and compares two of them.

A file (.yaml, .yml, .json) of ours holds

  principles:           - id, subject, weight (1 unless said), critique, revision, choose
  critique_examples:    - a text: a whole dialogue with critique and revision, shown before a model's own
  comparison_examples:  - human, better, worse
  thought_examples:     - a text: a whole comparison with a chain of thought; {} stands for a principle

where a principle may have critique and revision only, or choose only. Those that ship lie in constitutions/ and are
named without a path: 'harmlessness'. The published layout of Bai et al. 2022b (arXiv:2212.08073: dicts and lists of
prompts, as in its supplement) and JSON Lines with a `kind` are read too; several files make one constitution.
"""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import yaml

from rlhf_jax.errors import UserError

SHIPPED = Path(__file__).parent / 'constitutions'


@dataclasses.dataclass(frozen=True)
class Principle:
  """One principle: requests for a critique and a revision, the instruction for a comparison ('' = not for that use)."""
  id: str
  critique: str = ''
  revision: str = ''
  choose: str = ''
  weight: float = 1.0
  subject: str = ''


@dataclasses.dataclass(frozen=True)
class Example:
  """Two answers to a question, for few-shot comparisons."""
  human: str
  better: str
  worse: str


@dataclasses.dataclass(frozen=True)
class Constitution:
  """Principles, and examples of how they are used: comparison_examples are Examples, the others texts."""
  principles: tuple = ()
  critique_examples: tuple = ()
  comparison_examples: tuple = ()
  thought_examples: tuple = ()

  def draw(self, use: str, rng: np.random.Generator) -> Principle:
    """A principle at random, by weight, among those for a use, 'critique' or 'choose'.

    Raises:
      UserError: there is none.
    """
    able = [principle for principle in self.principles if getattr(principle, use)]
    if not able:
      raise UserError(f'constitution: no principle says "{use}"')
    weights = np.array([principle.weight for principle in able])
    return able[int(rng.choice(len(able), p=weights / weights.sum()))]


def load_constitution(files) -> Constitution:
  """The constitution of one or several files, or of shipped ones by name.

  Raises:
    UserError: names the file and the place in it.
  """
  parts = [_read(file) for file in ((files,) if isinstance(files, str) else files)]
  whole = Constitution(*(tuple(item for part in parts for item in getattr(part, field.name))
                         for field in dataclasses.fields(Constitution)))
  ids = [principle.id for principle in whole.principles]
  for name in {name for name in ids if ids.count(name) > 1}:
    raise UserError(f'constitution: two principles are called {name!r}')
  return whole


def _read(file) -> Constitution:
  path = Path(file)
  shipped = SHIPPED / f'{file}.yaml'
  path = path if path.is_file() or not shipped.is_file() else shipped
  lines = path.name.removesuffix('.gz').endswith('.jsonl')
  try:
    text = (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8').read()
    if lines:
      return _lines([json.loads(line) for line in text.splitlines() if line.strip()], path)
    said = json.loads(text) if path.suffix == '.json' else yaml.safe_load(text)
  except OSError as error:
    known = ', '.join(sorted(found.stem for found in SHIPPED.glob('*.yaml')))
    raise UserError(f'constitution {file!r}: {error.strerror or error}; shipped ones: {known}') from None
  except (ValueError, yaml.YAMLError) as error:
    raise UserError(f'constitution {path}: {" ".join(str(error).split())}') from None
  if isinstance(said, dict) and 'principles' in said:
    return _ours(said, path)
  return _published(said, path)


def _ours(said, path):
  for key in {*said} - {field.name for field in dataclasses.fields(Constitution)}:
    raise UserError(f'constitution {path}: unknown key {key!r}; expected principles, critique_examples, '
                    'comparison_examples, thought_examples')
  return Constitution(
      tuple(_principle(fields, f'{path}: principle {number}') for number, fields in enumerate(said['principles'], 1)),
      tuple(said.get('critique_examples') or ()),
      tuple(_made(Example, fields, f'{path}: comparison example {number}')
            for number, fields in enumerate(said.get('comparison_examples') or (), 1)),
      tuple(said.get('thought_examples') or ()))


def _principle(fields, where):
  principle = _made(Principle, fields, where)
  if not principle.choose and not (principle.critique and principle.revision):
    raise UserError(f'constitution {where}: expected critique and revision, or choose')
  if not principle.weight > 0:
    raise UserError(f'constitution {where}: weight: expected more than 0, got {principle.weight}')
  return principle


def _made(kind, fields, where):
  known = {field.name: field for field in dataclasses.fields(kind)}
  if not isinstance(fields, dict):
    raise UserError(f'constitution {where}: expected {", ".join(known)}, got {fields!r:.40}')
  for key, value in fields.items():
    if key not in known:
      raise UserError(f'constitution {where}: unknown key {key!r}; expected {", ".join(known)}')
    number = known[key].type is float
    if not isinstance(value, (int, float) if number else str) or isinstance(value, bool):
      raise UserError(f'constitution {where}: {key}: expected a {"number" if number else "text"}, got {value!r:.40}')
  for name, field in known.items():
    if field.default is dataclasses.MISSING and name not in fields:
      raise UserError(f'constitution {where}: needs "{name}"')
  return kind(**{key: value.strip() if isinstance(value, str) else value for key, value in fields.items()})


def _published(said, path):
  """The files of the paper's supplement, told apart by their form."""
  try:
    if isinstance(said, dict):  # critiques and revisions: name → {prompt: [text], edit_request: text}
      return Constitution(tuple(Principle(
          name, critique=_between(item['prompt'][0], 'CritiqueRequest:', 'Critique:'),
          revision=_between(item['edit_request'], 'RevisionRequest:', 'Revision:')) for name, item in said.items()))
    if all(isinstance(item, str) for item in said):
      if any('CritiqueRequest:' in item for item in said):
        return Constitution(critique_examples=tuple(item.strip().removesuffix('Human:').strip() for item in said))
      return Constitution(tuple(Principle(f'{path.stem}-{number}', choose=item.strip().removesuffix('Options:').strip())
                                for number, item in enumerate(said)))
    if said and not any('corrects' in item for item in said):
      return Constitution(thought_examples=tuple(item['prompt'].strip().removesuffix('Human:').strip() for item in said))
    return Constitution(comparison_examples=tuple(_example(item) for item in said))
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise UserError(f'constitution {path}: neither our layout (a key "principles") nor the published one '
                    f'({type(error).__name__}: {error})') from None


def _lines(rows, path):
  """JSON Lines: critique_revision, comparison, critique_fewshot, comparison_fewshot."""
  kind = lambda name: [row for row in rows if row.get('kind') == name]
  try:
    return Constitution(
        (*(Principle(row['id'], critique=row['critique_request'], revision=row['revision_request'])
           for row in kind('critique_revision')),
         *(Principle(row['id'], choose=row['instruction']) for row in kind('comparison'))),
        tuple(row['text'].strip().removesuffix('Human:').strip() for row in kind('critique_fewshot')),
        tuple(_example(row) for row in kind('comparison_fewshot')))
  except (KeyError, IndexError, AttributeError) as error:
    raise UserError(f'constitution {path}: {type(error).__name__}: {error}') from None


def _example(item):
  return Example(_between(item['prompt'], 'Human:', 'Assistant:'), item['corrects'][0].strip(),
                 item['incorrects'][0].strip())


def _between(text, begin, end):
  return text.strip().removeprefix(begin).removesuffix(end).strip()
