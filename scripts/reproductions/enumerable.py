"""Claims in a world whose responses can all be listed: V kinds of token, T in a response.

A policy is a table of logits for each prefix. Its divergences, its expected reward
and the optimum π* ∝ π_ref exp(r / β) are exact.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reproductions.claims import as_floats, Measured

from rlhf_jax.evaluation import overoptimisation
from rlhf_jax.objectives import advantages, divergence, policy_gradient, preference


@dataclasses.dataclass(frozen=True)
class World:
  """The responses, the table of the reference, and the reward of every response."""

  V: int
  T: int
  rows: int  # responses, or pairs, of a step
  reference: Any  # [prefixes, V] float32
  reward: Any  # [V**T] float32

  @property
  def every(self) -> Any:
    """All responses, [V**T, T] int32, in the order of their numbers."""
    places = np.meshgrid(*[np.arange(self.V)] * self.T, indexing='ij')
    return jnp.asarray(np.stack(places, -1).reshape(-1, self.T))

  def number_of(self, responses: Any) -> Any:
    """Returns the number of each response, [...]."""
    return jnp.dot(responses, self.V ** jnp.arange(self.T - 1, -1, -1))

  def rows_of(self, responses: Any) -> Any:
    """Returns the rows of the table that predict each token, [..., T]."""
    code = jnp.zeros(responses.shape[:-1], jnp.int32)
    rows = []
    start = 0  # of the prefixes of this length
    for t in range(self.T):
      rows.append(start + code)
      code = code * self.V + responses[..., t]
      start += self.V**t
    return jnp.stack(rows, -1)

  def token_logprobs(self, table: Any, responses: Any) -> Any:
    """Returns the log-probability of each token, [..., T]."""
    logprobs = jax.nn.log_softmax(table)[self.rows_of(responses)]
    return jnp.take_along_axis(logprobs, responses[..., None], -1)[..., 0]

  def log_probabilities(self, table: Any) -> np.ndarray:
    """Returns log π of every response, [V**T] float64."""
    return np.asarray(self.token_logprobs(table, self.every).sum(1), np.float64)

  def sample(self, table: Any, key: Any) -> Any:
    """Samples the responses of a step, [rows, T]."""
    responses = jnp.zeros((self.rows, self.T), jnp.int32)
    for t in range(self.T):
      logits = table[self.rows_of(responses)[:, t]]
      chosen = jax.random.categorical(jax.random.fold_in(key, t), logits)
      responses = responses.at[:, t].set(chosen)
    return responses


def make_world(settings, seed):
  """Draws the reference and the rewards."""
  V, T = settings['tokens'], settings['length']
  rng = np.random.default_rng(seed)
  reference = jnp.float32(rng.normal(size=(sum(V**t for t in range(T)), V)))
  # A part of the reward depends on all tokens but the last.
  shared = rng.normal(size=V ** (T - 1)).repeat(V)
  reward = jnp.float32(0.7 * rng.normal(size=V**T) + 0.7 * shared)
  return World(V, T, settings['rows'], reference, reward)


def group_loss(advantage, loss, reduction, world, beta):
  """Builds the loss of a method whose baseline is a group of four responses."""
  mask = jnp.ones((world.rows, world.T), bool)

  def compute(params, key):
    responses = world.sample(jax.lax.stop_gradient(params['policy']), key)
    logprobs = world.token_logprobs(params['policy'], responses)
    old = jax.lax.stop_gradient(logprobs)
    kl = divergence.k1(old, world.token_logprobs(world.reference, responses)).sum(1)
    total = (world.reward[world.number_of(responses)] - beta * kl).reshape(-1, 4)
    lengths = jnp.full(total.shape, world.T)
    gains = advantages.GROUP_ADVANTAGES[advantage](total, lengths).reshape(-1, 1)
    gains = jnp.broadcast_to(gains, mask.shape)
    losses, *_ = policy_gradient.POLICY_LOSSES[loss](logprobs, old, gains, mask, 0.2, 0.2)
    total, weight = policy_gradient.REDUCTIONS[reduction](losses, mask)
    return total / weight

  return compute


def ppo_loss(world, beta):
  """Builds the clipped loss with GAE and a value table."""
  mask = jnp.ones((world.rows, world.T), bool)

  def compute(params, key):
    responses = world.sample(jax.lax.stop_gradient(params['policy']), key)
    logprobs = world.token_logprobs(params['policy'], responses)
    values = params['value'][world.rows_of(responses)]
    old, old_values = jax.lax.stop_gradient((logprobs, values))
    kl = divergence.k1(old, world.token_logprobs(world.reference, responses))
    scores = world.reward[world.number_of(responses)]
    rewards = advantages.place_rewards(scores, kl, mask, jnp.float32(beta))
    gains, returns = advantages.gae(rewards, old_values, mask, 1.0, 0.95)
    losses, *_ = policy_gradient.clipped(logprobs, old, gains, mask, 0.2, 0.2)
    value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
    return jnp.mean(losses) + jnp.mean(value_losses)

  return compute


def dpo_loss(world, beta):
  """Builds DPO's loss on pairs of all responses, with Bradley–Terry's probabilities."""
  every = world.every

  def compute(params, key):
    numbers = jax.random.randint(key, (2, world.rows), 0, len(every))

    def response(i):
      responses = every[numbers[i]]
      own = world.token_logprobs(params['policy'], responses).sum(1)
      other = world.token_logprobs(world.reference, responses).sum(1)
      return preference.Response(own, other, jnp.full(world.rows, world.T))

    right = jax.nn.sigmoid(world.reward[numbers[0]] - world.reward[numbers[1]])
    settings = preference.DPOSettings(beta, 1 - right)
    return jnp.mean(preference.dpo(response(0), response(1), settings))

  return compute


METHODS: dict[str, Callable] = {
  'ppo': ppo_loss,
  'rloo': functools.partial(group_loss, 'leave_one_out', 'reinforce', 'sequence_sum'),
  'dr_grpo': functools.partial(group_loss, 'above_mean', 'clipped', 'constant'),
  'dpo': dpo_loss,
}


def train(method, world, beta, seed, options):
  """Trains a table, and returns it at `kept` even distances, [kept, prefixes, V]."""
  steps, kept = options['steps'], options['kept']
  loss = METHODS[method](world, beta)
  optimizer = optax.adam(optax.cosine_decay_schedule(options['rate'], steps, 0.02))

  def step(carry, key):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  def part(carry, keys):
    carry, _ = jax.lax.scan(step, carry, keys)
    return carry, carry[0]['policy']

  params = {'policy': world.reference, 'value': jnp.zeros(len(world.reference))}
  keys = jax.random.split(jax.random.key(1000 + seed), steps)
  keys = keys.reshape(kept, steps // kept)
  return jax.jit(lambda p: jax.lax.scan(part, (p, optimizer.init(p)), keys)[1])(params)


def kl_between(first, second):
  """Returns Σ exp(first) (first − second), nats."""
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  return float(np.exp(first) @ (first - second))


def run_r1(settings: Mapping[str, Any], seed: int) -> Measured:
  """Trains by four methods towards the same optimum."""
  world = make_world(settings, seed)
  beta, options = settings['beta'], settings['training']
  reference = world.log_probabilities(world.reference)
  reward = np.asarray(world.reward, np.float64)
  best, value = overoptimisation.tilted_reward(reference, reward, beta)
  values = {'KL of the reference to the optimum': kl_between(reference, best)}
  distances, regrets, curves = [], [], {}
  steps = np.linspace(0, options['steps'], options['kept'] + 1)
  for method in METHODS:
    tables = train(method, world, beta, seed, options)
    policies = [world.log_probabilities(table) for table in tables]
    path = [kl_between(reference, best), *(kl_between(policy, best) for policy in policies)]
    curves[method] = (as_floats(steps), as_floats(np.log10(np.maximum(path, 1e-6))))
    reached = np.exp(policies[-1]) @ reward - beta * kl_between(policies[-1], reference)
    values[f'KL to the optimum, {method}'] = path[-1]
    distances.append(path[-1])
    regrets.append((value - reached) / reward.std())
  values['largest KL to the optimum'] = max(distances)
  values['largest regret / σ_r'] = max(regrets)
  values['largest difference of methods'] = max(distances) - min(distances)
  return Measured(values, {'log10 of the KL to the optimum, against steps': curves})


def best_of_n_exactly(reference, reward, count):
  """Returns (KL, reward) of best-of-n over all responses, which have distinct rewards."""
  order = np.argsort(reward)
  cumulated = np.cumsum(np.exp(reference)[order])
  chances = np.diff(np.concatenate([[0.0], cumulated / cumulated[-1]]) ** count)
  log_chances = np.log(np.maximum(chances, 1e-300))
  kl = chances @ (log_chances - reference[order])
  return float(kl), float(chances @ reward[order])


def run_r3(settings: Mapping[str, Any], seed: int) -> Measured:
  """Draws the frontier of reward against KL, of the optimum and of four methods."""
  world = make_world(settings, seed)
  reference = world.log_probabilities(world.reference)
  reward = np.asarray(world.reward, np.float64)
  base = np.exp(reference) @ reward
  points = {'oracle': _tilt_curve(reference, reward)}
  shares, above = {}, []

  def place(table):
    policy = world.log_probabilities(table)
    return kl_between(policy, reference), np.exp(policy) @ reward

  def share(kl, reached):
    """The gain as a share of the optimum's at this KL."""
    best = overoptimisation.reward_at(kl, *points['oracle'])
    above.append(reached - best)
    return (reached - base) / (best - base)

  for method in ('ppo', 'dpo'):
    tables = [
      train(method, world, beta, seed, settings['training'])[-1] for beta in settings['betas']
    ]
    own = [place(table) for table in tables]
    points[method] = tuple(np.array(own).T)
    shares[method] = min(share(*point) for point in own)
  best_of = [best_of_n_exactly(reference, reward, 2**k) for k in range(1, 7)]
  points['best of n'] = tuple(np.array(best_of).T)
  shares['best of n'] = min(share(*point) for point in best_of if point[0] <= 3)
  # Without a penalty the policy passes by all KLs on its way.
  free = [place(table) for table in train('ppo', world, 0.0, seed, settings['without_penalty'])]
  points['PPO, β = 0'] = tuple(np.array(free).T)
  return Measured(
    {
      'largest reward above the oracle': max(above),
      'least share of the oracle, PPO': shares['ppo'],
      'least share of the oracle, DPO': shares['dpo'],
      'least share of the oracle, best of n': shares['best of n'],
      'PPO with β = 0 minus best of n': _above_best_of_n(free, reference, reward),
    },
    {
      'reward against √KL': {
        name: (as_floats(np.sqrt(np.maximum(kl, 0))), as_floats(own))
        for name, (kl, own) in points.items()
      }
    },
  )


def _tilt_curve(reference, reward):
  """Returns the KLs and rewards of the tilted reference, [60] each."""
  curve = []
  for sharpness in np.exp(np.linspace(-3, 3.5, 60)):
    logs, _ = overoptimisation.tilted_reward(reference, reward, 1 / sharpness)
    curve.append((kl_between(logs, reference), np.exp(logs) @ reward))
  return tuple(np.array(curve).T)


def _above_best_of_n(points, reference, reward):
  """Returns how far points are above best-of-n at their KL, in the mean."""
  counts = np.exp(np.linspace(0.05, 8, 60))
  of_n = np.array([best_of_n_exactly(reference, reward, n) for n in counts]).T
  gaps = []
  for kl, reached in points:
    if 0.3 < kl < min(3.0, of_n[0].max()):
      gaps.append(reached - overoptimisation.reward_at(float(kl), *of_n))
  return float(np.mean(gaps)) if gaps else float('nan')


MEASURES = {'R1': run_r1, 'R3': run_r3}
