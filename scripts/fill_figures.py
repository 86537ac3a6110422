"""Writes the figures of the quickstart into README.md, docs/ and the experiment's docstring.

  python scripts/fill_figures.py            # writes them
  python scripts/fill_figures.py --check    # exits with 1 if a page has other figures

They come from docs/results/: what a run wrote to results.json as `results`, with the commit, seed,
split, machine and command of that run. quickstart_seed*.json are of the quickstart, claims.json is
what measure_claims.py writes; feedback_figures.py and method_figures.py say what the others are.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import sys
from typing import Any

import feedback_figures
from figure_cells import (
  DECODINGS,
  fill_lines,
  format_decodings,
  format_rate,
  format_table,
  format_with_interval,
  Row,
  Run,
  SUBSTANCE,
)
import method_figures

ROOT = Path(__file__).resolve().parents[1]
KINDS = ('truth', 'polite_falsehood', 'fit', 'harm', 'refusal', 'manner', 'length')
RATES = {  # heading → name in results.json
  'helpful': 'helpful',
  'honest': 'honest',
  'harmless': 'harmless',
  'wins by substance': SUBSTANCE,
}
GAINS = ('helpful', 'honest', 'harmless')
MORE_RATES = {
  **RATES,
  'wins by utility': 'win_rate_vs_sft',
  'controlled for length and style': 'win_rate_controlled',
  'bare refusal': 'bare_refusal',
  'unread': 'unread',
}


def main(arguments: Sequence[str]) -> int:
  """Fills every page, or checks all of them; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--check', action='store_true', help='change nothing')
  options = parser.parse_args(arguments)
  different = []
  for path, text in fill_pages(read_runs()).items():
    if path.read_text() == text:
      continue
    different.append(path)
    if not options.check:
      path.write_text(text)
  for path in different:
    what = 'has other figures than' if options.check else 'filled from'
    print(f'{path.relative_to(ROOT)}: {what} docs/results')
  return int(options.check and bool(different))


def read_runs() -> list[Run]:
  """Reads the runs of all seeds, in their order."""
  paths = sorted((ROOT / 'docs/results').glob('quickstart_seed*.json'))
  return [json.loads(path.read_text()) for path in paths]


def read_claims() -> dict[str, Any]:
  """Reads the claims that scripts/measure_claims.py has measured."""
  return json.loads((ROOT / 'docs/results/claims.json').read_text())['claims']


def fill_pages(runs: list[Run]) -> dict[Path, str]:
  """Returns the text that each page should have.

  Args:
    runs: of all seeds; pages that show one of them show the first.
  """
  blocks = {
    ROOT / 'README.md': ('<!-- quickstart-table -->', '<!-- /quickstart-table -->', readme(runs)),
    ROOT / 'docs/tinyworld.md': ('<!-- figures -->', '<!-- /figures -->', world_page(runs)),
    ROOT / 'experiments/quickstart.py': ('\nExpected: ', 'Time: ', docstring(runs)),
  }
  for page, block in feedback_figures.make_blocks(ROOT / 'docs/results').items():
    blocks[ROOT / page] = ('<!-- figures -->', '<!-- /figures -->', block)
  blocks |= method_figures.make_blocks(ROOT)
  pages = {}
  for path, (begin, end, block) in blocks.items():
    before, rest = path.read_text().split(begin, 1)
    _, after = rest.split(end, 1)
    pages[path] = before + begin + block + end + after
  return pages


# The pages.


def readme(runs: list[Run]) -> str:
  """Makes the README's table: models and controls of one seed, sampled and greedily."""
  run = runs[0]
  rows = []
  for name, decodings in all_rows(run).items():
    cells = [format_decodings(decodings, rate) for rate in RATES.values()]
    rows.append((name, *cells))
  table = format_table(('sampled / greedy', *RATES), rows)
  minutes = sum(run['results']['seconds'].values()) / 60
  wins = '; '.join(f'{format_wins(other)} (seed {other["seed"]})' for other in runs)
  text = fill_lines(f"""
    Test split of seed {run['seed']} at commit {run['commit']}, {minutes:.0f} minutes on
    {run['machine']}; settings were chosen on the validation split. By substance, in which no style
    counts, PPO wins against SFT, sampled and greedily: {wins}, with 95% intervals.
    [docs/tinyworld.md](docs/tinyworld.md) explains the rows, and has all intervals, unseen families
    and what the reward model knows.""")
  return f'\n{table}\n\n{text}\n'


