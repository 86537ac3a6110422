"""Constitutions: written principles by which a model critiques, revises and compares.

A file in the project's own layout (.yaml, .yml or .json) has these keys, each a
list:

  principles            items with id, subject, weight (1 by default), critique, revision, choose
  critique_examples     texts: a dialogue with its critique and revision, which is shown to the
                        model as a few-shot example
  comparison_examples   items with human, better, worse
  thought_examples      texts: a comparison with a chain of thought; {} stands for a principle

A principle may have only critique and revision, or only choose. The
constitutions that come with the package are in constitutions/ and are named
without a path, such as 'harmlessness'.

Two other layouts can be read too: that of the supplement to Bai et al. 2022b
(arXiv:2212.08073), dicts and lists of prompts; and JSON Lines whose rows have a
`kind`. Several files can be joined into one constitution.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeVar
import zlib

import numpy as np
import yaml

from rlhf_jax import json_lines, plain_text
from rlhf_jax.errors import UserError
from rlhf_jax.files import open_text

_LONGEST = 4_000_000  # characters of a file
SHIPPED = Path(__file__).parent / 'constitutions'


@dataclasses.dataclass(frozen=True)
class Principle:
  """One principle; it is not used for what it has no text for (critique or choose is '')."""

  id: str
  critique: str = ''  # asks for a critique of a response
  revision: str = ''  # asks for a response without the faults that the critique names
  choose: str = ''  # the instruction for a comparison
  weight: float = 1.0  # it is drawn with a probability proportional to this
  subject: str = ''  # what it is about; for human readers only


@dataclasses.dataclass(frozen=True)
class Example:
  """A few-shot example of a comparison: a better and a worse response to one question."""

  human: str
  better: str
  worse: str


_Record = TypeVar('_Record', Principle, Example)


@dataclasses.dataclass(frozen=True)
class Constitution:
  """Principles, and few-shot examples of their use."""

  principles: tuple[Principle, ...] = ()
  critique_examples: tuple[str, ...] = ()
  comparison_examples: tuple[Example, ...] = ()
  thought_examples: tuple[str, ...] = ()

  def draw(self, use: str, rng: np.random.Generator) -> Principle:
    """Draws a principle at random, with probabilities proportional to the weights.

    Args:
      use: 'critique' or 'choose'; principles without a text for it are left
        out.
      rng: the source of randomness.

    Raises:
      UserError: no principle has this use.
    """
    usable = [principle for principle in self.principles if getattr(principle, use)]
    if not usable:
      raise UserError(f'constitution: no principle has a text for "{use}"')
    weights = np.array([principle.weight for principle in usable])
    index = rng.choice(len(usable), p=weights / weights.sum())
    return usable[int(index)]


def load_constitution(files: str | Sequence[str]) -> Constitution:
  """Loads one constitution from one or several files.

  Args:
    files: paths, or names of constitutions that come with the package.

  Raises:
    UserError: a file cannot be read or has a mistake (the message names the
      file and the principle), or two principles have the same id.
  """
  if isinstance(files, str):
    files = (files,)
  constitution = _join([_read_file(file) for file in files])
  ids = [principle.id for principle in constitution.principles]
  for name in ids:
    if ids.count(name) > 1:
      raise UserError(f'constitution: two principles are called {name!r}')
  return constitution


def _join(parts: Sequence[Constitution]) -> Constitution:
  """Joins several constitutions into one."""
  joined: dict[str, tuple] = {}
  for field in dataclasses.fields(Constitution):
    joined[field.name] = ()
    for part in parts:
      joined[field.name] += getattr(part, field.name)
  return Constitution(**joined)


def _read_file(file: str) -> Constitution:
  """Reads a file in any of the three layouts."""
  path = Path(file)
  shipped = SHIPPED / f'{file}.yaml'
  if not path.is_file() and shipped.is_file():
    path = shipped
  is_json_lines = path.name.removesuffix('.gz').endswith('.jsonl')
  try:
    if is_json_lines and path.is_file():
      return _parse_json_lines([row for _, row in json_lines.read_values(path)], path)
    with open_text(path) as opened:
      text = opened.read(_LONGEST + 1)
    if len(text) > _LONGEST:
      raise UserError(f'constitution {path}: expected at most {_LONGEST:,} characters')
    content = json.loads(text) if path.suffix == '.json' else _parse_yaml(text)
  except OSError as error:
    known = ', '.join(sorted(other.stem for other in SHIPPED.glob('*.yaml')))
    reason = error.strerror or error
    raise UserError(f'constitution {file!r}: {reason}; shipped ones: {known}') from None
  except UserError:  # a ValueError too, and already complete
    raise
  except (ValueError, RecursionError, EOFError, zlib.error, yaml.YAMLError) as error:
    details = plain_text.one_line(str(error), 300)
    raise UserError(f'constitution {path}: {details}') from None
  json_lines.check_depth(content, f'constitution {path}')
  if not isinstance(content, (dict, list)):
    kind = type(content).__name__
    raise UserError(f'constitution {path}: expected a key "principles", got {kind}')
  if isinstance(content, dict) and 'principles' in content:
    return _parse_own_layout(content, path)
  return _parse_published_layout(content, path)


class _PlainLoader(yaml.SafeLoader):
  """Reads YAML without aliases: a few lines of them can stand for billions of items."""

  def compose_node(self, parent: Any, index: Any) -> Any:
    """Composes the next node."""
    if self.check_event(yaml.AliasEvent):
      mark = self.peek_event().start_mark
      raise yaml.YAMLError(f'line {mark.line + 1}: aliases (*name) are not read')
    return super().compose_node(parent, index)


def _parse_yaml(text: str) -> Any:
  """Parses YAML of plain values."""
  return yaml.load(text, _PlainLoader)


# --- the project's own layout ---


def _parse_own_layout(content: Mapping[str, Any], path: Path) -> Constitution:
  """Parses a file with a key 'principles'."""
  known = [field.name for field in dataclasses.fields(Constitution)]
  for key in content:
    if key not in known:
      expected = ', '.join(known)
      raise UserError(f'constitution {path}: unknown key {key!r}; expected {expected}')
  principles = []
  for number, fields in enumerate(_list_of(content, 'principles', path), start=1):
    principles.append(_parse_principle(fields, f'{path}: principle {number}'))
  examples = []
  for number, fields in enumerate(_list_of(content, 'comparison_examples', path), start=1):
    where = f'{path}: comparison example {number}'
    examples.append(_parse_record(Example, fields, where))
  return Constitution(
    principles=tuple(principles),
    critique_examples=_texts_of(content, 'critique_examples', path),
    comparison_examples=tuple(examples),
    thought_examples=_texts_of(content, 'thought_examples', path),
  )


def _list_of(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
  """Returns a list of a file; an empty one where the key is missing or null."""
  value = content.get(key)
  if value is None and key != 'principles':
    return []
  if not isinstance(value, list):
    raise UserError(f'constitution {path}: {key}: expected a list, got {value!r:.40}')
  return value


def _texts_of(content: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
  """Returns a list of texts of a file."""
  for number, text in enumerate(_list_of(content, key, path), start=1):
    if not isinstance(text, str):
      raise UserError(f'constitution {path}: {key} {number}: expected a text, got {text!r:.40}')
  return tuple(_list_of(content, key, path))


def _parse_principle(fields: Any, where: str) -> Principle:
  """Parses one principle; `where` names it in messages."""
  principle = _parse_record(Principle, fields, where)
  can_revise = principle.critique and principle.revision
  if not principle.choose and not can_revise:
    raise UserError(f'constitution {where}: expected critique and revision, or choose')
  if not 0 < principle.weight < math.inf:  # NaN is refused too
    weight = principle.weight
    raise UserError(f'constitution {where}: weight: expected more than 0, got {weight}')
  return principle


def _parse_record(record_class: type[_Record], fields: Any, where: str) -> _Record:
  """Makes a dataclass instance from a dict, and checks the dict's keys and value types."""
  known = {field.name: field for field in dataclasses.fields(record_class)}
  names = ', '.join(known)
  if not isinstance(fields, dict):
    raise UserError(f'constitution {where}: expected {names}, got {fields!r:.40}')
  values = {}
  for key, value in fields.items():
    if key not in known:
      raise UserError(f'constitution {where}: unknown key {key!r}; expected {names}')
    values[key] = _check_value(value, known[key].type is float, f'{where}: {key}')
  for name, field in known.items():
    if field.default is dataclasses.MISSING and name not in values:
      raise UserError(f'constitution {where}: needs "{name}"')
  return record_class(**values)


