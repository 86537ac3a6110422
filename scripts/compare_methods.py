"""Compares all methods on TinyWorld, starting from the models of finished quickstarts.

  python scripts/compare_methods.py --out=runs/methods runs/quickstart runs/seed1 runs/seed2
  python scripts/compare_methods.py --out=runs/methods --only=dpo,rloo runs/quickstart

Every method is an experiment experiments/METHOD.py. It gets a workdir OUT/METHOD-SEED, in which the
quickstart's stages are symbolic links. Finished runs are skipped, so the command can be interrupted
and repeated. The table is OUT/methods.md: for each method the means over the seeds, in brackets the
lowest of the lower bounds of their 95% intervals, and the seconds of the method's own stages.
OUT/methods_seedN.json has the rows of a seed with all their intervals, as docs/results has them.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
import json
from pathlib import Path
import sys
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ('tokenizer', 'pretrain', 'sft', 'feedback', 'reward', 'ppo')  # folders of a quickstart
METHODS = (
  'best_of_n',
  'raft',
  'dpo',
  'cdpo',
  'robust_dpo',
  'ipo',
  'hinge_dpo',
  'length_normalised_dpo',
  'dpop',
  'plackett_luce_dpo',
  'kto',
  'cpo',
  'simpo',
  'orpo',
  'iterated_dpo',
  'online_dpo',
  'reinforce',
  'reinforce_plus_plus',
  'rloo',
  'grpo',
  'dr_grpo',
  'dapo',
  'gspo',
  'cispo',
  'ppo_ensemble',
  'rlaif',
  'direct_rlaif',
)
ROWS = {'best_of_n': 'best_of_16'}  # a method's row in its own table, where the names differ
# Heading → (decoding, key of the row in results.json, format).
COLUMNS = {
  'helpful': ('sampled', 'helpful', '{:.0%}'),
  'honest': ('sampled', 'honest', '{:.0%}'),
  'harmless': ('sampled', 'harmless', '{:.0%}'),
  'wins by substance': ('sampled', 'substance_win_rate_vs_sft', '{:.0%}'),
  'by utility': ('sampled', 'win_rate_vs_sft', '{:.0%}'),
  'greedy: helpful': ('greedy', 'helpful', '{:.0%}'),
  'greedy: wins by substance': ('greedy', 'substance_win_rate_vs_sft', '{:.0%}'),
  'KL': ('sampled', 'kl_to_sft', '{:.2f}'),
  'length': ('sampled', 'response_length', '{:.1f}'),
  'EOS': ('sampled', 'eos_rate', '{:.0%}'),
}
BOUNDED = 'substance_win_rate_vs_sft'  # its lowest bound over the seeds stands beside it

Results = Mapping[str, Any]  # what a run's results.json holds


def main() -> None:
  """Runs the methods, and writes the table after each of them."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'quickstarts',
    nargs='+',
    type=Path,
    help='workdirs of finished quickstarts, one for each seed',
  )
  parser.add_argument('--out', type=Path, default=Path('runs/methods'))
  parser.add_argument('--only', default='', help='methods, separated by commas; default: all')
  options, rest = parser.parse_known_args()
  names = options.only.split(',') if options.only else list(METHODS)
  for name in {*names} - {*METHODS}:
    parser.error(f'--only: no method {name!r}; known: {", ".join(METHODS)}')
  overrides = [word.removeprefix('--config.') for word in rest]

  results: dict[str, list[Results]] = {name: [] for name in names}
  # All methods of one seed before the next seed, so that an interrupted command leaves a
  # complete table of the finished seeds.
  for quickstart in options.quickstarts:
    for name in names:
      print(f'=== {name}, {quickstart}', file=sys.stderr, flush=True)
      results[name].append(run_method(name, quickstart, options.out, overrides))
      write_table(options.quickstarts, options.out, results)
    last = {name: runs[-1] for name, runs in results.items()}
    write_rows(quickstart, options.out, last)


