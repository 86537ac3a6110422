"""Measures the texture of a package: the density of its lines, and what is typed and documented.

  python scripts/texture.py                 # the table, and the longest function of each stage
  python scripts/texture.py --check         # exit code 1 if a figure is out of bounds
  python scripts/texture.py --folder=scripts

Only Python files and non-empty lines are counted; rates are per thousand such lines. The docstring
of each counting function says what exactly it counts. The script needs only the standard library.
"""

import argparse
import ast
from collections.abc import Iterator
import dataclasses
import io
from pathlib import Path
import re
import sys
import tokenize

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 100  # columns
# Verbs with which a docstring may begin, as "Returns …" or "Return …".
VERBS = frozenset(
  """accumulate add adjust allow answer append apply approximate assert assign average begin bind
  broadcast build bundle cache calculate call cast centre change check choose claim clip close
  collect combine compare compile complete compute configure connect consume convert copy correct
  count create cut decide declare decode define delete describe detect differ dequantise describe
  discard distribute divide download draw drop dump embed enable encode end enforce ensure
  enumerate estimate evaluate exit expand explain export extend extract fail fetch fill filter find
  fingerprint finish fit flatten fold follow forget format forward freeze gather generate get give
  grade group guard handle hash hold identify ignore import include increase infer initialise
  initialize insert inspect install interpret invert join judge keep label launch lay learn leave
  let limit list load locate log look lower make map mark mask match mean measure merge minimise
  mirror modify move multiply name normalise note obtain open optimise order pack pad parse pass
  patch pick place plan plot pool predict prepare present print process produce project propose
  prove provide publish pull push put quantise raise rank read rebuild receive recognise recompute
  record recover reduce refuse register reject remove rename render repeat replace report represent
  request reset reshape resolve restore resume return revise rewrite rotate round route run sample
  save scale scan scatter score search seed select send separate serve set shard share shift show
  shuffle sign simulate skip slice solve sort specify split spread stack standardise start state
  steer stop store stream strip submit subtract sum summarise swap take tell test tokenise total
  trace track train transform translate transpose truncate try turn unflatten unpack unstack update
  upload use validate verify visit wait walk warn watch weigh weight whiten wrap write yield
  """.split()
)


@dataclasses.dataclass(frozen=True)
class Texture:
  """The figures of a package.

  Attributes:
    lines: the number of lines that are not empty.
    mean_line: their mean length in columns.
    over_limit: lines longer than LIMIT columns.
    lambdas: lambda expressions.
    assigned_lambdas: lambdas assigned to a name.
    comments: comments, including those at the end of a line of code.
    arguments: arguments of public functions and methods.
    typed_arguments: those of `arguments` that are annotated.
    public: public modules, classes, functions and methods.
    undocumented: those of `public` without a docstring, as 'file:line name'.
    verb_docstrings: those of `documented_functions` whose docstring begins with a verb.
    documented_functions: public functions and methods that have a docstring.
  """

  lines: int = 0
  mean_line: float = 0.0
  over_limit: int = 0
  lambdas: int = 0
  assigned_lambdas: int = 0
  comments: int = 0
  arguments: int = 0
  typed_arguments: int = 0
  public: int = 0
  undocumented: tuple[str, ...] = ()
  verb_docstrings: int = 0
  documented_functions: int = 0

  def per_thousand(self, count: int) -> float:
    """Returns a count per thousand lines."""
    return 1000 * count / max(self.lines, 1)

  @property
  def typed_share(self) -> float:
    """The share of public arguments that are annotated, 0 to 1."""
    return self.typed_arguments / max(self.arguments, 1)

  @property
  def verb_share(self) -> float:
    """The share of documented public functions whose docstring begins with a verb, 0 to 1."""
    return self.verb_docstrings / max(self.documented_functions, 1)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table: a figure, its bound as text, and whether the figure is within the bound."""

  name: str
  value: str
  bound: str
  holds: bool


def main(arguments: list[str] | None = None) -> int:
  """Prints the table; returns 1 if --check was given and a figure is out of bounds."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--folder', type=Path, default=ROOT / 'rlhf_jax', help='what to measure')
  parser.add_argument('--check', action='store_true', help='exit with 1 beyond the bounds')
  parser.add_argument('--list', action='store_true', help='also list undocumented public names')
  options = parser.parse_args(arguments)

  texture = measure(options.folder)
  rows = table_rows(texture)
  print(format_table(rows))
  longest = list(longest_functions(options.folder / 'stages'))
  if longest:
    print('\nlongest function of each stage file')
  for path, name, length in longest:
    print(f'  {length:4}  {path.relative_to(options.folder)}: {name}')
  if options.list:
    print('\nwithout a docstring', *texture.undocumented, sep='\n  ')

  failed = [row.name for row in rows if not row.holds]
  if failed and options.check:
    print(f'texture: out of bounds: {", ".join(failed)}', file=sys.stderr)
    return 1
  return 0


