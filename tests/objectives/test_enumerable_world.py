"""A world small enough to enumerate: 6 tokens, answers of 4, a table for a policy. What
each objective converges to is known, π* ∝ π_ref exp(r / β) (Ziegler et al. 2019;
Rafailov et al. 2023, eq. 4).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.objectives import advantages, divergence, policy_gradient, preference

V, T, BETA, N = 6, 4, 0.5, 512
STARTS = np.cumsum(
  [0, *(V**t for t in range(T))]
)  # where the prefixes of each length stand in the table
EVERY = np.stack(np.meshgrid(*[np.arange(V)] * T, indexing='ij'), -1).reshape(-1, T)
MASK = jnp.ones((N, T), bool)


def places(answers):
  """[…, T] rows of the table: the prefix before each token."""
  code = jnp.zeros(answers.shape[:-1], jnp.int32)
  found = []
  for t in range(T):
    found.append(STARTS[t] + code)
    code = code * V + answers[..., t]
  return jnp.stack(found, -1)


def token_logprobs(table, answers):
  return jnp.take_along_axis(jax.nn.log_softmax(table)[places(answers)], answers[..., None], -1)[
    ..., 0
  ]


def sample(table, key):
  answers = jnp.zeros((N, T), jnp.int32)
  for t in range(T):
    chosen = jax.random.categorical(jax.random.fold_in(key, t), table[places(answers)[:, t]])
    answers = answers.at[:, t].set(chosen)
  return answers


@functools.cache
def world():
  rng = np.random.default_rng(0)
  reference = jnp.float32(rng.normal(size=(STARTS[-1], V)))
  reward = jnp.float32(0.7 * rng.normal(size=V**T) + 0.7 * rng.normal(size=(V**T // V)).repeat(V))
  return reference, reward


def rewards_of(answers):
  return world()[1][jnp.dot(answers, V ** jnp.arange(T - 1, -1, -1))]


def sequence_kl(logprobs, reference_logprobs):
  return jnp.sum(divergence.k1(logprobs, reference_logprobs), axis=1)


def group_loss(advantage, loss, reduce):
  def of(params, key):
    answers = sample(jax.lax.stop_gradient(params['policy']), key)
    logprobs = token_logprobs(params['policy'], answers)
    old, reference = jax.lax.stop_gradient(logprobs), token_logprobs(world()[0], answers)
    total = rewards_of(answers) - BETA * sequence_kl(old, reference)
    A = jnp.broadcast_to(
      advantages.GROUP_ADVANTAGES[advantage](
        total.reshape(-1, 4), jnp.full((N // 4, 4), T)
      ).reshape(-1, 1),
      (N, T),
    )
    losses, _, _ = policy_gradient.POLICY_LOSSES[loss](logprobs, old, A, MASK, 0.2, 0.2)
    total, weight = policy_gradient.REDUCTIONS[reduce](losses, MASK)
    return total / weight

  return of


def ppo_loss(params, key):
  answers = sample(jax.lax.stop_gradient(params['policy']), key)
  logprobs, values = token_logprobs(params['policy'], answers), params['value'][places(answers)]
  old, old_values = jax.lax.stop_gradient((logprobs, values))
  kl = divergence.k1(old, token_logprobs(world()[0], answers))
  rewards = advantages.place_rewards(rewards_of(answers), kl, MASK, BETA)
  A, returns = advantages.gae(rewards, old_values, MASK, 1.0, 0.95)
  losses, _, _ = policy_gradient.clipped(logprobs, old, A, MASK, 0.2, 0.2)
  value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
  return jnp.mean(losses) + jnp.mean(value_losses)


def dpo_loss(params, key):
  """Pairs of all answers, labelled with the probabilities of Bradley and Terry."""
  numbers = jax.random.randint(key, (2, N), 0, V**T)

  def response(i):
    answers = jnp.asarray(EVERY)[numbers[i]]
    return preference.Response(
      token_logprobs(params['policy'], answers).sum(1),
      token_logprobs(world()[0], answers).sum(1),
      jnp.full(N, T),
    )

  right = jax.nn.sigmoid(world()[1][numbers[0]] - world()[1][numbers[1]])
  return jnp.mean(preference.dpo(response(0), response(1), preference.DPOSettings(BETA, 1 - right)))


METHODS = {
  'ppo': (ppo_loss, 0.03),
  'dpo': (dpo_loss, 0.03),
  'rloo': (group_loss('leave_one_out', 'reinforce', 'sequence_sum'), 0.03),
  'dr_grpo': (group_loss('above_mean', 'clipped', 'constant'), 0.03),
}


@pytest.mark.parametrize('method', METHODS)
def test_the_optimum_is_the_tilted_reference(method):
  loss, rate = METHODS[method]
  steps = 3000
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps, 0.02))

  @jax.jit
  def train(params):
    def step(carry, key):
      params, opt_state = carry
      updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(
      step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), steps)
    )[0][0]

  reference, reward = world()
  params = train({'policy': reference, 'value': jnp.zeros(STARTS[-1])})
  every = jnp.asarray(EVERY)
  best = jax.nn.log_softmax(token_logprobs(reference, every).sum(1) + reward / BETA)

  def of(table):
    return token_logprobs(table, every).sum(1)

  def distance(logprobs):
    return float(jnp.sum(jnp.exp(logprobs) * (logprobs - best)))

  assert distance(of(reference)) > 0.5
  found = distance(of(params['policy']))
  assert found < 0.05, found
  assert BETA * found < 0.03 * jnp.std(reward)  # J* − J = β KL(π ‖ π*)


# A policy that sees the last token only cannot be π*, and the best one that it can be depends on
# which responses are frequent: so it matters who sampled them.
LAST_TOKENS = np.concatenate([[0], *(1 + np.arange(V**t) % V for t in range(1, T))])


def hot_sampler_loss(params, key, level):
  """RLOO from responses that were sampled at temperature 1.5."""
  table = params[LAST_TOKENS]
  hot = jax.lax.stop_gradient(table) / 1.5
  answers = sample(hot, key)
  logprobs = token_logprobs(table, answers)
  old = jax.lax.stop_gradient(logprobs)
  reference = token_logprobs(world()[0], answers)
  rewards = rewards_of(answers) - BETA * sequence_kl(old, reference)
  compared = advantages.leave_one_out(rewards.reshape(-1, 4), jnp.full((N // 4, 4), T))
  A = jnp.broadcast_to(compared.reshape(-1, 1), (N, T))
  losses, _, _ = policy_gradient.reinforce(logprobs, old, A, MASK, 0.2, 0.2)
  if level:
    ratios = policy_gradient.sampling_ratios(old, token_logprobs(hot, answers), MASK, level)
    losses = losses * policy_gradient.truncate_weights(ratios, 10.0)
  return jnp.sum(losses) / N


@pytest.mark.parametrize('level,is_right', [('', False), ('token', False), ('sequence', True)])
def test_only_weights_of_sequences_correct_for_another_sampler(level, is_right):
  """Distances to π* beyond that of the best policy of its kind: 0.93, 0.92 and 0.0001 nats."""
  every = jnp.asarray(EVERY)
  reference, reward = world()
  best = jax.nn.log_softmax(token_logprobs(reference, every).sum(1) + reward / BETA)

  def distance(params, key=None, level=None):
    del key, level
    logprobs = token_logprobs(params[LAST_TOKENS], every).sum(1)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - best))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def train(loss, level):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1000, 0.02))

    def step(carry, key):
      params, opt_state = carry
      updates, opt_state = optimizer.update(jax.grad(loss)(params, key, level), opt_state)
      return (optax.apply_updates(params, updates), opt_state), None

    params = jnp.zeros((V + 1, V))
    keys = jax.random.split(jax.random.key(1), 1000)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

  reached = distance(train(hot_sampler_loss, level)) - distance(train(distance, None))
  assert reached < 0.05 if is_right else reached > 0.5, reached
