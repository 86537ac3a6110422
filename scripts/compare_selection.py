"""Compares active selection with random selection of the items that people rank, on TinyWorld.

  python scripts/compare_selection.py --base=runs/quickstart --workdir=runs/selection --repeats=20

BASE is a workdir in which the quickstart has run. Its SFT responses are made into items of four.
One arm ranks all labels at once, of randomly drawn items. The other arms begin with a third of
the labels, train a reward model, and ask for the items about which it is least certain, twice:
`single` with one reward model, `ensemble` with four that learn from bootstrap samples of the
rankings. An item has the same ranking in all arms.

The reward models are linear: a score is w · x, where x are features of the frozen SFT model (its
hidden states at the last token and on average over the response, and the likelihood and length of
the response). So a comparison takes seconds. `--whole_model` trains the quickstart's reward
model, all of its weights, for the arms `once` and `single` instead.

Prints for each arm the share of pairs of held-out responses that the last reward model orders as
the oracle does, and writes WORKDIR/results.json.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import json
from pathlib import Path
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, stats

from rlhf_jax.collect import selection
from rlhf_jax.commands import collect_models, lines
from rlhf_jax.data import records
from rlhf_jax.data.records import Prompt, Ranking
from rlhf_jax.data.tinyworld import oracle, people, requests
from rlhf_jax.data.tinyworld.world import draw_world
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import pipeline
from rlhf_jax.models import heads
from rlhf_jax.models.transformer import Model
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.types import Params

_RESPONSES = 4  # K, of an item
_MARGIN = 0.05  # pairs whose utilities differ by less are not counted
_BATCH = 64  # responses that a model reads at once
_MEMBERS = 4  # of an ensemble
_PENALTY = 30.0  # of |w|²/2; of 0.3, 3, 10 and 30 that with which the arm `once` is best on seed 0
_EXPERIMENT = 'experiments/quickstart.py'

Scores = np.ndarray  # [N, K] float64, of all items, those to rank before those held out
Learn = Callable[[Sequence[int]], Scores]  # numbers of ranked items → scores


def read_items(base: Path, split: str, prompts: dict[str, Prompt]) -> list[Ranking]:
  """Returns items of four responses, from the quickstart's rankings of a split."""
  items = []
  for row in records.read_records(base / 'feedback' / f'{split}.jsonl', 'ranking'):
    identifier = row.id.removesuffix(f'/{split}')
    if identifier not in prompts:
      raise SystemExit(f'{row.id}: not a prompt of this seed')
    for first in range(0, len(row.responses) - _RESPONSES + 1, _RESPONSES):
      responses = row.responses[first : first + _RESPONSES]
      item = Ranking(
        id=identifier,
        source='',
        license='',
        domain='',
        context='',
        messages=row.messages,
        responses=responses,
        ranks=[1] * len(responses),
      )
      items.append(item)
  return items


def rank_items(items: Sequence[Ranking], prompts: dict[str, Prompt], seed: int) -> None:
  """Fills in the ranks; one of five simulated annotators ranks each item."""
  rng = np.random.default_rng(seed)
  annotators = people.draw_annotators(5, seed)
  for item in items:
    who = annotators[int(rng.integers(len(annotators)))]
    item.ranks[:] = people.rank_responses(prompts[item.id], item.responses, who, rng)


def select(
  members: Sequence[Scores],
  items: Sequence[Ranking],
  taken: Sequence[int],
  count: int,
) -> list[int]:
  """Returns the numbers of the items that are not taken and most uncertain."""
  free = sorted({*range(len(items))} - {*taken})
  doubts = []
  for number in free:
    scores = np.stack([member[number] for member in members])
    doubts.append(selection.measure_doubt(scores, items[number].responses))
  order = np.argsort(-np.array(doubts), kind='stable')
  return [free[place] for place in order[:count]]


