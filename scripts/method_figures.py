"""Makes the figures of docs/methods.md, of each method's page and of what its experiment expects.

docs/results/methods_seed*.json hold what compare_methods.py writes, of one seed each, with the
commit, machine and command of that run; a method that was run at another commit has a `commit` of
its own. What is shown is of the first file.
"""

import json
from pathlib import Path
import textwrap

from figure_cells import (
  DECODINGS,
  fill_lines,
  format_decodings,
  format_table,
  format_with_interval,
  Run,
  SUBSTANCE,
)

HEADS = ('method', 'helpful', 'honest', 'harmless', 'wins by substance', 'KL', 'length')
SHOWN = {'sft': '[SFT](sft.md)', 'ppo': '[PPO](ppo.md)'}  # rows without a page in docs/methods

Block = tuple[str, str, str]  # what stands before the figures, what stands behind them, the figures


def make_blocks(root: Path) -> dict[Path, Block]:
  """Returns page → the figures that it should have, and where."""
  run = json.loads(min((root / 'docs/results').glob('methods_seed*.json')).read_text())
  page = root / 'docs/methods.md'
  blocks = {page: ('<!-- methods-table -->', '<!-- /methods-table -->', make_table(run))}
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
    shown = SHOWN.get(name, f'[{name}](methods/{name}.md)')
    rows.append((shown, *rates, wins, kl, length))
  text = fill_lines(f"""
    Test split of seed {run['seed']} at commit {run['commit']}, on {run['machine']}. Rates are
    sampled at temperature 1 / greedy; a win is against SFT in the same decoding, by what the
    response says and not by its style, a tie is half of one, and intervals are 95%, drawn by
    families of prompts. KL is in nats per response.{_others(run)}""")
  return f'\n{format_table(HEADS, rows)}\n\n{text}\n'


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
