"""Compares active selection with random selection of the items that people rank, on TinyWorld.

  python scripts/compare_selection.py --base=runs/quickstart --workdir=runs/selection --repeats=4

BASE is a workdir in which the quickstart has run. Its SFT responses are made into items of four.
One arm ranks all labels at once, of randomly drawn items. The other arm begins with a third of
the labels, trains a reward model, and asks for the items about which that model is least certain,
twice. Both arms train their last reward model from SFT with the same number of steps. An item has
the same ranking in both arms. Prints, for each repeat and arm, the share of pairs of held-out
responses that the last reward model orders as the oracle does, and writes WORKDIR/results.json.
"""

import argparse
from collections.abc import Callable, Sequence
import json
from pathlib import Path
import shutil
import time
from typing import Any

import numpy as np
from scipy import stats

from rlhf_jax.collect import selection
from rlhf_jax.commands import collect_models
from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt, Ranking
from rlhf_jax.data.tinyworld import oracle, people, requests
from rlhf_jax.data.tinyworld.world import draw_world
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.stages.shared.context import Context

_RESPONSES = 4  # of an item
_MARGIN = 0.05  # pairs whose utilities differ by less are not counted
_BATCH = 64  # responses that a reward model scores at once
_EXPERIMENT = 'experiments/quickstart.py'

Score = Callable[[Sequence[Ranking]], list[np.ndarray]]


def read_items(base: Path, split: str, prompts: dict[str, Prompt]) -> list[Ranking]:
  """Returns items of four responses, from the quickstart's rankings of a split."""
  items = []
  for row in records.read_records(base / 'feedback' / f'{split}.jsonl', 'ranking'):
    if row.id.removesuffix(f'/{split}') not in prompts:
      raise SystemExit(f'{row.id}: not a prompt of this seed')
    for first in range(0, len(row.responses) - _RESPONSES + 1, _RESPONSES):
      responses = row.responses[first : first + _RESPONSES]
      items.append(
        Ranking(
          id=row.id.removesuffix(f'/{split}'),
          source='',
          license='',
          domain='',
          context='',
          messages=row.messages,
          responses=responses,
          ranks=[1] * len(responses),
        )
      )
  return items


def rank_items(items: Sequence[Ranking], prompts: dict[str, Prompt], seed: int) -> None:
  """Fills in the ranks; one of five simulated annotators ranks each item."""
  rng = np.random.default_rng(seed)
  annotators = people.draw_annotators(5, seed)
  for item in items:
    who = annotators[int(rng.integers(len(annotators)))]
    item.ranks[:] = people.rank_responses(prompts[item.id], item.responses, who, rng)


def train_reward(
  base: Path, folder: Path, items: Sequence[Ranking], seed: int, epochs: int
) -> Score:
  """Trains a reward model on ranked items, and returns its scoring function."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  for name in ('tokenizer', 'pretrain', 'sft'):
    (folder / name).symlink_to((base / name).resolve())
  for split, rows in (('train', items), ('validation', items[:8])):
    records.write_records(folder / f'{split}.jsonl', rows)
  steps = max(1, epochs * len(items) // 8)
  settings = dict(responses_per_row=_RESPONSES, eval_records=8, centre=False)
  overrides = [f'reward.{name}={value}' for name, value in settings.items()]
  overrides += [f'reward.loop.{name}={steps}' for name in ('steps', 'eval_every', 'save_every')]
  overrides += [f"reward.data.path=('{folder}/{{split}}.jsonl',)", f'seed={seed}']
  config = pipeline.load_config(_EXPERIMENT, overrides)
  (folder / 'config.json').write_text(configs.as_json(config), encoding='utf-8')
  layout = pipeline.make_layout(config, folder)
  config = configs.resolve(config, workdir=folder, data=config.data)
  tokenizer = pipeline.open_tokenizer(config, folder)
  pipeline.run_stage(Context(config, 'reward', folder, layout, tokenizer))
  score = collect_models.open_score(str(folder / 'reward'), _BATCH)

  def score_items(rows: Sequence[Ranking]) -> list[np.ndarray]:
    return score([row.messages for row in rows], [row.responses for row in rows])

  return score_items


def measure_accuracy(
  score: Score, held_out: Sequence[Ranking], utilities: list[np.ndarray]
) -> float:
  """Returns the share of pairs that a reward model orders as the oracle's utilities do."""
  right = 0.0
  pairs = 0
  for values, truth in zip(score(held_out), utilities, strict=True):
    rows, columns = np.triu_indices(len(truth), 1)
    difference = truth[rows] - truth[columns]
    counted = np.abs(difference) >= _MARGIN
    agreement = np.sign(values[rows] - values[columns]) * np.sign(difference)
    right += float((agreement[counted] > 0).sum()) + 0.5 * float((agreement[counted] == 0).sum())
    pairs += int(counted.sum())
  return right / pairs


def select(score: Score, items: Sequence[Ranking], taken: set[int], count: int) -> list[int]:
  """Returns the numbers of the items that are not taken and most uncertain."""
  free = [number for number in range(len(items)) if number not in taken]
  values = score([items[number] for number in free])
  doubts = []
  for number, row in zip(free, values, strict=True):
    doubts.append(selection.measure_doubt(row[None], items[number].responses))
  order = np.argsort(-np.array(doubts), kind='stable')
  return [free[place] for place in order[:count]]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--base', required=True, type=Path)
  parser.add_argument('--workdir', required=True, type=Path)
  parser.add_argument('--seed', type=int, default=0, help='of the world, that of BASE')
  parser.add_argument('--repeats', type=int, default=4)
  parser.add_argument('--labels', type=int, default=300)
  parser.add_argument('--epochs', type=int, default=2)
  options = parser.parse_args()
  world = draw_world(options.seed)
  prompts = {}
  for split in ('train', 'validation'):
    prompts |= {prompt.id: prompt for prompt in requests.prompts(world, split)}
  items = read_items(options.base, 'train', prompts)
  held_out = read_items(options.base, 'validation', prompts)
  utilities = []
  for row in held_out:
    verdicts = [oracle.judge(prompts[row.id], text) for text in row.responses]
    utilities.append(np.array([verdict.utility for verdict in verdicts]))
  third = options.labels // 3
  results: list[dict[str, Any]] = []
  for repeat in range(options.repeats):
    rank_items(items, prompts, seed=1000 * options.seed + repeat)
    order = np.random.default_rng(repeat).permutation(len(items)).tolist()

    def train(numbers: Sequence[int]) -> Score:
      rows = [items[number] for number in numbers]
      return train_reward(options.base, options.workdir / 'fit', rows, options.seed, options.epochs)

    once = measure_accuracy(train(order[: 3 * third]), held_out, utilities)
    taken = order[:third]
    seconds = []
    for _ in range(2):
      began = time.perf_counter()
      score = train(taken)
      taken = taken + select(score, items, set(taken), third)
      seconds.append(time.perf_counter() - began)
    active = measure_accuracy(train(taken), held_out, utilities)
    results.append(dict(repeat=repeat, once=once, active=active, refit_and_select=seconds))
    print(json.dumps(results[-1]), flush=True)
    (options.workdir / 'results.json').write_text(json.dumps(results, indent=1), encoding='utf-8')
  gains = np.array([row['active'] - row['once'] for row in results])
  if len(gains) > 1:
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    print(f'active − one-shot: {100 * gains.mean():.2f} ± {100 * half:.2f} points')


if __name__ == '__main__':
  main()