def measure_accuracy(scores: np.ndarray, utilities: np.ndarray) -> float:
  """Returns the share of pairs that scores [N, K] order as the utilities [N, K] do."""
  rows, columns = np.triu_indices(_RESPONSES, 1)
  difference = utilities[:, rows] - utilities[:, columns]
  agreement = np.sign(scores[:, rows] - scores[:, columns]) * np.sign(difference)
  counted = agreement[np.abs(difference) >= _MARGIN]
  return float(np.mean((counted + 1) / 2))  # equal scores are half right


# Linear reward models.


def read_features(base: Path, items: Sequence[Ranking]) -> np.ndarray:
  """Computes the features of all responses by the SFT model: [N, K, F], standardised."""
  options = argparse.Namespace(model=str(base / 'sft'), mesh='', batch_size=_BATCH, dtype='float32')
  opened = lines.open_model(options)
  tokenizer = opened.tokenizer
  assert tokenizer is not None
  rows = []
  for item in items:
    prompt = tokenizer.prompt(list(item.messages))
    rows += [(prompt, tokenizer.response(text)) for text in item.responses]
  length = max(len(prompt) + len(response) for prompt, response in rows)
  read = jax.jit(functools.partial(compute_features, opened.model))
  batches = []
  for first in range(0, len(rows), _BATCH):
    tokens = np.zeros((_BATCH, length), np.int32)
    mask = np.zeros((_BATCH, length), bool)
    is_response = np.zeros((_BATCH, length), bool)
    for place, (prompt, response) in enumerate(rows[first : first + _BATCH]):
      end = len(prompt) + len(response)
      tokens[place, :end] = prompt + response
      mask[place, :end] = True
      is_response[place, len(prompt) : end] = True
    batches.append(np.asarray(read(opened.params, tokens, mask, is_response)))
  features = np.concatenate(batches)[: len(rows)].astype(np.float64)
  features = (features - features.mean(0)) / (features.std(0) + 1e-6)
  return features.reshape(len(items), _RESPONSES, -1)


def compute_features(
  model: Model,
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  is_response: jax.Array,
) -> jax.Array:
  """Computes the features of rows of tokens [B, T]: [B, F] float32."""
  positions = jnp.where(mask, jnp.arange(tokens.shape[1]), 0)
  hidden, _ = model.apply(params, tokens, positions, mask.astype(jnp.int32))  # [B, T, D]
  last = mask.sum(1) - 1
  last_hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  weight = is_response[:, 1:].astype(jnp.float32)
  count = weight.sum(1, keepdims=True)  # no response is empty: each has its end token
  mean_hidden = (hidden[:, 1:] * weight[..., None]).sum(1) / count
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])
  mean = (logprobs * weight).sum(1, keepdims=True) / count
  least = jnp.min(logprobs * weight, axis=1, keepdims=True)
  return jnp.concatenate([last_hidden, mean_hidden, mean, least, jnp.log1p(count)], axis=1)


def fit_linear(
  features: np.ndarray,
  items: Sequence[Ranking],
  numbers: Sequence[int],
) -> Scores:
  """Fits w by the pairwise loss on ranked items, and scores all items.

  Minimises Σ_items mean_{i above j} −log σ(w · (x_i − x_j)) + penalty |w|²/2.
  """
  rows, columns = np.triu_indices(_RESPONSES, 1)
  differences, weights = [], []
  for number in numbers:
    ranks = np.array(items[number].ranks)
    sign = np.sign(ranks[columns] - ranks[rows])  # 1 where the first is better, 0 for a tie
    pairs = np.flatnonzero(sign)
    if len(pairs):
      own = features[number]
      differences.append((own[rows[pairs]] - own[columns[pairs]]) * sign[pairs, None])
      weights.append(np.full(len(pairs), 1 / len(pairs)))
  x, weight = np.concatenate(differences), np.concatenate(weights)

  def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
    margin = x @ w
    value = float(weight @ np.logaddexp(0, -margin)) + _PENALTY * float(w @ w) / 2
    return value, _PENALTY * w - x.T @ (weight / (1 + np.exp(margin)))

  fitted = optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method='L-BFGS-B')
  return features @ fitted.x


# The quickstart's reward model.


