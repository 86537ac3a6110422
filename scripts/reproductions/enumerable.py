"""Claims in a world whose 1,296 responses can be enumerated: 6 tokens, responses of 4.

A policy is a table of logits for each prefix. Its divergences, its expected reward
and the optimum π* ∝ π_ref exp(r / β) are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reproductions.claims import as_floats, Band, Claim, Measured

from rlhf_jax.evaluation import overoptimisation
from rlhf_jax.objectives import advantages, divergence, policy_gradient, preference

V, T = 6, 4
ROWS = 512  # responses, or pairs, of a step
STARTS = np.cumsum([0, *(V**t for t in range(T))])  # of the prefixes of each length
EVERY = np.stack(np.meshgrid(*[np.arange(V)] * T, indexing='ij'), -1).reshape(-1, T)
MASK = jnp.ones((ROWS, T), bool)
BETA = 0.5


def make_world(seed):
  """Returns the table of the reference, and the reward of every response [1296]."""
  rng = np.random.default_rng(seed)
  reference = jnp.float32(rng.normal(size=(STARTS[-1], V)))
  # A part of the reward depends on the first three tokens only.
  shared = rng.normal(size=V ** (T - 1)).repeat(V)
  return reference, jnp.float32(0.7 * rng.normal(size=V**T) + 0.7 * shared)


def rows_of(responses):
  """Returns the rows of the table that predict each token, [..., T]."""
  code = jnp.zeros(responses.shape[:-1], jnp.int32)
  rows = []
  for t in range(T):
    rows.append(STARTS[t] + code)
    code = code * V + responses[..., t]
  return jnp.stack(rows, -1)


def token_logprobs(table, responses):
  logprobs = jax.nn.log_softmax(table)[rows_of(responses)]
  return jnp.take_along_axis(logprobs, responses[..., None], -1)[..., 0]


def log_probabilities(table):
  """Returns log π of every response, [1296]."""
  return token_logprobs(table, jnp.asarray(EVERY)).sum(1)


def sample(table, key):
  responses = jnp.zeros((ROWS, T), jnp.int32)
  for t in range(T):
    logits = table[rows_of(responses)[:, t]]
    chosen = jax.random.categorical(jax.random.fold_in(key, t), logits)
    responses = responses.at[:, t].set(chosen)
  return responses


def number_of(responses):
  return jnp.dot(responses, V ** jnp.arange(T - 1, -1, -1))


def group_loss(advantage, loss, reduction, world, beta):
  """Builds the loss of a method whose baseline is a group of four responses."""

  def compute(params, key):
    reference, reward = world
    responses = sample(jax.lax.stop_gradient(params['policy']), key)
    logprobs = token_logprobs(params['policy'], responses)
    old = jax.lax.stop_gradient(logprobs)
    kl = divergence.k1(old, token_logprobs(reference, responses)).sum(1)
    total = (reward[number_of(responses)] - beta * kl).reshape(-1, 4)
    lengths = jnp.full(total.shape, T)
    gains = advantages.GROUP_ADVANTAGES[advantage](total, lengths).reshape(-1, 1)
    gains = jnp.broadcast_to(gains, (ROWS, T))
    losses, *_ = policy_gradient.POLICY_LOSSES[loss](logprobs, old, gains, MASK, 0.2, 0.2)
    total, weight = policy_gradient.REDUCTIONS[reduction](losses, MASK)
    return total / weight

  return compute


def ppo_loss(world, beta):
  def compute(params, key):
    reference, reward = world
    responses = sample(jax.lax.stop_gradient(params['policy']), key)
    logprobs = token_logprobs(params['policy'], responses)
    values = params['value'][rows_of(responses)]
    old, old_values = jax.lax.stop_gradient((logprobs, values))
    kl = divergence.k1(old, token_logprobs(reference, responses))
    rewards = advantages.place_rewards(reward[number_of(responses)], kl, MASK, jnp.float32(beta))
    gains, returns = advantages.gae(rewards, old_values, MASK, 1.0, 0.95)
    losses, *_ = policy_gradient.clipped(logprobs, old, gains, MASK, 0.2, 0.2)
    value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
    return jnp.mean(losses) + jnp.mean(value_losses)

  return compute


def dpo_loss(world, beta):
  """Builds DPO's loss on pairs of all responses, with Bradley–Terry's probabilities."""

  def compute(params, key):
    reference, reward = world
    numbers = jax.random.randint(key, (2, ROWS), 0, V**T)

    def response(i):
      responses = jnp.asarray(EVERY)[numbers[i]]
      own = token_logprobs(params['policy'], responses).sum(1)
      other = token_logprobs(reference, responses).sum(1)
      return preference.Response(own, other, jnp.full(ROWS, T))

    right = jax.nn.sigmoid(reward[numbers[0]] - reward[numbers[1]])
    settings = preference.DPOSettings(beta, 1 - right)
    return jnp.mean(preference.dpo(response(0), response(1), settings))

  return compute


METHODS = {
  'ppo': ppo_loss,
  'rloo': functools.partial(group_loss, 'leave_one_out', 'reinforce', 'sequence_sum'),
  'dr_grpo': functools.partial(group_loss, 'above_mean', 'clipped', 'constant'),
  'dpo': dpo_loss,
}


def train(method, world, beta, seed, steps=3000, rate=0.03, kept=1):
  """Trains a table, and returns it at `kept` even distances, [kept, rows, V]."""
  loss = METHODS[method](world, beta)
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.02))

  def step(carry, key):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  def part(carry, keys):
    carry, _ = jax.lax.scan(step, carry, keys)
    return carry, carry[0]['policy']

  params = {'policy': world[0], 'value': jnp.zeros(STARTS[-1])}
  keys = jax.random.split(jax.random.key(1000 + seed), steps)
  keys = keys.reshape(kept, steps // kept)
  return jax.jit(lambda p: jax.lax.scan(part, (p, optimizer.init(p)), keys)[1])(params)


def kl_between(first, second):
  """Returns Σ exp(first) (first − second), nats."""
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  return float(np.exp(first) @ (first - second))


def run_r1(seed):
  world = make_world(seed)
  reference = np.asarray(log_probabilities(world[0]), np.float64)
  reward = np.asarray(world[1], np.float64)
  best, value = overoptimisation.tilted_reward(reference, reward, BETA)
  values = {'KL of the reference to the optimum': kl_between(reference, best)}
  distances, regrets = [], []
  for method in METHODS:
    policy = log_probabilities(train(method, world, BETA, seed)[-1])
    policy = np.asarray(policy, np.float64)
    distance = kl_between(policy, best)
    reached = np.exp(policy) @ reward - BETA * kl_between(policy, reference)
    values[f'KL to the optimum, {method}'] = distance
    distances.append(distance)
    regrets.append((value - reached) / reward.std())
  values['largest KL to the optimum'] = max(distances)
  values['largest regret / σ_r'] = max(regrets)
  values['largest difference of methods'] = max(distances) - min(distances)
  return Measured(values)


def best_of_n_exactly(reference, reward, count):
  """Returns (KL, reward) of best-of-n over all responses, which have distinct rewards."""
  order = np.argsort(reward)
  cumulated = np.cumsum(np.exp(reference)[order])
  chances = np.diff(np.concatenate([[0.0], cumulated / cumulated[-1]]) ** count)
  log_chances = np.log(np.maximum(chances, 1e-300))
  kl = chances @ (log_chances - reference[order])
  return float(kl), float(chances @ reward[order])


def run_r3(seed):
  world = make_world(seed)
  reference = np.asarray(log_probabilities(world[0]), np.float64)
  reward = np.asarray(world[1], np.float64)
  base = np.exp(reference) @ reward
  curve = []
  for sharpness in np.exp(np.linspace(-3, 3.5, 60)):
    logs, _ = overoptimisation.tilted_reward(reference, reward, 1 / sharpness)
    curve.append((kl_between(logs, reference), np.exp(logs) @ reward))
  kls, rewards = np.array(curve).T
  points = {'oracle': (kls, rewards)}
  shares, above = {}, []

  def share(kl, reached):
    """The gain as a share of the optimum's at this KL."""
    best = overoptimisation.reward_at(kl, kls, rewards)
    above.append(reached - best)
    return (reached - base) / (best - base)

  for method in ('ppo', 'dpo'):
    own = []
    for beta in (0.7, 0.4, 0.25):
      policy = np.asarray(log_probabilities(train(method, world, beta, seed)[-1]), np.float64)
      own.append((kl_between(policy, reference), np.exp(policy) @ reward))
    points[method] = tuple(np.array(own).T)
    shares[method] = min(share(*point) for point in own)
  best_of = [best_of_n_exactly(reference, reward, 2**k) for k in range(1, 7)]
  points['best of n'] = tuple(np.array(best_of).T)
  shares['best of n'] = min(share(*point) for point in best_of if point[0] <= 3)
  tables = train('ppo', world, 0.0, seed, steps=600, rate=0.01, kept=20)
  free = []
  for table in tables:
    policy = np.asarray(log_probabilities(table), np.float64)
    free.append((kl_between(policy, reference), np.exp(policy) @ reward))
  free_kls, free_rewards = np.array(free).T
  points['PPO, β = 0'] = (free_kls, free_rewards)
  several = [best_of_n_exactly(reference, reward, n) for n in np.exp(np.linspace(0.05, 8, 60))]
  of_n = np.array(several).T
  inside = (free_kls > 0.3) & (free_kls < min(3.0, of_n[0].max()))
  gaps = []
  for kl, reached in zip(free_kls[inside], free_rewards[inside], strict=True):
    gaps.append(reached - overoptimisation.reward_at(float(kl), *of_n))
  return Measured(
    {
      'largest reward above the oracle': max(above),
      'least share of the oracle, PPO': shares['ppo'],
      'least share of the oracle, DPO': shares['dpo'],
      'least share of the oracle, best of n': shares['best of n'],
      'PPO with β = 0 minus best of n': float(np.mean(gaps)) if gaps else float('nan'),
    },
    {
      'reward against √KL': {
        name: (as_floats(np.sqrt(np.maximum(kl, 0))), as_floats(own))
        for name, (kl, own) in points.items()
      }
    },
  )


