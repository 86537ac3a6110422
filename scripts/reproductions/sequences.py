"""Claims in a world of sequences with a transparent gold reward.

The reference draws every token with the same probability. The gold reward grows with
one direction of the counts of tokens and turns down beyond a knee, which few samples of
the reference show: there a proxy that is learnt from comparisons goes wrong.

Letters: T tokens of a response, V kinds of token, N rankings of K responses, B responses
of a step of RL, F features.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import policies
from reproductions.claims import as_floats, Measured

from rlhf_jax.evaluation import overoptimisation
from rlhf_jax.objectives import advantages, ranking

QUARTERS = 4  # of a response; positions are told apart in these


@dataclasses.dataclass(frozen=True)
class World:
  """The responses, and the gold reward 0.8 z − fall · max(0, z − knee)² + 0.6 f."""

  tokens: int  # V
  length: int  # T, a multiple of 4
  knee: float  # in standard deviations of z
  fall: float

  @property
  def features(self) -> int:
    """F, the number of features."""
    return QUARTERS * self.tokens

  def features_of(self, responses: Any) -> jax.Array:
    """Counts each token in each quarter: [..., T] int → [..., F] float32 of variance 1."""
    each = self.length // QUARTERS
    parts = jnp.asarray(responses).reshape(*responses.shape[:-1], QUARTERS, each)
    counts = jax.nn.one_hot(parts, self.tokens).sum(-2)  # [..., 4, V]
    flat = counts.reshape(*responses.shape[:-1], self.features)
    return (flat - each / self.tokens) / np.sqrt(each / self.tokens)

  def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draws responses of the reference, [*shape, T] int32."""
    return rng.integers(0, self.tokens, (*shape, self.length)).astype(np.int32)

  def make_gold(self, seed: int) -> Any:
    """Returns gold(features), with z and f functions of the features that the seed draws."""
    rng = np.random.default_rng(seed)
    size = self.features
    direction = jnp.float32(rng.normal(size=size) / np.sqrt(size))
    inner = jnp.float32(rng.normal(size=(size, 16)) / np.sqrt(size))
    outer = jnp.float32(rng.normal(size=16) / 2.5)

    def gold(features: Any) -> jax.Array:
      z = features @ direction
      other = jnp.tanh(features @ inner) @ outer
      return 0.8 * z - self.fall * jnp.maximum(z - self.knee, 0) ** 2 + 0.6 * other

    return gold


# Proxies.


def init_proxy(key, features, units):
  first, second = jax.random.split(key)
  return {
    'inner': jax.random.normal(first, (features, units)) / np.sqrt(features),
    'outer': jax.random.normal(second, (units,)) / np.sqrt(units),
  }


def apply_proxy(params, features):
  return jnp.tanh(features @ params['inner']) @ params['outer']


def train_proxy(features, ranks, seed, options, loss='pairwise'):
  """Trains a proxy on N rankings of K responses by the package's losses.

  Args:
    features: [N, K, F] float32.
    ranks: [N, K] int32, 1 = best.
    seed: of the parameters and the batches.
    options: units; updates; rate, which falls linearly to 0; batch, rankings of an
      update.
    loss: a name of ranking.REWARD_LOSSES.
  """
  updates, batch = options['updates'], options['batch']
  function = ranking.REWARD_LOSSES[loss].function
  group = jnp.ones((batch, features.shape[1]), jnp.int32)

  def compute(params, key):
    rows = jax.random.randint(key, (batch,), 0, len(features))
    total, count = function(apply_proxy(params, features[rows]), ranks[rows], group)
    return total / count

  key = jax.random.key(seed)
  params = init_proxy(key, features.shape[-1], options['units'])
  keys = jax.random.split(jax.random.fold_in(key, 1), updates)
  return policies.run_adam(compute, params, keys, options['rate'])