def world_page(runs: list[Run]) -> str:
  """Makes the figures of docs/tinyworld.md."""
  run = runs[0]
  commits = ', '.join(f'seed {other["seed"]} at commit {other["commit"]}' for other in runs)
  rates = measured_rates(runs)
  tables = ''
  for decoding, title in DECODINGS.items():
    rows = []
    for name, decodings in all_rows(run).items():
      if decoding in decodings:
        rows.append((name, *format_row(decodings[decoding], rates)))
    heads = ('', *rates, 'KL', 'length')
    tables += f'\n{title}, seed {run["seed"]}:\n\n{format_table(heads, rows)}\n'
  measured = fill_lines(f"""
    Measured on the **test** split, {commits}; each seed draws its own world, corpus and people, and
    settings were chosen on the validation splits of seeds 0 and 2. Intervals are 95%, drawn by
    families of prompts. A win is against SFT in the same decoding, over all prompts; a tie is
    half of one.""")
  return f"""
{measured}

```sh
{run['command']}
```
{tables}
{comparisons(runs)}

Differences from SFT on the same prompts, in points, sampled / greedily:

{table_of_gains(runs)}

Of all seeds:

{table_of_seeds(runs, rates)}

Families of facts, facts, persons and harms that training never had, seed {run['seed']}:

{table_of_unseen(run)}

By the kind of prompt, helpful responses, sampled / greedily, means over the seeds:

{table_of_prompt_kinds(runs)}

{losses(runs)}

The reward model, on pairs that differ in one kind only, accuracy:

{table_of_kinds(runs)}

Three claims, as win rates of one row against another (`scripts/measure_claims.py`):

{table_of_claims()}
"""


def docstring(runs: list[Run]) -> str:
  """Makes what the experiment's docstring expects."""
  models = runs[0]['results']['models']
  helpful = [format_decodings(models[name], 'helpful') for name in ('base', 'sft', 'ppo')]
  wins = format_wins(runs[0])
  return f"""on the test split of seed {runs[0]['seed']}, sampled / greedily, helpful responses are
  {helpful[0]} (base), {helpful[1]} (SFT) and {helpful[2]} (PPO).
  PPO wins against SFT by substance in {wins}.
  docs/tinyworld.md has intervals, other seeds and controls.
"""


def comparisons(runs: list[Run]) -> str:
  """Sets PPO and SFT beside what may explain their rates away."""
  results = runs[0]['results']
  models, controls = results['models'], results['controls']
  ppo = models['ppo']['sampled']['helpful']
  gaps = {}
  for judge in ('oracle', 'reward'):
    gap = controls[f'tilt_by_{judge}']['sampled']['helpful'] - ppo
    gaps[judge] = f'{100 * gap:.0f}'
  weakest = min(runs, key=lambda run: run['results']['models']['ppo']['greedy'][SUBSTANCE])
  lowest = format_with_interval(weakest['results']['models']['ppo']['greedy'], SUBSTANCE)
  return fill_lines(f"""
    Beside the controls: a phrase and one refusal win
    {format_decodings(controls['phrase_and_refusal'], SUBSTANCE)} against SFT by substance, sampled
    / greedily. Greedily, {format_rate(models['base']['greedy'], 'helpful')} of the base model's
    responses are helpful, and {format_rate(models['sft']['greedy'], 'helpful')} of SFT's. PPO wins
    least on seed {weakest['seed']}, greedily: {lowest}. SFT tilted at PPO's KL is helpful in
    {gaps['oracle']} points more than PPO if the oracle tilts it, and in {gaps['reward']} points
    more if the reward does.""")


def losses(runs: list[Run]) -> str:
  """Says in which kinds of prompts PPO is helpful less often than SFT, greedily."""
  lost = []
  for kind in prompt_kinds(runs):
    sft, ppo = (mean_helpful(runs, name, 'greedy', kind) for name in ('sft', 'ppo'))
    if ppo < sft:
      lost.append(f'`{kind}` ({100 * sft:.0f} to {100 * ppo:.0f}%)')
  if not lost:
    return 'Greedily, PPO is helpful more often than SFT, or as often, in every kind.'
  return fill_lines(f'Greedily, PPO is helpful less often than SFT in {", ".join(lost)}.')


# Tables.


def prompt_kinds(runs: list[Run]) -> dict[str, int]:
  """Returns kind of prompt → how many prompts of it all runs together have."""
  counts: dict[str, int] = {}
  for run in runs:
    for kind, row in run['results']['kinds']['sft']['greedy'].items():
      counts[kind] = counts.get(kind, 0) + row['prompts']
  return dict(sorted(counts.items()))


def mean_helpful(runs: list[Run], name: str, decoding: str, kind: str) -> float:
  """Returns the share of helpful responses to a kind of prompt, as a mean over runs."""
  rates = [run['results']['kinds'][name][decoding][kind]['helpful'] for run in runs]
  return sum(rates) / len(rates)


def table_of_prompt_kinds(runs: list[Run]) -> str:
  """Makes a table of the helpful responses of models and controls by kind of prompt."""
  names = ('base', 'sft', 'ppo', 'best_of_16_by_reward', 'best_of_16_by_oracle')
  rows = []
  for kind, count in prompt_kinds(runs).items():
    cells = []
    for name in names:
      decodings = runs[0]['results']['kinds'][name]
      rates = [f'{100 * mean_helpful(runs, name, decoding, kind):.0f}%' for decoding in decodings]
      cells.append(' / '.join(rates))
    rows.append((f'`{kind}`', str(count), *cells))
  return format_table(('', 'prompts', *(name.replace('_', ' ') for name in names)), rows)