def _check_value(value: Any, is_number: bool, where: str) -> Any:
  """Returns a value after checking its type; a text is stripped of surrounding whitespace."""
  expected: tuple[type, ...] = (int, float) if is_number else (str,)
  if not isinstance(value, expected) or isinstance(value, bool):
    kind = 'number' if is_number else 'text'
    raise UserError(f'constitution {where}: expected a {kind}, got {value!r:.40}')
  return value.strip() if isinstance(value, str) else value


# --- the other layouts ---


def _parse_published_layout(content: Any, path: Path) -> Constitution:
  """Parses a file of the paper's supplement; its kind is recognised by its structure."""
  try:
    if isinstance(content, dict):
      return _parse_critiques(content)
    if all(isinstance(item, str) for item in content):
      return _parse_texts(content, path.stem)
    if content and not any('corrects' in item for item in content):
      thoughts = [_strip_turn(item['prompt']) for item in content]
      return Constitution(thought_examples=tuple(thoughts))
    examples = [_parse_example(item) for item in content]
    return Constitution(comparison_examples=tuple(examples))
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise UserError(
      f'constitution {path}: expected a key "principles", or the layout of the'
      f' published files ({type(error).__name__}: {error})'
    ) from None


def _parse_critiques(content: Mapping[str, Any]) -> Constitution:
  """Parses name → {prompt: [text], edit_request: text}."""
  principles = []
  for name, item in content.items():
    critique = _text_between(item['prompt'][0], 'CritiqueRequest:', 'Critique:')
    revision = _text_between(item['edit_request'], 'RevisionRequest:', 'Revision:')
    principles.append(Principle(name, critique=critique, revision=revision))
  return Constitution(tuple(principles))