def make_pairs(world, gold, rng, count, flips=0.0):
  """Draws pairs labelled by the gold reward: features [count, 2, F], ranks [count, 2]."""
  features = world.features_of(world.draw(rng, count, 2))
  golds = np.asarray(gold(features))
  first = (golds[:, 0] > golds[:, 1]) != (rng.random(count) < flips)
  return features, jnp.asarray(np.where(first[:, None], [1, 2], [2, 1]), jnp.int32)


def held_out_accuracy(world, params, gold, seed):
  features = world.features_of(world.draw(np.random.default_rng(10_000 + seed), 4000, 2))
  golds, scores = np.asarray(gold(features)), np.asarray(apply_proxy(params, features))
  return float(np.mean((golds[:, 0] > golds[:, 1]) == (scores[:, 0] > scores[:, 1])))


# Best-of-n.


@dataclasses.dataclass(frozen=True)
class Pool:
  """Samples of the reference, with which rewards are put on one scale and best-of-n is made."""

  features: jax.Array  # [M, F]
  golds: np.ndarray  # [M], of mean 0 and variance 1
  gold_mean: float
  gold_scale: float

  def standardise(self, params: Any) -> tuple[np.ndarray, float, float]:
    """Returns a proxy's scores [M] with mean 0 and variance 1, and both as they were."""
    scores = np.asarray(apply_proxy(params, self.features), np.float64)
    return (scores - scores.mean()) / scores.std(), scores.mean(), scores.std()

  def best_of_n(self, scores: np.ndarray, largest: int) -> dict[str, np.ndarray]:
    """Returns gold and proxy of the best of 1, 2, 4 … `largest` by some scores."""
    counts = [2**k for k in range(largest.bit_length())]
    return overoptimisation.best_of_n(scores[None], self.golds[None], counts)


def draw_pool(world, gold, seed, size):
  features = world.features_of(world.draw(np.random.default_rng(20_000 + seed), size))
  golds = np.asarray(gold(features), np.float64)
  mean, scale = golds.mean(), golds.std()
  return Pool(features, (golds - mean) / scale, mean, scale)


def run_r4(settings: Mapping[str, Any], seed: int) -> Measured:
  """Over-optimises a proxy by best-of-n."""
  world = World(**settings['world'])
  gold = world.make_gold(seed)
  rng = np.random.default_rng(seed)
  pairs = make_pairs(world, gold, rng, settings['pairs'])
  params = train_proxy(*pairs, seed, settings['proxy'])
  pool = draw_pool(world, gold, seed, settings['pool'])
  found = pool.best_of_n(pool.standardise(params)[0], settings['largest_n'])
  fit = overoptimisation.fit_form(found['kl'], found['gold'], 'best_of_n')
  peak = int(np.argmax(found['gold']))
  x = as_floats(np.sqrt(found['kl']))
  return Measured(
    {
      'place of the gold peak (0 first, 1 last)': peak / (len(found['kl']) - 1),
      'last gold / peak': float(found['gold'][-1] / found['gold'][peak]),
      'least rise of the proxy': float(np.diff(found['proxy']).min()),
      'R² of d (α − β d)': fit['r_squared'],
      'α': fit['alpha'],
      'β': fit['beta'],
      'gold at the peak': float(found['gold'][peak]),
      'accuracy of the proxy': held_out_accuracy(world, params, gold, seed),
      'KL at the peak': float(found['kl'][peak]),
    },
    {
      'best of n, against √KL': {
        'gold': (x, as_floats(found['gold'])),
        'proxy': (x, as_floats(found['proxy'])),
      }
    },
  )


