"""Makes the figures of the pages about AI feedback and people's data, for fill_figures.py.

docs/results/rlaif_seed*.json and constitutional_ai_seed*.json hold a run as quickstart_seed*.json
do, and `judge`, the stage's quality.json; the former also `language_model_judge`, that of a run
with such a judge, and the latter `rounds`, the metrics of its critiques.
people_data.json holds folds.json of the stage as `folds`.
"""

import json
from pathlib import Path
from typing import Any

from figure_cells import (
  DECODINGS,
  fill_lines,
  format_rate,
  format_table,
  format_with_interval,
  Run,
  SUBSTANCE,
)

MODELS = {  # of a head beside its baselines → how the page calls them
  'length': 'length',
  'bigrams': 'bag of bigrams',
  'head': 'head',
  'joint': 'one head for all',
}


def make_blocks(folder: Path) -> dict[str, str]:
  """Returns page → the figures that it should have."""
  pages = {
    'docs/rlaif.md': (rlaif_page, 'rlaif_seed*.json'),
    'docs/constitutional_ai.md': (constitutional_page, 'constitutional_ai_seed*.json'),
    'docs/people_data.md': (people_page, 'people_data.json'),
  }
  blocks = {}
  for page, (make, pattern) in pages.items():
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
    blocks[page] = make(runs) if runs else '\nNot measured yet.\n'
  return blocks


def rlaif_page(runs: list[Run]) -> str:
  """Makes the figures of docs/rlaif.md."""
  text = ''
  for run in runs:
    text += f"""
Seed {run['seed']}, {run['split']} split, commit {run['commit']}, on {run['machine']}. The judge
{_agreement(run['judge'])} PPO's reward model agrees with them on
{100 * run['people_reward_accuracy']:.0f}% of held-out pairs. The language model (on the validation
split, commit {run['language_model_judge']['commit']})
{_agreement(run['language_model_judge'])}

{_rlaif_table(run)}
"""
  return _refill(text)


def _agreement(quality: dict[str, Any]) -> str:
  """Says how well a judge passed the gate."""
  people = quality['gate']['people']
  low, high = people['agreement_ci95']
  return (
    f'agrees with annotators on {100 * people["agreement"]:.0f}% ({100 * low:.0f} – '
    f'{100 * high:.0f}) of {people["pairs"]} comparisons, and '
    f'{100 * quality["gate"]["position"]["consistency"]:.0f}% of its verdicts stay the same when '
    'the responses are swapped.'
  )


def _rlaif_table(run: Run) -> str:
  """Makes the table of RLAIF beside RLHF; says so where a run has none."""
  if run['results'] is None:
    return 'What PPO learns from these labels was not measured yet.'
  rows = []
  for name, label in (('sft', 'SFT'), ('ppo', "PPO, people's labels"), ('rlaif', 'RLAIF')):
    for decoding in DECODINGS:
      row = run['results']['models'][name][decoding]
      rates = ('helpful', 'honest', 'harmless', SUBSTANCE, 'win_rate_vs_ppo')
      cells = [format_with_interval(row, rate) for rate in rates]
      rows.append((f'{label}, {decoding}', *cells))
  heads = ('', 'helpful', 'honest', 'harmless', 'wins by substance vs SFT', 'by utility vs PPO')
  return format_table(heads, rows)


def constitutional_page(runs: list[Run]) -> str:
  """Makes the figures of docs/constitutional_ai.md."""
  text = ''
  rates = {
    'harm done to requests': 'harmful_to_requests',
    'refusals with a fitting offer': 'helpful_to_requests',
    'benign twins refused': 'refused_benign',
    'helpful to questions': 'helpful_to_questions',
    'honest': 'honest',
  }
  for run in runs:
    results = run['results']
    tables = []
    for group in ('models', 'unseen'):
      rows = []
      for name, decodings in results[group].items():
        for decoding in DECODINGS:
          cells = [format_with_interval(decodings[decoding], rate) for rate in rates.values()]
          rows.append((f'{name.replace("_", " ")}, {decoding}', *cells))
      tables.append(format_table(('', *rates), rows))
    rounds = [f'{100 * row["harmful_to_requests"]:.0f}' for row in run['rounds']]
    text += f"""
{_measured(run)} Harmful responses after revision round 0, 1, … ({run['critiqued']} training
prompts): {', '.join(rounds)}%. {_judged(run)}

{tables[0]}

Of these, about families of harms, persons, facts and families of facts that training never had:

{tables[1]}
"""
  return _refill(text)


def _judged(run: Run) -> str:
  """Says how good the judge of harm is; that RL was left out where a run has none."""
  if run['judge'] is None:
    return 'RL-CAI was not measured.'
  agreement = run['judge']['gate']['people']
  return (
    f'The judge agrees with people on {100 * agreement["agreement"]:.0f}% of '
    f'{agreement["pairs"]} comparisons about harm.'
  )


def people_page(runs: list[Run]) -> str:
  """Makes the figures of docs/people_data.md; there is one run."""
  run = runs[0]
  accuracies, gains = [], []
  beats: dict[str, list[str]] = {'length': [], 'bigrams': []}
  for source, values in run['folds'].items():
    accuracy, gain = values['accuracy'], values['gain']
    size = f'{values["pairs"]:,} / {values["clusters"]:,}'
    accuracies.append((source, size, *(format_rate(accuracy, name) for name in MODELS)))
    cells = []
    for name in ('length', 'bigrams'):
      cells.append(format_with_interval(gain, name))
      if gain[f'{name}_ci95'][0] > 0:
        beats[name].append(source)
    gains.append((source, *cells))
  both = [source for source in beats['length'] if source in beats['bigrams']]
  count = len(run['folds'])
  text = f"""
Measured at commit {run['commit']} on {run['machine']} in {run['seconds'] / 60:.0f} minutes.
Accuracy on conversations that the models were not fitted to:

{format_table(('source', 'pairs / openers', *MODELS.values()), accuracies)}

Gain of the head over the same folds' baselines, in points, paired, with 95% intervals over openers:

{format_table(('source', 'over length', 'over bigrams'), gains)}

The interval is above 0 against length on {len(beats['length'])} of {count} sources
({', '.join(beats['length']) or 'none'}), against bigrams on {len(beats['bigrams'])}
({', '.join(beats['bigrams']) or 'none'}), and against both on {len(both)}
({', '.join(both) or 'none'}).
"""
  return _refill(text)


def _measured(run: Run) -> str:
  """Says of which run the figures are."""
  seconds = sum(run['results']['seconds'].values())
  return (
    f'Seed {run["seed"]}, {run["split"]} split, commit {run["commit"]}, on {run["machine"]} '
    f'({seconds / 60:.0f} minutes, all stages).'
  )


def _refill(text: str) -> str:
  """Breaks the paragraphs of a text anew; tables stay as they are."""
  blocks = [block.strip('\n') for block in text.split('\n\n')]
  filled = [block if block.startswith('|') else fill_lines(block) for block in blocks]
  return '\n' + '\n\n'.join(filled) + '\n'