def run_method(method: str, quickstart: Path, out: Path, overrides: Sequence[str]) -> Results:
  """Runs a method on a quickstart's models; returns what its results.json holds."""
  from rlhf_jax import fingerprints
  from rlhf_jax.experiment import config as configs
  from rlhf_jax.experiment import pipeline  # imported here, so that --help need not wait for JAX

  seed = json.loads((quickstart / 'config.json').read_text())['seed']
  experiment = str(ROOT / f'experiments/{method}.py')
  config = pipeline.load_config(experiment, [f'seed={seed}', *overrides])
  workdir = out / f'{method}-{seed}'
  if not (workdir / 'config.json').is_file():
    workdir.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
      if name in config.stages or name == 'tokenizer':
        (workdir / name).symlink_to((quickstart / name).resolve())
    fingerprints.write_json(workdir / 'config.json', json.loads(configs.as_json(config)))
  return pipeline.run(config, workdir)


def write_table(
  quickstarts: Sequence[Path],
  out: Path,
  results: Mapping[str, Sequence[Results]],
) -> None:
  """Writes OUT/methods.md with the results so far."""
  plain = [json.loads((path / 'results.json').read_text()) for path in quickstarts]
  lines = [
    '| ' + ' | '.join(('method', *COLUMNS, 's')) + ' |',
    '|' + ' --- |' * (len(COLUMNS) + 2),
    format_row('SFT', plain, 'sft', ('sft',)),
    format_row('PPO', plain, 'ppo', ('ppo',)),
  ]
  for name, runs in results.items():
    if runs:
      lines.append(format_row(name, runs, ROWS.get(name, name)))
  out.mkdir(parents=True, exist_ok=True)
  (out / 'methods.md').write_text('\n'.join(lines) + '\n')


def write_rows(quickstart: Path, out: Path, results: Mapping[str, Results]) -> None:
  """Writes OUT/methods_seedN.json: the rows of SFT, PPO and each method of one seed."""
  plain = json.loads((quickstart / 'results.json').read_text())
  methods = {name: {'rows': plain['models'][name]} for name in ('sft', 'ppo')}
  for name, result in results.items():
    methods[name] = {'rows': result['models'][ROWS.get(name, name)]}
  config = json.loads((quickstart / 'config.json').read_text())
  found = {'seed': config['seed'], 'split': config['evaluation']['split'], 'methods': methods}
  path = out / f'methods_seed{config["seed"]}.json'
  path.write_text(json.dumps(found, indent=1) + '\n')


def format_row(
  name: str,
  results: Sequence[Results],
  model: str,
  stages: Collection[str] = (),
) -> str:
  """Formats a line of the table: the mean of each column over the seeds.

  Args:
    name: the method, as the table shows it.
    results: one run for each seed.
    model: the name of the row in each run's own table.
    stages: the stages whose seconds count; by default those that are not in the
      quickstart.
  """
  cells = [link_to_page(name)]
  for decoding, key, value_format in COLUMNS.values():
    rows = [result['models'][model].get(decoding) for result in results]
    known = [row for row in rows if row and key in row]  # best of N has no greedy row
    if not known:
      cells.append('–')
      continue
    cell = value_format.format(sum(row[key] for row in known) / len(known))
    if key == BOUNDED:
      cell += f' (≥ {min(row[f"{key}_ci95"][0] for row in known):.0%})'
    cells.append(cell)
  seconds = [own_seconds(result, stages) for result in results]
  cells.append(f'{sum(seconds) / len(seconds):.0f}')
  return '| ' + ' | '.join(cells) + ' |'


def own_seconds(result: Results, stages: Collection[str]) -> float:
  """Adds up the seconds of the given stages, or else of those that are not in the quickstart."""
  total = 0.0
  for stage, seconds in result['seconds'].items():
    counts = stage in stages if stages else stage not in (*SHARED, 'evaluation')
    if counts:
      total += seconds or 0.0
  return total


def link_to_page(name: str) -> str:
  """Returns the name, as a link from docs/methods.md to the method's page if there is one."""
  for page in (f'methods/{name}.md', f'{name.lower()}.md'):
    if (ROOT / 'docs' / page).is_file():
      return f'[{name}]({page})'
  return name


if __name__ == '__main__':
  main()
