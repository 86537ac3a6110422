"""Makes the figures of docs/methods.md, of each method's page and of what its experiment expects.

docs/results/methods_seed*.json hold what compare_methods.py writes, of one seed each, with the
commit, machine and command of that run; a method that was run at another commit has a `commit` of
its own. What is shown is of the first file, and the wins of all of them.
"""

from collections.abc import Sequence
import json
from pathlib import Path
import textwrap

from figure_cells import (
  DECODINGS,
  fill_lines,
  format_decodings,
  format_table,
  format_with_interval,
  Row,
  Run,
  SUBSTANCE,
)

HEADS = ('method', 'helpful', 'honest', 'harmless', 'wins by substance', 'KL', 'length')
SHOWN = {'sft': '[SFT](sft.md)', 'ppo': '[PPO](ppo.md)'}  # rows without a page in docs/methods

Block = tuple[str, str, str]  # what stands before the figures, what stands behind them, the figures


def make_blocks(root: Path) -> dict[Path, Block]:
  """Returns page → the figures that it should have, and where."""
  paths = sorted((root / 'docs/results').glob('methods_seed*.json'))
  runs = [json.loads(path.read_text()) for path in paths]
  run = runs[0]
  page = root / 'docs/methods.md'
  tables = make_table(run) + make_table_of_seeds(runs)
  blocks = {page: ('<!-- methods-table -->', '<!-- /methods-table -->', tables)}
  for name in run['methods'].keys() - SHOWN.keys():
    page = root / f'docs/methods/{name}.md'
    blocks[page] = ('**Result**', '\n\n', describe(run, name))
    experiment = root / f'experiments/{name}.py'
    blocks[experiment] = ('\nExpected: ', 'Time: ', expect(run, name))
  return blocks


def make_table(run: Run) -> str:
  """Makes the table of all methods, in the order in which they were run."""
  rows = []
  for name, method in run['methods'].items():
    decodings, sampled = method['rows'], method['rows']['sampled']
    rates = [format_decodings(decodings, rate) for rate in ('helpful', 'honest', 'harmless')]
    wins = ' / '.join(
      format_with_interval(decodings[decoding], SUBSTANCE) if decoding in decodings else '–'
      for decoding in DECODINGS
    )
    kl = f'{sampled["kl_to_sft"]:.2f}'
    length = f'{sampled["response_length"]:.1f}'
    rows.append((_link(name), *rates, wins, kl, length))
  text = fill_lines(f"""
    Test split of seed {run['seed']} at commit {run['commit']}, on {run['machine']}. Rates are
    sampled at temperature 1 / greedy; a win is against SFT in the same decoding, by what the
    response says and not by its style, a tie is half of one, and intervals are 95%, drawn by
    families of prompts. KL is in nats per response.{_others(run)}""")
  return f'\n{format_table(HEADS, rows)}\n\n{text}\n'


def make_table_of_seeds(runs: Sequence[Run]) -> str:
  """Makes the table of the wins of every method on all seeds, with the lowest of their bounds."""
  rows = []
  for name in runs[0]['methods']:
    if name == 'sft':
      continue  # with which all are compared
    of_seeds = [run['methods'][name]['rows'] for run in runs]
    cells = [format_decodings(decodings, SUBSTANCE) for decodings in of_seeds]
    rows.append((_link(name), *cells, _format_lowest(of_seeds)))
  heads = ('method', *(f'seed {run["seed"]}' for run in runs), 'lowest bound')
  commits = ', '.join(f'seed {run["seed"]} at commit {run["commit"]}' for run in runs)
  text = f"""
    Wins against SFT by substance on every seed, which draws its own world, corpus and people,
    sampled / greedily ({commits}); the lowest bound is that of the 95% intervals of all seeds."""
  return f'\n{fill_lines(text)}\n\n{format_table(heads, rows)}\n'


def _format_lowest(of_seeds: Sequence[dict[str, Row]]) -> str:
  """Formats the lowest bound of a method's win rates over the seeds."""
  bounds = []
  for decoding in DECODINGS:
    lows = [rows[decoding][f'{SUBSTANCE}_ci95'][0] for rows in of_seeds if decoding in rows]
    bounds.append(f'{100 * min(lows):.1f}%' if lows else '–')
  return ' / '.join(bounds)


def _link(name: str) -> str:
  """Returns the name of a method with a link to its page."""
  return SHOWN.get(name, f'[{name}](methods/{name}.md)')


def _others(run: Run) -> str:
  """Says which methods were run at another commit."""
  others: dict[str, list[str]] = {}
  for name, method in run['methods'].items():
    if 'commit' in method:
      others.setdefault(method['commit'], []).append(name)
  places = [f'at commit {commit}: {", ".join(names)}' for commit, names in others.items()]
  return f' Run {"; ".join(places)}.' if places else ''


def describe(run: Run, name: str) -> str:
  """Makes the first paragraph of a page's result."""
  decodings = run['methods'][name]['rows']
  rates = {rate: format_decodings(decodings, rate) for rate in ('helpful', 'honest', 'harmless')}
  paragraph = fill_lines(f"""
    **Result** on TinyWorld, test split of seed {run['seed']}, sampled / greedily: helpful
    {rates['helpful']}, honest {rates['honest']}, harmless {rates['harmless']}; sampled, KL
    {decodings['sampled']['kl_to_sft']:.2f} nats and {decodings['sampled']['response_length']:.0f}
    tokens a response. It wins against SFT by substance in {_wins(run, name)}.""")
  return paragraph.removeprefix('**Result**')


def expect(run: Run, name: str) -> str:
  """Makes what the docstring of a method's experiment expects."""
  kl = run['methods'][name]['rows']['sampled']['kl_to_sft']
  text = f"""Expected: on the test split of seed {run['seed']} it wins against SFT by substance in
    {_wins(run, name)}, at a KL of {kl:.2f} nats. docs/methods.md has all methods."""
  lines = textwrap.wrap(' '.join(text.split()), 98, break_on_hyphens=False)
  return '\n  '.join(lines).removeprefix('Expected: ') + '\n'


def _wins(run: Run, name: str) -> str:
  """Formats a method's win rates, with their intervals."""
  rows = run['methods'][name]['rows']
  wins = [
    f'{format_with_interval(rows[decoding], SUBSTANCE)} {decoding}'
    for decoding in DECODINGS
    if decoding in rows
  ]
  return ' and '.join(wins)
