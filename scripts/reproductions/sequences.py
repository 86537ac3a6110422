"""Claims in a world of sequences with a transparent gold reward: 24 tokens, responses of 12.

The gold reward saturates in one direction, which few samples of the reference show:
there a proxy that is learnt from comparisons goes wrong.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reproductions.claims import as_floats, Band, Claim, Measured

from rlhf_jax.evaluation import overoptimisation
from rlhf_jax.objectives import advantages, divergence, policy_gradient, ranking

V, T = 24, 12
BUCKETS = 4  # positions are told apart in quarters
FEATURES = BUCKETS * V
HIDDEN = 32  # of proxies
POOL = 60_000  # samples for best-of-n
COUNTS = [2**k for k in range(13)]  # n to 4,096
ROWS = 512  # responses of a step of RL
UPDATES = 200  # of a proxy
MASK = jnp.ones((ROWS, T), bool)


# The gold reward.


def features_of(responses):
  """Counts each token in each quarter: [..., T] int → [..., 96] float32."""
  counts = jax.nn.one_hot(responses, V)  # [..., T, V]
  quarters = counts.reshape(*responses.shape[:-1], BUCKETS, T // BUCKETS, V).sum(-2)
  flat = quarters.reshape(*responses.shape[:-1], FEATURES)
  return (flat - T / BUCKETS / V) / np.sqrt(T / BUCKETS / V)


def make_gold(seed):
  """Returns gold(features): 0.8 z − 4 max(0, z − 1.25)² + 0.6 f, with z of variance 1."""
  rng = np.random.default_rng(seed)
  direction = jnp.float32(rng.normal(size=FEATURES) / np.sqrt(FEATURES))
  inner = jnp.float32(rng.normal(size=(FEATURES, 16)) / np.sqrt(FEATURES))
  outer = jnp.float32(rng.normal(size=16) / 2.5)

  def gold(features):
    z = features @ direction
    other = jnp.tanh(features @ inner) @ outer
    return 0.8 * z - 4.0 * jnp.maximum(z - 1.25, 0) ** 2 + 0.6 * other

  return gold


def draw(rng, *shape):
  return rng.integers(0, V, (*shape, T)).astype(np.int32)


# Proxies.


def init_proxy(key):
  first, second = jax.random.split(key)
  return {
    'inner': jax.random.normal(first, (FEATURES, HIDDEN)) / np.sqrt(FEATURES),
    'outer': jax.random.normal(second, (HIDDEN,)) / np.sqrt(HIDDEN),
  }


def apply_proxy(params, features):
  return jnp.tanh(features @ params['inner']) @ params['outer']


def train_proxy(features, ranks, seed, loss='pairwise', updates=UPDATES, rate=3e-3, batch=128):
  """Trains a proxy on N rankings of K responses by the package's losses.

  Args:
    features: [N, K, 96] float32.
    ranks: [N, K] int32, 1 = best.
    seed: of the parameters and the batches.
    loss: a name of ranking.REWARD_LOSSES.
    updates: optimizer updates.
    rate: the learning rate, which falls linearly to 0.
    batch: rankings of an update.
  """
  optimizer = optax.adam(optax.linear_schedule(rate, 0.0, updates))
  function = ranking.REWARD_LOSSES[loss].function
  group = jnp.ones((batch, features.shape[1]), jnp.int32)

  def compute(params, rows):
    total, count = function(apply_proxy(params, features[rows]), ranks[rows], group)
    return total / count

  def step(carry, key):
    params, opt_state = carry
    rows = jax.random.randint(key, (batch,), 0, len(features))
    updates_, opt_state = optimizer.update(jax.grad(compute)(params, rows), opt_state)
    return (optax.apply_updates(params, updates_), opt_state), None

  key = jax.random.key(seed)
  params = init_proxy(key)
  keys = jax.random.split(jax.random.fold_in(key, 1), updates)
  run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])
  return run(params)


def make_pairs(gold, rng, count, flips=0.0):
  """Draws pairs labelled by the gold reward: features [count, 2, 96], ranks [count, 2]."""
  features = features_of(draw(rng, count, 2))
  golds = np.asarray(gold(features))
  first = (golds[:, 0] > golds[:, 1]) != (rng.random(count) < flips)
  return features, jnp.asarray(np.where(first[:, None], [1, 2], [2, 1]), jnp.int32)


def held_out_accuracy(params, gold, seed):
  features = features_of(draw(np.random.default_rng(10_000 + seed), 4000, 2))
  golds, scores = np.asarray(gold(features)), np.asarray(apply_proxy(params, features))
  return float(np.mean((golds[:, 0] > golds[:, 1]) == (scores[:, 0] > scores[:, 1])))


# Best-of-n.


def best_of_n(gold, proxy, seed):
  """Returns the curves of best-of-n; gold and proxy have the mean 0 and the variance 1."""
  features = features_of(draw(np.random.default_rng(20_000 + seed), POOL))
  golds = np.asarray(gold(features), np.float64)
  scores = np.asarray(proxy(features), np.float64)
  golds, scores = ((x - x.mean()) / x.std() for x in (golds, scores))
  return overoptimisation.best_of_n(scores[None], golds[None], COUNTS)


def run_r4(seed):
  gold = make_gold(seed)
  rng = np.random.default_rng(seed)
  params = train_proxy(*make_pairs(gold, rng, 1024), seed)
  found = best_of_n(gold, functools.partial(apply_proxy, params), seed)
  fit = overoptimisation.fit_form(found['kl'], found['gold'], 'best_of_n')
  peak = int(np.argmax(found['gold']))
  x = as_floats(np.sqrt(found['kl']))
  return Measured(
    {
      'place of the gold peak (0 first, 1 last)': peak / (len(COUNTS) - 1),
      'last gold / peak': float(found['gold'][-1] / found['gold'][peak]),
      'least rise of the proxy': float(np.diff(found['proxy']).min()),
      'R² of d (α − β d)': fit['r_squared'],
      'α': fit['alpha'],
      'β': fit['beta'],
      'gold at the peak': float(found['gold'][peak]),
      'accuracy of the proxy': held_out_accuracy(params, gold, seed),
      'KL at the peak': float(found['kl'][peak]),
    },
    {
      'best of n, against √KL': {
        'gold': (x, as_floats(found['gold'])),
        'proxy': (x, as_floats(found['proxy'])),
      }
    },
  )


def run_r6(seed):
  gold = make_gold(seed)
  rng = np.random.default_rng(seed)
  features, ranks = make_pairs(gold, rng, 16384)
  sizes = [256 * 2**k for k in range(7)]
  accuracies = []
  for size in sizes:
    # One pass over the data, in batches of 32.
    params = train_proxy(
      features[:size], ranks[:size], seed, updates=size // 32, rate=1e-2, batch=32
    )
    accuracies.append(held_out_accuracy(params, gold, seed))
  return Measured(
    {
      'gain from 256 to 16,384 pairs': accuracies[-1] - accuracies[0],
      'least step of doubling': float(np.diff(accuracies).min()),
      'accuracy with 2,048 pairs': accuracies[3],
    },
    {
      'held-out accuracy against log2 of the pairs': {
        'accuracy': (as_floats(np.log2(sizes)), as_floats(accuracies))
      }
    },
  )


def run_r7(seed):
  """K = 6 rankings with labels drawn by Bradley–Terry's (Plackett–Luce's) probabilities."""
  gold = make_gold(seed)
  rng = np.random.default_rng(seed)

  def rankings(count):
    responses = draw(rng, count, 6)
    responses[..., :4] = responses[:, :1, :4]  # what the responses of a prompt have in common
    features = features_of(responses)
    noisy = np.asarray(gold(features)) + rng.gumbel(size=(count, 6)) / 2
    return features, jnp.asarray(np.argsort(np.argsort(-noisy, axis=1), axis=1) + 1, jnp.int32)

  features, ranks = rankings(400)
  held_out, order = rankings(1000)
  passes, batch = 8, 16
  updates = passes * 400 // batch
  # The same pairs as elements of their own: 15 of a ranking, 240 of an update.
  i, j = np.triu_indices(6, 1)
  pair_features = jnp.stack([features[:, i], features[:, j]], axis=2).reshape(-1, 2, FEATURES)
  pair_ranks = jnp.stack([ranks[:, i], ranks[:, j]], axis=2).reshape(-1, 2)
  pair_ranks = jnp.argsort(jnp.argsort(pair_ranks, axis=1), axis=1).astype(jnp.int32) + 1
  settings = dict(updates=updates, seed=seed)
  models = {
    'batched': train_proxy(features, ranks, loss='pairwise', batch=batch, **settings),
    'shuffled': train_proxy(
      pair_features, pair_ranks, loss='plain_pairs', batch=15 * batch, **settings
    ),
    'plackett_luce': train_proxy(features, ranks, loss='plackett_luce', batch=batch, **settings),
  }
  losses = {}
  for name, params in models.items():
    group = jnp.ones(order.shape, jnp.int32)
    total, count = ranking.plain_pairs(apply_proxy(params, held_out), order, group)
    losses[name] = float(total / count)
  return Measured(
    {
      'log-loss of batched minus shuffled': losses['batched'] - losses['shuffled'],
      'responses scored for a ranking, batched / shuffled': features.shape[1] / (2 * len(i)),
      'log-loss, batched': losses['batched'],
      'log-loss, shuffled': losses['shuffled'],
      'log-loss, Plackett–Luce': losses['plackett_luce'],
    }
  )


def run_r14(seed):
  gold = make_gold(seed)
  rng = np.random.default_rng(seed)
  proxies = []
  for number in range(5):
    features, ranks = make_pairs(gold, rng, 2048, flips=0.25)
    proxies.append(train_proxy(features, ranks, 100 * seed + number))
  pool = features_of(draw(np.random.default_rng(20_000 + seed), POOL))
  scores = np.stack([np.asarray(apply_proxy(params, pool), np.float64) for params in proxies])
  # In units of each proxy, as their scales differ.
  scores = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
  golds = np.asarray(gold(pool), np.float64)
  golds = (golds - golds.mean()) / golds.std()
  combined = {
    'single': scores[0],
    'mean': scores.mean(axis=0),
    'minimum': scores.min(axis=0),
    'mean − variance': scores.mean(axis=0) - scores.var(axis=0),
  }
  values, curves = {}, {}
  for name, score in combined.items():
    found = overoptimisation.best_of_n(score[None], golds[None], COUNTS)
    values[f'last gold, {name}'] = float(found['gold'][-1])
    curves[name] = (as_floats(np.sqrt(found['kl'])), as_floats(found['gold']))
  values['minimum minus single'] = values['last gold, minimum'] - values['last gold, single']
  return Measured(values, {'gold of best-of-n against √KL': curves})


# RL. The reference draws all tokens with the same probability.


def sample(table, key):
  """Samples from a table of logits [T, V + 1, V] by place and token before; V = none."""

  def step(previous, place):
    logits, key = place
    chosen = jax.random.categorical(key, logits[previous])
    return chosen, chosen

  start = jnp.full(ROWS, V)
  _, tokens = jax.lax.scan(step, start, (table, jax.random.split(key, T)))
  return tokens.T


def token_logprobs(table, responses):
  before = jnp.pad(responses[:, :-1], ((0, 0), (1, 0)), constant_values=V)
  logprobs = jax.nn.log_softmax(table)[jnp.arange(T), before]
  return jnp.take_along_axis(logprobs, responses[..., None], -1)[..., 0]


def values_of(table, responses):
  before = jnp.pad(responses[:, :-1], ((0, 0), (1, 0)), constant_values=V)
  return table[jnp.arange(T), before]


def ppo(score, key, steps, rate, coefficient=0.0, target=None, mask_of=None, start=None):
  """Trains a table by PPO from the reference.

  Args:
    score: (responses [B, T], mask) → [B] float32.
    key: the random key.
    steps: rollouts of 512 responses, of one epoch each.
    rate: the learning rate.
    coefficient: β, at first.
    target: of the adaptive KL controller; None = β stays.
    mask_of: responses → [B, T] bool, the tokens up to the end; None = all.
    start: the table of the reference; None = all logits are 0.

  Returns:
    A dict of curves over the steps: kl, reward (the score), beta, and `last`, the last responses.
  """
  reference = jnp.zeros((T, V + 1, V)) if start is None else start
  optimizer = optax.adam(rate)

  def loss(params, responses, mask, scores, beta, old, old_values):
    logprobs = token_logprobs(params['policy'], responses)
    values = values_of(params['value'], responses)
    kl = divergence.k1(old, token_logprobs(reference, responses))
    rewards = advantages.place_rewards(scores, kl, mask, beta)
    gains, returns = advantages.gae(rewards, old_values, mask, 1.0, 0.95)
    gains = (gains - gains.mean()) / (gains.std() + 1e-8)
    losses, *_ = policy_gradient.clipped(logprobs, old, gains, mask, 0.2, 0.2)
    value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
    count = mask.sum()
    return (jnp.where(mask, losses, 0).sum() + 0.5 * jnp.where(mask, value_losses, 0).sum()) / count

  def step(carry, key):
    params, opt_state, beta = carry
    responses = sample(params['policy'], key)
    mask = MASK if mask_of is None else mask_of(responses)
    scores = score(responses, mask)
    old = token_logprobs(params['policy'], responses)
    old_values = values_of(params['value'], responses)
    kl = divergence.k1(old, token_logprobs(reference, responses))
    mean_kl = jnp.where(mask, kl, 0.0).sum(1).mean()
    gradient = jax.grad(loss)(params, responses, mask, scores, beta, old, old_values)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    next_beta = beta
    if target is not None:
      # The horizon of Ziegler et al.: β changes by 1% in a step, or less.
      next_beta = divergence.adapt_kl_coefficient(beta, mean_kl, target, 10_000.0, ROWS)
    row = {'kl': mean_kl, 'reward': scores.mean(), 'beta': beta, 'responses': responses}
    return (params, opt_state, next_beta), row

  params = {'policy': reference, 'value': jnp.zeros((T, V + 1))}
  first = (params, optimizer.init(params), jnp.float32(coefficient))
  run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
  return jax.device_get(run(first, jax.random.split(key, steps)))


def run_r5(seed):
  gold = make_gold(seed)
  rng = np.random.default_rng(seed)
  params = train_proxy(*make_pairs(gold, rng, 1024), seed)
  pool = features_of(draw(np.random.default_rng(20_000 + seed), POOL))
  scales = {}
  for name, function in (('gold', gold), ('proxy', functools.partial(apply_proxy, params))):
    values = np.asarray(function(pool))
    scales[name] = (values.mean(), values.std())

  def score(responses, mask):
    del mask
    return apply_proxy(params, features_of(responses)) / scales['proxy'][1]

  rows = ppo(score, jax.random.key(seed), steps=400, rate=0.02)
  responses = rows['responses'].reshape(-1, T)
  golds = np.asarray(gold(features_of(responses))).reshape(len(rows['kl']), ROWS)
  golds = (golds - scales['gold'][0]) / scales['gold'][1]
  curve, error = golds.mean(axis=1), golds.std(axis=1) / np.sqrt(ROWS)
  proxy = rows['reward'] - scales['proxy'][0] / scales['proxy'][1]
  smooth = np.convolve(curve, np.ones(9) / 9, 'valid')  # a peak of noise is none
  peak = int(np.argmax(smooth)) + 4
  fit = overoptimisation.fit_form(rows['kl'], curve, 'rl')
  of_n = best_of_n(gold, functools.partial(apply_proxy, params), seed)
  kl_of_n = of_n['kl'][int(np.argmax(of_n['gold']))]
  x = as_floats(np.sqrt(np.maximum(rows['kl'], 0)))
  last = curve[-20:].mean()
  return Measured(
    {
      '(gold peak − last gold) / 2 SE': float((smooth.max() - last) / (2 * error[-1])),
      'last proxy / largest proxy': float(proxy[-20:].mean() / proxy.max()),
      'R² of d (α − β log d)': fit['r_squared'],
      'KL of RL / of best-of-n, at their peaks': float(rows['kl'][peak] / kl_of_n),
      'gold at the peak': float(smooth.max()),
      'last gold': float(last),
      'KL at the peak': float(rows['kl'][peak]),
    },
    {
      'PPO with β = 0, against √KL': {
        'gold': (x, as_floats(curve)),
        'proxy': (x, as_floats(proxy)),
        'gold, best of n': (as_floats(np.sqrt(of_n['kl'])), as_floats(of_n['gold'])),
      }
    },
  )


def run_r9(seed):
  # A reward without a saturation, so that any KL is worth its price at some β.
  direction = jnp.float32(np.random.default_rng(seed).normal(size=FEATURES) / np.sqrt(FEATURES))

  def score(responses, mask):
    del mask
    return features_of(responses) @ direction

  target = 6.0
  rows = ppo(score, jax.random.key(seed), 600, 0.05, coefficient=0.15, target=target)
  last = rows['kl'][-120:].mean()
  steps = as_floats(range(len(rows['kl'])))
  return Measured(
    {'mean KL of the last fifth / target': float(last / target), 'last β': float(rows['beta'][-1])},
    {'KL against steps, target 6': {'KL': (steps, as_floats(rows['kl']))}},
  )


EOS = 0


def up_to_the_end(responses):
  """Says which tokens are those up to and including the first end token, [B, T] bool."""
  ended = jnp.cumsum(responses == EOS, axis=1)
  return (ended - (responses == EOS)) == 0


def run_r10(seed):
  """Every token is worth something, so that a longer response scores more."""
  worth = jnp.float32(np.random.default_rng(seed).normal(0.3, 0.3, V)).at[EOS].set(0.0)

  def plain(responses, mask):
    return jnp.where(mask, worth[responses], 0.0).sum(1)

  def trick(responses, mask):
    has_end = (responses == EOS).any(axis=1)
    return jnp.where(has_end, plain(responses, mask), -1.0)

  reference = jnp.zeros((T, V + 1, V)).at[..., EOS].set(0.6)
  rates, values = {}, {}
  for name, score in (('with', trick), ('without', plain)):
    rows = ppo(score, jax.random.key(seed), 400, 0.02, 0.02, mask_of=up_to_the_end, start=reference)
    ends = (rows['responses'] == EOS).any(axis=2).mean(axis=1)
    rates[name] = (as_floats(range(len(ends))), as_floats(ends))
    values[f'rate of ends, {name} the penalty'] = float(ends[-20:].mean())
    values['rate of ends, reference'] = float(ends[0])
  values['gain of the penalty'] = (
    values['rate of ends, with the penalty'] - values['rate of ends, without the penalty']
  )
  rng = np.random.default_rng(seed)
  scores = jnp.float32(rng.normal(size=(64, 4)))
  lengths = jnp.full(scores.shape, T)
  changes = []
  for name in ('leave_one_out', 'standardised', 'above_mean'):
    function = advantages.GROUP_ADVANTAGES[name]
    change = jnp.abs(function(scores + 3.0, lengths) - function(scores, lengths)).max()
    changes.append(float(change))
  values['largest change by a constant'] = max(changes)
  return Measured(values, {'rate of ends against steps': rates})


CLAIMS = (
  Claim(
    id='R4',
    text='Best-of-n over-optimises: the proxy rises, the gold reward turns',
    source='Gao et al. 2022',
    arrangement='a proxy of 32 units from 1,024 gold-labelled pairs; n to 4,096, without bias from '
    '60,000 samples',
    bands={
      'place of the gold peak (0 first, 1 last)': Band(0.08, 0.92),
      'last gold / peak': Band(high=0.85),
      'least rise of the proxy': Band(low=0.0),
      'R² of d (α − β d)': Band(low=0.95),
      'α': Band(low=0.0),
      'β': Band(low=0.0),
    },
    run=run_r4,
    reported=('gold at the peak', 'accuracy of the proxy', 'KL at the peak'),
    note='The gold reward turns at n = 16 or 32 and then falls below that of the reference. The '
    'form misses its band a little: this gold falls with the square of a feature, and so faster at '
    'the end than d².',
  ),
  Claim(
    id='R5',
    text='RL over-optimises, and spends more KL than best-of-n until it does',
    source='Gao et al. 2022',
    arrangement='PPO without a KL penalty on a proxy from 1,024 pairs; 400 rollouts of 512',
    bands={
      '(gold peak − last gold) / 2 SE': Band(low=1.0),
      'last proxy / largest proxy': Band(low=0.98),
      'R² of d (α − β log d)': Band(low=0.9),
      'KL of RL / of best-of-n, at their peaks': Band(low=1.0),
    },
    run=run_r5,
    reported=('gold at the peak', 'last gold', 'KL at the peak'),
    note='The proxy rises while the gold reward falls below that of the reference. That RL needs '
    'more KL than best-of-n to its peak does not hold here: the policy is a table without any '
    'generalisation between prompts, which moves along the shortest way to the proxy’s optimum, '
    'while Gao et al. train a language model whose KL grows in every direction.',
  ),
  Claim(
    id='R6',
    text='The accuracy of a reward model grows with its data',
    source='Stiennon et al. 2020; Gao et al. 2022',
    arrangement='256 to 16,384 gold-labelled pairs, one pass in batches of 32; 4,000 held-out '
    'pairs',
    bands={
      'gain from 256 to 16,384 pairs': Band(low=0.10),
      'least step of doubling': Band(low=0.0),
      'accuracy with 2,048 pairs': Band(low=0.60),
    },
    run=run_r6,
  ),
  Claim(
    id='R7',
    text='All pairs of a ranking as one element cost K passes and do not overfit more',
    source='Ouyang et al. 2022',
    arrangement='400 rankings of 6 with noisy labels, 8 passes, the same number of updates and of '
    'pairs in each; held-out log-loss on 1,000 rankings',
    bands={
      'log-loss of batched minus shuffled': Band(high=0.005),
      'responses scored for a ranking, batched / shuffled': Band(0.19, 0.21),
    },
    run=run_r7,
    reported=('log-loss, batched', 'log-loss, shuffled', 'log-loss, Plackett–Luce'),
  ),
  Claim(
    id='R9',
    text='The adaptive coefficient brings the KL to its target',
    source='Ziegler et al. 2019',
    arrangement='PPO on a linear reward, target 6 nats, β 0.15 at first, horizon 10,000 '
    'episodes; 600 rollouts of 512',
    bands={'mean KL of the last fifth / target': Band(0.8, 1.2)},
    run=run_r9,
    reported=('last β',),
    note='A policy that learns more slowly than β moves makes the KL swing around its target: with '
    'a horizon of 5,120 and a learning rate of 0.02 it ranged from 3 to 24 nats.',
  ),
  Claim(
    id='R10',
    text='A penalty for responses without an end keeps them ending; a constant added to all scores '
    'changes no group advantage',
    source='Stiennon et al. 2020; Huang et al. 2024',
    arrangement='every token is worth something, so length pays; PPO with β 0.02, with and without '
    'a score of −1 for responses that do not end',
    bands={
      'rate of ends, with the penalty': Band(low=0.95),
      'gain of the penalty': Band(low=0.10),
      'largest change by a constant': Band(high=1e-5),
    },
    run=run_r10,
    reported=('rate of ends, without the penalty', 'rate of ends, reference'),
  ),
  Claim(
    id='R14',
    text='An ensemble’s minimum is no worse than one proxy under best-of-n',
    source='Coste et al. 2023',
    arrangement='five proxies from 2,048 pairs each, a quarter of the labels flipped; n = 4,096',
    bands={'minimum minus single': Band(low=0.0)},
    run=run_r14,
    reported=(
      'last gold, single',
      'last gold, mean',
      'last gold, minimum',
      'last gold, mean − variance',
    ),
    note='Here it does not hold: the five proxies saw pairs of the same kind, and all err in the '
    'same direction, of which no pair shows much. Their minimum is then no warning. It is an '
    'exploratory claim: Coste et al. report gains with fine-tuned language models.',
  ),
)