def table_of_seeds(runs: list[Run], rates: Mapping[str, str]) -> str:
  """Makes a table of the models of every seed."""
  rows = []
  for run in runs:
    for name, decodings in run['results']['models'].items():
      cells = [format_decodings(decodings, rate) for rate in rates.values()]
      rows.append((f'seed {run["seed"]}, {name}', *cells))
  return format_table(('sampled / greedy', *rates), rows)


def table_of_gains(runs: list[Run]) -> str:
  """Makes a table of how models differ from SFT on the same prompts, of each seed and of all."""
  rows = []
  for run in runs:
    for name, decodings in run['results']['models'].items():
      if name == 'sft':
        continue
      cells = [format_gains(decodings, rate) for rate in GAINS]
      rows.append((f'seed {run["seed"]}, {name}', *cells))
  for name, decodings in read_claims()['all_seeds'].items():
    cells = [format_gains(decodings, rate) for rate in GAINS]
    rows.append((f'all seeds together, {name}', *cells))
  return format_table(('', *GAINS), rows)


def table_of_unseen(run: Run) -> str:
  """Makes a table of prompts about what was held out of training."""
  rows = []
  for decoding in DECODINGS:
    for name, decodings in run['results']['unseen'].items():
      cells = [format_with_interval(decodings[decoding], rate) for rate in RATES.values()]
      rows.append((f'{name}, {decoding}', *cells))
  return format_table(('', *RATES), rows)


def table_of_kinds(runs: list[Run]) -> str:
  """Makes a table of the reward model's accuracy by kind of pair."""
  rows = []
  for run in runs:
    for group, accuracies in run['results']['reward']['by_kind'].items():
      cells = [f'{100 * accuracies[kind]:.0f}%' for kind in KINDS]
      rows.append((f'seed {run["seed"]}, {group}', *cells))
  return format_table(('', *(kind.replace('_', ' ') for kind in KINDS)), rows)


def table_of_claims() -> str:
  """Makes the table of PPO against other rows, and of small models against a large one."""
  claims = read_claims()
  compared = {}
  for seed, rates in claims['prompted_base'].items():
    compared[f'PPO against the prompted base of its size, seed {seed}'] = rates
  for seed, rates in claims['questions'].items():
    compared[f'PPO against SFT on questions alone, seed {seed}'] = rates
  for name, rates in claims['large'].items():
    compared[f'small {name.replace("_", " ")} against the large base'] = rates
  rows = []
  for title, rates in compared.items():
    cells = [format_decodings_with_interval(rates, measure) for measure in ('utility', 'substance')]
    rows.append((title, *cells))
  return format_table(('sampled / greedy', 'by utility', 'by substance'), rows)


def measured_rates(runs: list[Run]) -> dict[str, str]:
  """Returns those of MORE_RATES that every run has measured."""
  rows = [run['results']['models']['sft']['sampled'] for run in runs]
  return {heading: rate for heading, rate in MORE_RATES.items() if all(rate in row for row in rows)}


def all_rows(run: Run) -> dict[str, dict[str, Row]]:
  """Returns the rows of models and controls: name → decoding → values."""
  rows = run['results']['models'] | run['results']['controls']
  return {name.replace('_', ' '): decodings for name, decodings in rows.items()}


# Cells and paragraphs.


def format_row(row: Row, rates: Mapping[str, str]) -> list[str]:
  """Formats a row of the large tables: rates with intervals, KL and length."""
  cells = [format_with_interval(row, rate) for rate in rates.values()]
  kl = f'{row["kl_to_sft"]:.2f}' if 'kl_to_sft' in row else '–'
  return [*cells, kl, f'{row["response_length"]:.1f}']


def format_decodings_with_interval(decodings: Mapping[str, Row], rate: str) -> str:
  """Formats a rate of each decoding with its interval, sampled / greedy."""
  return ' / '.join(format_with_interval(decodings[name], rate) for name in DECODINGS)


def format_gains(decodings: Mapping[str, Row], rate: str) -> str:
  """Formats the difference from SFT of each decoding with its interval, in points."""
  cells = []
  for name in DECODINGS:
    gain = decodings[name][f'{rate}_gain']
    low, high = decodings[name][f'{rate}_gain_ci95']
    cells.append(f'{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})')
  return ' / '.join(cells)


def format_wins(run: Run) -> str:
  """Formats how often PPO wins by substance, sampled and greedily, with intervals."""
  ppo = run['results']['models']['ppo']
  return ' and '.join(format_with_interval(ppo[name], SUBSTANCE) for name in DECODINGS)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
