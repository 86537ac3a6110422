"""The table of all methods on the embedded world: each on the models of finished quickstarts, over their seeds.

  python scripts/compare_methods.py --out=runs/methods runs/quickstart runs/seed1 runs/seed2
  python scripts/compare_methods.py --out=runs/methods --only=dpo,rloo runs/quickstart

Every method has a file experiments/METHOD.py and gets a workdir OUT/METHOD-SEED, in which the quickstart's stages are
links. What is finished is skipped, so the command can be cut and repeated. The table goes to OUT/methods.md: mean over
the seeds, the lowest end of their 95% intervals, and the seconds of the method's own stages.
"""

import argparse
import json
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parents[1]
SHARED = ('tokenizer', 'pretrain', 'sft', 'feedback', 'reward', 'ppo')
METHODS = {  # experiment → the row of its table, where the names differ
    'best_of_n': 'best_of_16', 'raft': '', 'dpo': '', 'cdpo': '', 'robust_dpo': '', 'ipo': '', 'hinge_dpo': '',
    'length_normalised_dpo': '', 'dpop': '', 'plackett_luce_dpo': '', 'kto': '', 'cpo': '', 'simpo': '', 'orpo': '',
    'iterated_dpo': '', 'online_dpo': '', 'reinforce': '', 'reinforce_plus_plus': '', 'rloo': '', 'grpo': '',
    'dr_grpo': '', 'dapo': '', 'gspo': '', 'cispo': '', 'rlaif': '', 'direct_rlaif': ''}
COLUMNS = ('utility', 'helpful', 'honest', 'harmless', 'win_rate_vs_sft', 'kl_to_sft', 'response_length', 'eos_rate')
PERCENT = ('helpful', 'honest', 'harmless', 'win_rate_vs_sft', 'eos_rate')


def run(method: str, quickstart: Path, out: Path, overrides) -> dict:
  """results.json of a method on a quickstart's models."""
  from rlhf_jax import config as configs
  from rlhf_jax import pipeline
  seed = json.loads((quickstart / 'config.json').read_text())['seed']
  config = pipeline.load_config(str(ROOT / f'experiments/{method}.py'), [f'seed={seed}', *overrides])
  workdir = out / f'{method}-{seed}'
  if not (workdir / 'config.json').is_file():
    workdir.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
      if name in config.stages or name == 'tokenizer':
        (workdir / name).symlink_to((quickstart / name).resolve())
    (workdir / 'config.json').write_text(configs.as_json(config))
  return pipeline.run(config, workdir)


def linked(name: str) -> str:
  """The name as a link from docs/methods.md to the method's page, where there is one."""
  pages = (f'methods/{name}.md', f'{name.lower()}.md')
  return next((f'[{name}]({page})' for page in pages if (ROOT / 'docs' / page).is_file()), name)


def row(name: str, results: list[dict], shown: str, stages=()) -> str:
  """A line of the table: the mean of each column over the seeds; seconds of `stages`, of those the quickstart lacks unless
  said."""
  values = [result['models'][shown] for result in results]
  cells = [linked(name)]
  for column in COLUMNS:
    mean = sum(value[column] for value in values) / len(values)
    cells.append(f'{100 * mean:.0f}%' if column in PERCENT else f'{mean:.2f}')
    if column == 'win_rate_vs_sft':
      cells.append(f'{100 * min(value["win_rate_vs_sft_ci95"][0] for value in values):.0f}%')
  own = [sum(seconds for stage, seconds in result['seconds'].items() if seconds and (
      stage in stages if stages else stage not in (*SHARED, 'evaluation'))) for result in results]
  return '| ' + ' | '.join([*cells, f'{sum(own) / len(own):.0f}']) + ' |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('quickstarts', nargs='+', type=Path, help='workdirs of finished quickstarts, one for each seed')
  parser.add_argument('--out', type=Path, default=Path('runs/methods'))
  parser.add_argument('--only', default='', help='methods, with commas; all unless said')
  options, rest = parser.parse_known_args()
  names = options.only.split(',') if options.only else list(METHODS)
  for name in {*names} - {*METHODS}:
    parser.error(f'--only: no method {name!r}; known: {", ".join(METHODS)}')
  overrides = [word.removeprefix('--config.') for word in rest]
  found = {name: [] for name in names}
  for quickstart in options.quickstarts:  # a whole seed first, so that a cut run leaves a whole table
    for name in names:
      print(f'=== {name}, {quickstart}', file=sys.stderr, flush=True)
      found[name].append(run(name, quickstart, options.out, overrides))
      write(options, found)


def write(options, found) -> None:
  """OUT/methods.md of what is there so far."""
  heads = ['method', 'utility', 'helpful', 'honest', 'harmless', 'win rate', 'lowest bound', 'KL', 'length', 'EOS', 's']
  plain = [json.loads((path / 'results.json').read_text()) for path in options.quickstarts]
  lines = ['| ' + ' | '.join(heads) + ' |', '|' + ' --- |' * len(heads), row('SFT', plain, 'sft', ['sft']),
           row('PPO', plain, 'ppo', ['ppo'])]
  lines += [row(name, results, METHODS[name] or name) for name, results in found.items() if results]
  options.out.mkdir(parents=True, exist_ok=True)
  (options.out / 'methods.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
  main()