def run_r6(settings: Mapping[str, Any], seed: int) -> Measured:
  """Trains proxies on more and more pairs."""
  world = World(**settings['world'])
  gold = world.make_gold(seed)
  rng = np.random.default_rng(seed)
  sizes = [settings['fewest'] * 2**k for k in range(settings['doublings'] + 1)]
  features, ranks = make_pairs(world, gold, rng, sizes[-1])
  accuracies = []
  for size in sizes:
    # One pass over the data.
    options = {**settings['proxy'], 'updates': size // settings['proxy']['batch']}
    params = train_proxy(features[:size], ranks[:size], seed, options)
    accuracies.append(held_out_accuracy(world, params, gold, seed))
  return Measured(
    {
      'gain from the fewest to the most pairs': accuracies[-1] - accuracies[0],
      'least step of doubling': float(np.diff(accuracies).min()),
      'accuracy with eight times the fewest': accuracies[3],
    },
    {
      'held-out accuracy against log2 of the pairs': {
        'accuracy': (as_floats(np.log2(sizes)), as_floats(accuracies))
      }
    },
  )


def run_r7(settings: Mapping[str, Any], seed: int) -> Measured:
  """Compares rankings of K as one element with their pairs as elements of their own.

  Labels are drawn by Bradley–Terry's (Plackett–Luce's) probabilities.
  """
  world = World(**settings['world'])
  gold = world.make_gold(seed)
  rng = np.random.default_rng(seed)
  K, count = settings['responses'], settings['rankings']

  def rankings(count):
    responses = world.draw(rng, count, K)
    # What the responses of a prompt have in common.
    shared = world.length // 3
    responses[..., :shared] = responses[:, :1, :shared]
    features = world.features_of(responses)
    noisy = np.asarray(gold(features)) + rng.gumbel(size=(count, K)) / 2
    return features, jnp.asarray(np.argsort(np.argsort(-noisy, axis=1), axis=1) + 1, jnp.int32)

  features, ranks = rankings(count)
  held_out, order = rankings(settings['held_out'])
  # The same pairs as elements of their own, K (K − 1) / 2 of a ranking.
  i, j = np.triu_indices(K, 1)
  pair_features = jnp.stack([features[:, i], features[:, j]], axis=2)
  pair_features = pair_features.reshape(-1, 2, world.features)
  pair_ranks = jnp.stack([ranks[:, i], ranks[:, j]], axis=2).reshape(-1, 2)
  pair_ranks = jnp.argsort(jnp.argsort(pair_ranks, axis=1), axis=1).astype(jnp.int32) + 1
  every, batch = settings['passes'], settings['proxy']['batch']
  curves = {name: ([], []) for name in ('batched', 'shuffled', 'Plackett–Luce')}
  for passes in [*(p for p in (1, 2, 4) if p < every), every]:
    options = {**settings['proxy'], 'updates': passes * count // batch}
    apart = {**options, 'batch': len(i) * batch}
    models = {
      'batched': train_proxy(features, ranks, seed, options),
      'shuffled': train_proxy(pair_features, pair_ranks, seed, apart, 'plain_pairs'),
      'Plackett–Luce': train_proxy(features, ranks, seed, options, 'plackett_luce'),
    }
    for name, params in models.items():
      group = jnp.ones(order.shape, jnp.int32)
      total, pairs = ranking.plain_pairs(apply_proxy(params, held_out), order, group)
      curves[name][0].append(float(passes))
      curves[name][1].append(float(total / pairs))
  losses = {name: values[-1] for name, (_, values) in curves.items()}
  return Measured(
    {
      'log-loss of batched minus shuffled': losses['batched'] - losses['shuffled'],
      'responses scored for a ranking, batched / shuffled': K / (2 * len(i)),
      **{f'log-loss, {name}': value for name, value in losses.items()},
    },
    {
      'held-out log-loss against passes': {
        name: (x, as_floats(y)) for name, (x, y) in curves.items()
      }
    },
  )


def run_r14(settings: Mapping[str, Any], seed: int) -> Measured:
  """Over-optimises ensembles of proxies by best-of-n."""
  world = World(**settings['world'])
  gold = world.make_gold(seed)
  rng = np.random.default_rng(seed)
  pairs = make_pairs(world, gold, rng, settings['pairs'], settings['flips'])
  pool = draw_pool(world, gold, seed, settings['pool'])
  scores = []
  for member in range(settings['members']):
    # The members differ in their beginning and in the order of the data.
    params = train_proxy(*pairs, 100 * seed + member, settings['proxy'])
    scores.append(pool.standardise(params)[0])  # in units of each
  stacked = np.stack(scores)
  penalty = settings['variance_weight']
  combined = {
    'mean': stacked.mean(axis=0),
    'minimum': stacked.min(axis=0),
    'mean − variance': stacked.mean(axis=0) - penalty * stacked.var(axis=0),
  }
  found = [pool.best_of_n(score, settings['largest_n']) for score in scores]
  singles = np.stack([own['gold'] for own in found])  # [members, counts]
  x = as_floats(np.sqrt(found[0]['kl']))
  curves = {'single': (x, as_floats(singles.mean(axis=0)))}
  values = {'last gold, single': float(singles[:, -1].mean())}
  for name, score in combined.items():
    golds = pool.best_of_n(score, settings['largest_n'])['gold']
    values[f'last gold, {name}'] = float(golds[-1])
    curves[name] = (x, as_floats(golds))
  error = singles[:, -1].std(ddof=1) / np.sqrt(len(singles))
  values['minimum minus single'] = values['last gold, minimum'] - values['last gold, single']
  values['(minimum − single) / SE of single'] = values['minimum minus single'] / float(error)
  values['peak of single'] = float(singles.mean(axis=0).max())
  return Measured(values, {'gold of best-of-n against √KL': curves})


# RL.


def run_r5(settings: Mapping[str, Any], seed: int) -> Measured:
  """Over-optimises a proxy by PPO without a penalty, beside best-of-n from the same reference."""
  world = World(**settings['world'])
  gold = world.make_gold(seed)
  rng = np.random.default_rng(seed)
  pairs = make_pairs(world, gold, rng, settings['pairs'])
  params = train_proxy(*pairs, seed, settings['proxy'])
  pool = draw_pool(world, gold, seed, settings['pool'])
  scores, mean, scale = pool.standardise(params)
  B = settings['ppo']['responses']

  def score(responses, mask):
    del mask
    return (apply_proxy(params, world.features_of(responses)) - mean) / scale

  policy = policies.network_policy(world.tokens, world.length, settings['width'])
  rows = policies.ppo(policy, score, jax.random.key(seed), settings['ppo'])
  golds = [np.asarray(gold(world.features_of(responses))) for responses in rows['responses']]
  golds = (np.stack(golds) - pool.gold_mean) / pool.gold_scale  # [steps, B]
  curve, error = golds.mean(axis=1), golds.std(axis=1) / np.sqrt(B)
  smooth = np.convolve(curve, np.ones(9) / 9, 'valid')  # a peak of noise is none
  peak = int(np.argmax(smooth)) + 4
  # Smoothed, as a single step has too few responses for the form to be seen.
  fit = overoptimisation.fit_form(rows['kl'][4:-4], smooth, 'rl')
  of_n = pool.best_of_n(scores, settings['largest_n'])
  kl_of_n = of_n['kl'][int(np.argmax(of_n['gold']))]
  x = as_floats(np.sqrt(np.maximum(rows['kl'], 0)))
  last = curve[-20:].mean()
  return Measured(
    {
      '(gold peak − last gold) / 2 SE': float((smooth.max() - last) / (2 * error[-1])),
      'last proxy / largest proxy': float(rows['reward'][-20:].mean() / rows['reward'].max()),
      'R² of d (α − β log d)': fit['r_squared'],
      'KL of RL / of best-of-n, at their peaks': float(rows['kl'][peak] / kl_of_n),
      'gold at the peak': float(smooth.max()),
      'gold at the peak of best-of-n': float(of_n['gold'].max()),
      'last gold': float(last),
      'KL at the peak': float(rows['kl'][peak]),
      'last KL': float(rows['kl'][-20:].mean()),
    },
    {
      'PPO with β = 0, against √KL': {
        'gold': (x, as_floats(curve)),
        'proxy': (x, as_floats(rows['reward'])),
        'gold, best of n': (as_floats(np.sqrt(of_n['kl'])), as_floats(of_n['gold'])),
        'proxy, best of n': (as_floats(np.sqrt(of_n['kl'])), as_floats(of_n['proxy'])),
      }
    },
  )


def run_r9(settings: Mapping[str, Any], seed: int) -> Measured:
  """Lets the coefficient of the KL adapt to a target."""
  world = World(**settings['world'])
  # A reward without a knee, so that any KL is worth its price at some β.
  rng = np.random.default_rng(seed)
  direction = jnp.float32(rng.normal(size=world.features) / np.sqrt(world.features))

  def score(responses, mask):
    del mask
    return world.features_of(responses) @ direction

  policy = policies.table_policy(world.tokens, world.length)
  rows = policies.ppo(policy, score, jax.random.key(seed), settings['ppo'])
  target, steps = settings['ppo']['target'], settings['ppo']['steps']
  last = rows['kl'][-(steps // 5) :].mean()
  x = as_floats(range(steps))
  return Measured(
    {'mean KL of the last fifth / target': float(last / target), 'last β': float(rows['beta'][-1])},
    {f'KL against steps, target {target:g}': {'KL': (x, as_floats(rows['kl']))}},
  )


EOS = 0


def up_to_the_end(responses):
  """Says which tokens are those up to and including the first end token, [B, T] bool."""
  ended = jnp.cumsum(responses == EOS, axis=1)
  return (ended - (responses == EOS)) == 0


def run_r10(settings: Mapping[str, Any], seed: int) -> Measured:
  """Trains with and without a penalty for responses that do not end.

  Every token is worth something, so that a longer response scores more.
  """
  world = World(**settings['world'])
  worth = np.random.default_rng(seed).normal(0.3, 0.3, world.tokens)
  worth = jnp.float32(worth).at[EOS].set(0.0)

  def plain(responses, mask):
    return jnp.where(mask, worth[responses], 0.0).sum(1)

  def penalised(responses, mask):
    has_end = (responses == EOS).any(axis=1)
    return jnp.where(has_end, plain(responses, mask), settings['penalty'])

  policy = policies.table_policy(world.tokens, world.length, raised=EOS, by=0.6)
  rates, values = {}, {}
  for name, score in (('with', penalised), ('without', plain)):
    rows = policies.ppo(policy, score, jax.random.key(seed), settings['ppo'], up_to_the_end)
    ends = (rows['responses'] == EOS).any(axis=2).mean(axis=1)
    rates[name] = (as_floats(range(len(ends))), as_floats(ends))
    values[f'rate of ends, {name} the penalty'] = float(ends[-20:].mean())
    values['rate of ends, reference'] = float(ends[0])
  values['gain of the penalty'] = (
    values['rate of ends, with the penalty'] - values['rate of ends, without the penalty']
  )
  values['largest change by a constant'] = change_by_constant(seed, world.length)
  return Measured(values, {'rate of ends against steps': rates})


def change_by_constant(seed: int, length: int) -> float:
  """Returns the largest change of a group advantage if 3 is added to all scores."""
  rng = np.random.default_rng(seed)
  scores = jnp.float32(rng.normal(size=(64, 4)))
  lengths = jnp.full(scores.shape, length)
  changes = []
  for name in ('leave_one_out', 'standardised', 'above_mean'):
    function = advantages.GROUP_ADVANTAGES[name]
    change = jnp.abs(function(scores + 3.0, lengths) - function(scores, lengths)).max()
    changes.append(float(change))
  return max(changes)


MEASURES = {
  'R4': run_r4,
  'R5': run_r5,
  'R6': run_r6,
  'R7': run_r7,
  'R9': run_r9,
  'R10': run_r10,
  'R14': run_r14,
}