def train_whole(
  base: Path,
  folder: Path,
  items: Sequence[Ranking],
  held_out: Sequence[Ranking],
  numbers: Sequence[int],
  seed: int,
) -> Scores:
  """Trains the quickstart's reward model from SFT for two epochs, and scores all items."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  for name in ('tokenizer', 'pretrain', 'sft'):
    (folder / name).symlink_to((base / name).resolve())
  ranked = [items[number] for number in numbers]
  for split, rows in (('train', ranked), ('validation', ranked[:8])):
    records.write_records(folder / f'{split}.jsonl', rows)
  steps = max(1, 2 * len(numbers) // 8)
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
  everything = [*items, *held_out]
  return np.stack(
    score([row.messages for row in everything], [row.responses for row in everything])
  )


def run_repeat(
  learn: Learn,
  items: Sequence[Ranking],
  utilities: np.ndarray,
  labels: int,
  repeat: int,
  arms: Sequence[str],
) -> dict[str, Any]:
  """Runs all arms once: {arm: accuracy, 'seconds': of each refit with the next selection}."""
  order = np.random.default_rng(repeat).permutation(len(items)).tolist()
  third = labels // 3
  result: dict[str, Any] = {'repeat': repeat, 'seconds': []}
  for arm in arms:
    rng = np.random.default_rng(repeat)
    taken = order[:third]
    if arm == 'once':
      taken = order[: 3 * third]
    while len(taken) < 3 * third:
      began = time.perf_counter()
      samples = [taken]
      if arm == 'ensemble':
        samples = [rng.choice(taken, len(taken)).tolist() for _ in range(_MEMBERS)]
      members = [learn(sample) for sample in samples]
      taken = taken + select(members, items, taken, third)
      result['seconds'].append(round(time.perf_counter() - began, 1))
    result[arm] = measure_accuracy(learn(taken)[len(items) :], utilities)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--base', required=True, type=Path)
  parser.add_argument('--workdir', required=True, type=Path)
  parser.add_argument('--seed', type=int, default=0, help='of the world, that of BASE')
  parser.add_argument('--repeats', type=int, default=20)
  parser.add_argument('--labels', type=int, default=300)
  parser.add_argument('--whole_model', action='store_true')
  options = parser.parse_args()
  world = draw_world(options.seed)
  prompts = {}
  for split in ('train', 'validation'):
    prompts |= {prompt.id: prompt for prompt in requests.prompts(world, split)}
  items = read_items(options.base, 'train', prompts)
  held_out = read_items(options.base, 'validation', prompts)
  verdicts = [[oracle.judge(prompts[row.id], text) for text in row.responses] for row in held_out]
  utilities = np.array([[verdict.utility for verdict in row] for row in verdicts])
  options.workdir.mkdir(parents=True, exist_ok=True)
  arms = ('once', 'single') if options.whole_model else ('once', 'single', 'ensemble')
  features = np.zeros(0)
  if not options.whole_model:
    features = read_features(options.base, [*items, *held_out])

  def learn(numbers: Sequence[int]) -> Scores:
    if options.whole_model:
      folder = options.workdir / 'fit'
      return train_whole(options.base, folder, items, held_out, numbers, options.seed)
    return fit_linear(features, items, numbers)

  results = []
  for repeat in range(options.repeats):
    rank_items(items, prompts, seed=1000 * options.seed + repeat)
    results.append(run_repeat(learn, items, utilities, options.labels, repeat, arms))
    print(json.dumps(results[-1]), flush=True)
    path = options.workdir / 'results.json'
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  print_gains(results, arms)


def print_gains(results: Sequence[dict[str, Any]], arms: Sequence[str]) -> None:
  """Prints the accuracy of each arm, and its gain over `once` with the 95% interval."""
  once = np.array([row['once'] for row in results])
  print(f'once: {100 * once.mean():.1f}%')
  for arm in arms[1:]:
    values = np.array([row[arm] for row in results])
    gains = 100 * (values - once)
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    print(f'{arm}: {100 * values.mean():.1f}%, {gains.mean():+.2f} ± {half:.2f} points')


if __name__ == '__main__':
  main()