CLAIMS = (
  Claim(
    id='R1',
    text='PPO, RLOO, Dr. GRPO and DPO reach the same optimum, the tilted reference',
    source='Ziegler et al. 2019; Rafailov et al. 2023; Korbak et al. 2022',
    arrangement='1,296 responses; β 0.5 as a penalty in the reward, or in the loss of DPO on '
    'pairs of all responses with Bradley–Terry labels; 3,000 steps of 512 responses',
    bands={
      'largest KL to the optimum': Band(high=0.05),
      'largest regret / σ_r': Band(high=0.03),
      'largest difference of methods': Band(high=0.1),
    },
    run=run_r1,
    reported=('KL of the reference to the optimum',),
  ),
  Claim(
    id='R3',
    text='No method is above the tilted reference at its KL; PPO and DPO with a penalty reach most '
    'of it; PPO without one spends more KL than best-of-n',
    source='Ziegler et al. 2019; Gao et al. 2022',
    arrangement='1,296 responses; β 0.7, 0.4 and 0.25; all figures exact',
    bands={
      'largest reward above the oracle': Band(high=0.005),
      'least share of the oracle, PPO': Band(0.7, 1.005),
      'least share of the oracle, DPO': Band(0.7, 1.005),
      'least share of the oracle, best of n': Band(0.85, 1.005),
      'PPO with β = 0 minus best of n': Band(high=0.02),
    },
    run=run_r3,
  ),
)