def table_rows(texture: Texture) -> list[Row]:
  """Returns the table's rows, with the bounds of CONTRIBUTING.md."""
  over = 100 * texture.over_limit / max(texture.lines, 1)
  lambdas = texture.per_thousand(texture.lambdas)
  assigned = texture.per_thousand(texture.assigned_lambdas)
  comments = texture.per_thousand(texture.comments)
  typed = texture.typed_share
  missing = len(texture.undocumented)
  return [
    Row('lines', f'{texture.lines}', '', True),
    Row('mean line', f'{texture.mean_line:.1f}', '≤ 42', texture.mean_line <= 42),
    Row(f'lines over {LIMIT}', f'{texture.over_limit} ({over:.1f}%)', '0', not texture.over_limit),
    Row('lambdas per 1,000', f'{lambdas:.1f}', '≤ 6', lambdas <= 6),
    Row('assigned lambdas per 1,000', f'{assigned:.1f}', '0', not texture.assigned_lambdas),
    Row('comments per 1,000', f'{comments:.0f}', '≥ 60', comments >= 60),
    Row('typed public arguments', f'{typed:.0%}', '≥ 95%', typed >= 0.95),
    Row('public names without docstring', f'{missing} of {texture.public}', '0', not missing),
    Row('docstrings that begin with a verb', f'{texture.verb_share:.0%}', '', True),
  ]


def format_table(rows: list[Row]) -> str:
  """Formats rows as aligned text; '!' marks figures that are out of bounds."""
  name_width = max(len(row.name) for row in rows)
  value_width = max(len(row.value) for row in rows)
  lines = []
  for row in rows:
    mark = '' if row.holds else '  !'
    lines.append(f'{row.name:{name_width}}  {row.value:>{value_width}}  {row.bound}{mark}'.rstrip())
  return '\n'.join(lines)


def measure(folder: Path) -> Texture:
  """Measures all Python files in a folder and its subfolders."""
  total = Texture()
  columns = 0
  undocumented: list[str] = []
  for path in sorted(folder.rglob('*.py')):
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:  # an empty __init__.py
      continue
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    names = list(public_names(tree))
    arguments = list(public_arguments(nodes))
    columns += sum(map(len, lines))
    undocumented += [
      f'{path}:{getattr(node, "lineno", 1)} {name}'
      for name, node in names
      if ast.get_docstring(node) is None
    ]
    functions = [node for _, node in names if isinstance(node, ast.FunctionDef)]
    docstrings = [text for text in map(ast.get_docstring, functions) if text]
    total = dataclasses.replace(
      total,
      lines=total.lines + len(lines),
      over_limit=total.over_limit + sum(len(line) > LIMIT for line in lines),
      lambdas=total.lambdas + sum(isinstance(node, ast.Lambda) for node in nodes),
      assigned_lambdas=total.assigned_lambdas + sum(map(is_assigned_lambda, nodes)),
      comments=total.comments + count_comments(text),
      arguments=total.arguments + len(arguments),
      typed_arguments=total.typed_arguments + sum(a.annotation is not None for a in arguments),
      public=total.public + len(names),
      verb_docstrings=total.verb_docstrings + sum(map(begins_with_verb, docstrings)),
      documented_functions=total.documented_functions + len(docstrings),
    )
  return dataclasses.replace(
    total,
    mean_line=columns / max(total.lines, 1),
    undocumented=tuple(undocumented),
  )


def count_comments(text: str) -> int:
  """Counts comments; a comment of three lines counts as three."""
  tokens = tokenize.generate_tokens(io.StringIO(text).readline)
  return sum(token.type == tokenize.COMMENT for token in tokens)


def is_assigned_lambda(node: ast.AST) -> bool:
  """Tells whether a statement is `name = lambda …`, which should be a def."""
  return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)


def public_arguments(nodes: list[ast.AST]) -> Iterator[ast.arg]:
  """Yields the arguments of public functions and methods, also nested ones, except self and cls."""
  for node in nodes:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      for argument in (*node.args.args, *node.args.kwonlyargs):
        if argument.arg not in ('self', 'cls'):
          yield argument


def public_names(
  tree: ast.Module,
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
  """Yields (name, node) of the module, its public classes and functions, and their methods.

  Functions inside functions are left out, as nobody else can call them.
  """
  yield '(module)', tree
  for node in tree.body:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith('_'):
      continue
    yield node.name, node
    if isinstance(node, ast.ClassDef):
      for member in node.body:
        if isinstance(member, ast.FunctionDef) and not member.name.startswith('_'):
          yield f'{node.name}.{member.name}', member


def begins_with_verb(docstring: str) -> bool:
  """Tells whether the first word is one of VERBS, in the imperative or the third person."""
  match = re.match(r'[A-Za-z]+', docstring)
  if match is None:
    return False
  word = match[0].lower()
  candidates = {word, word.removesuffix('s'), word.removesuffix('es')}
  if word.endswith('ies'):
    candidates.add(word.removesuffix('ies') + 'y')
  return not candidates.isdisjoint(VERBS)


def longest_functions(folder: Path) -> Iterator[tuple[Path, str, int]]:
  """Yields (file, name, lines) of the longest outermost function or method of each file."""
  for path in sorted(folder.rglob('*.py')):
    lengths = []
    for node in ast.parse(path.read_text()).body:
      members = node.body if isinstance(node, ast.ClassDef) else [node]
      for member in members:
        if isinstance(member, ast.FunctionDef):
          lengths.append(((member.end_lineno or member.lineno) - member.lineno + 1, member.name))
    if lengths:
      length, name = max(lengths)
      yield path, name, length


if __name__ == '__main__':
  sys.exit(main())
