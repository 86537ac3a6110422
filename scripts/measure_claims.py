"""Measures claims about RLHF on the responses that finished runs have kept.

  python scripts/measure_claims.py --output=claims.json \
    --quickstarts runs/quickstart runs/seed1 runs/seed2 --small runs/small

Of each quickstart: is PPO preferred to the base model of its size, prompted as well as it can be?
And to SFT on questions alone, which are the prompts that ask for no harm?
Of the small model (experiments/small_against_large.py): is PPO, or the small base that is prompted
as well as it can be, preferred to a base a hundred times as large? All are told by the oracle's
utility and by its substance, in which no style counts, with 95% intervals by families of prompts.
And of all quickstarts together: how do base and PPO differ from SFT on the same prompts?
"""

import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
import sys
from typing import Any

import numpy as np

from rlhf_jax.data.tinyworld import requests, world
from rlhf_jax.evaluation import winrate
from rlhf_jax.report import kept_responses

MEASURES = ('utility', 'substance')
DECODINGS = ('sampled', 'greedy')
SMALL = ('ppo', 'prompted_base', 'sft')  # rows that are set beside the large base
# Kinds of prompt that ask for no harm, as `helpful_to_questions` counts them.
QUESTIONS = tuple(kind for kind in requests.KINDS if kind != 'harmful')
GAINS = ('helpful', 'honest', 'harmless')  # measures of which differences from SFT are told

Verdicts = dict[str, list[Mapping[str, float]]]  # id of a prompt → of its responses


def main(arguments: Sequence[str]) -> int:
  """Measures the claims and writes them; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--quickstarts', nargs='+', type=Path, required=True, metavar='DIR')
  parser.add_argument('--small', type=Path, required=True, metavar='DIR')
  parser.add_argument('--output', type=Path, required=True, metavar='FILE')
  options = parser.parse_args(arguments)
  claims: dict[str, Any] = {'prompted_base': {}, 'questions': {}, 'large': {}}
  for workdir in options.quickstarts:
    seed = str(read_config(workdir)['seed'])
    claims['prompted_base'][seed] = compare(workdir, 'ppo', 'prompted_base')
    claims['questions'][seed] = compare(workdir, 'ppo', 'sft', QUESTIONS)
  for name in SMALL:
    claims['large'][name] = compare(options.small, name, 'large')
  claims['all_seeds'] = {name: measure_gains(options.quickstarts, name) for name in ('base', 'ppo')}
  options.output.write_text(json.dumps(claims, indent=1) + '\n')
  return 0


def compare(
  workdir: Path, ours: str, theirs: str, kinds: Sequence[str] = requests.KINDS
) -> dict[str, dict[str, Any]]:
  """Compares two rows of a run's final table.

  Args:
    workdir: of the run.
    ours: the row whose wins are counted.
    theirs: the other row.
    kinds: of the prompts that count.

  Returns:
    Decoding → {utility, substance}: the win rate; the same with _ci95: its interval.
  """
  metas = read_metas(workdir)
  rates: dict[str, dict[str, Any]] = {}
  for decoding in DECODINGS:
    own, other = (
      keep_kinds(read_verdicts(workdir, name, decoding), metas, kinds) for name in (ours, theirs)
    )
    clusters = [metas[prompt_id]['family'] for prompt_id in own]
    rates[decoding] = {}
    for measure in MEASURES:
      wins = winrate.win_rate(as_array(own, measure), as_array(other, measure))
      rates[decoding][measure] = float(wins.mean())
      rates[decoding][f'{measure}_ci95'] = list(winrate.bootstrap(wins, clusters))
  return rates


def measure_gains(workdirs: Sequence[Path], name: str) -> dict[str, dict[str, Any]]:
  """Measures how a row differs from SFT on the same prompts, over several runs together.

  Args:
    workdirs: of runs that each drew a world of their own; a family of one is another cluster than
      the family of the same name of another.
    name: of the row.

  Returns:
    Decoding → for each of GAINS {measure}_gain: the mean difference; the same with _ci95.
  """
  gains: dict[str, dict[str, Any]] = {}
  for decoding in DECODINGS:
    differences: dict[str, list[np.ndarray]] = {measure: [] for measure in GAINS}
    clusters: list[str] = []
    for workdir in workdirs:
      metas = read_metas(workdir)
      own, sft = (read_verdicts(workdir, row, decoding) for row in (name, 'sft'))
      clusters += [f'{workdir} {metas[prompt_id]["family"]}' for prompt_id in own]
      for measure, of_runs in differences.items():
        means = [as_array(verdicts, measure).mean(axis=1) for verdicts in (own, sft)]
        of_runs.append(means[0] - means[1])
    gains[decoding] = {}
    for measure, of_runs in differences.items():
      of_prompts = np.concatenate(of_runs)
      gains[decoding][f'{measure}_gain'] = float(of_prompts.mean())
      gains[decoding][f'{measure}_gain_ci95'] = list(winrate.bootstrap(of_prompts, clusters))
  return gains


def read_metas(workdir: Path) -> dict[str, requests.Meta]:
  """Reads what is known of each prompt of a run's final table, by the id of the prompt."""
  config = read_config(workdir)
  section = config['evaluation']
  its_world = world.draw_world(config['seed'], section['data']['people'])
  prompts = requests.prompts(its_world, section['split'])
  return {prompt.id: prompt.meta for prompt in prompts}


def read_config(workdir: Path) -> dict[str, Any]:
  """Reads the config of a run."""
  return json.loads((workdir / 'config.json').read_text())


def read_verdicts(workdir: Path, model: str, decoding: str) -> Verdicts:
  """Reads the verdicts on a row of the final table, by the id of the prompt, in a fixed order."""
  verdicts: Verdicts = {}
  for row in kept_responses.read(workdir):
    if (row.evaluation, row.model, row.decoding) == (kept_responses.FINAL, model, decoding):
      verdicts.setdefault(row.prompt_id, []).append(row.verdict)
  return dict(sorted(verdicts.items()))


def keep_kinds(
  verdicts: Verdicts, metas: Mapping[str, requests.Meta], kinds: Sequence[str]
) -> Verdicts:
  """Keeps the verdicts on prompts of some kinds."""
  return {
    prompt_id: of_prompt
    for prompt_id, of_prompt in verdicts.items()
    if metas[prompt_id]['kind'] in kinds
  }


def as_array(verdicts: Verdicts, measure: str) -> np.ndarray:
  """Takes a measure of S responses to each of N prompts: [N, S] float."""
  return np.array([[one[measure] for one in of_prompt] for of_prompt in verdicts.values()])


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