def _parse_texts(texts: Sequence[str], name: str) -> Constitution:
  """Parses a list of texts: dialogues with critiques, or instructions for comparisons."""
  if any('CritiqueRequest:' in text for text in texts):
    examples = [_strip_turn(text) for text in texts]
    return Constitution(critique_examples=tuple(examples))
  principles = []
  for number, text in enumerate(texts):
    choose = text.strip().removesuffix('Options:').strip()
    principles.append(Principle(f'{name}-{number}', choose=choose))
  return Constitution(tuple(principles))


def _parse_json_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> Constitution:
  """Parses rows by their kind; those of other kinds are left out.

  The kinds are critique_revision, comparison, critique_fewshot and
  comparison_fewshot.
  """
  principles = []
  critique_examples = []
  comparison_examples = []
  try:
    for row in rows:
      if row.get('kind') == 'critique_revision':
        principle = Principle(
          row['id'],
          critique=row['critique_request'],
          revision=row['revision_request'],
        )
        principles.append(principle)
      elif row.get('kind') == 'critique_fewshot':
        critique_examples.append(_strip_turn(row['text']))
      elif row.get('kind') == 'comparison_fewshot':
        comparison_examples.append(_parse_example(row))
    # Principles for comparisons come last, wherever they stand in the file.
    for row in rows:
      if row.get('kind') == 'comparison':
        principles.append(Principle(row['id'], choose=row['instruction']))
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise UserError(f'constitution {path}: {type(error).__name__}: {error}') from None
  return Constitution(
    principles=tuple(principles),
    critique_examples=tuple(critique_examples),
    comparison_examples=tuple(comparison_examples),
  )


def _parse_example(item: Mapping[str, Any]) -> Example:
  """Parses {prompt: text, corrects: [text], incorrects: [text]}."""
  return Example(
    human=_text_between(item['prompt'], 'Human:', 'Assistant:'),
    better=item['corrects'][0].strip(),
    worse=item['incorrects'][0].strip(),
  )


def _strip_turn(text: str) -> str:
  """Removes an empty 'Human:' turn from the end of a dialogue."""
  return text.strip().removesuffix('Human:').strip()


def _text_between(text: str, prefix: str, suffix: str) -> str:
  """Returns a text without the given prefix and suffix, and without surrounding whitespace."""
  return text.strip().removeprefix(prefix).removesuffix(suffix).strip()
