"""Policies small enough for a CPU, and PPO on them with the package's formulas.

Letters: B responses of T tokens, V kinds of token, W units.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.objectives import advantages, divergence, policy_gradient


class Policy(NamedTuple):
  """The functions of a policy whose parameters begin as the reference.

  Attributes:
    init: key → parameters.
    sample: (parameters, key, B) → [B, T] int32.
    evaluate: (parameters, responses [B, T]) → log-probabilities and values, [B, T] each.
  """

  init: Callable[[Any], Any]
  sample: Callable[[Any, Any, int], Any]
  evaluate: Callable[[Any, Any], tuple[Any, Any]]


def tokens_before(responses: Any, begin: int) -> Any:
  """Returns the token before each token, [B, T]; before the first stands `begin`."""
  return jnp.pad(responses[:, :-1], ((0, 0), (1, 0)), constant_values=begin)


def chosen_logprobs(logits: Any, responses: Any) -> Any:
  """Returns the log-probabilities of the tokens of responses, [B, T]."""
  logprobs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(logprobs, responses[..., None], -1)[..., 0]


def table_policy(V: int, T: int, raised: int = 0, by: float = 0.0) -> Policy:
  """Makes a table of logits by place and token before; `raised` is a token that is likelier."""

  def init(key):
    del key
    policy = jnp.zeros((T, V + 1, V)).at[..., raised].set(by)
    return {'policy': policy, 'value': jnp.zeros((T, V + 1))}

  def sample(params, key, B):
    def step(before, place):
      logits, own_key = place
      chosen = jax.random.categorical(own_key, logits[before])
      return chosen, chosen

    start = jnp.full(B, V)
    _, tokens = jax.lax.scan(step, start, (params['policy'], jax.random.split(key, T)))
    return tokens.T

  def evaluate(params, responses):
    before = tokens_before(responses, V)
    places = jnp.arange(T)
    logprobs = chosen_logprobs(params['policy'][places, before], responses)
    return logprobs, params['value'][places, before]

  return Policy(init, sample, evaluate)


def network_policy(V: int, T: int, W: int) -> Policy:
  """Makes a network that reads the place, the token before, and the sum of all tokens before.

  Two layers of W units. Its last layer begins at 0, so that all tokens are equally likely.
  """

  def init(key):
    keys = jax.random.split(key, 5)
    shapes = {'token': (V + 1, W), 'place': (T, W), 'history': (V, W), 'hidden': (W, W)}
    params = {'out': jnp.zeros((W, V)), 'value': jnp.zeros(W)}
    for own, (name, shape) in zip(keys, shapes.items(), strict=False):
      params[name] = jax.random.normal(own, shape) / np.sqrt(W)
    # An embedding has the variance 1 in each unit, a matrix keeps it.
    params['token'], params['place'] = (np.sqrt(W) * params[n] for n in ('token', 'place'))
    return params

  def read(params, before, place, history):
    inputs = params['token'][before] + params['place'][place] + history
    hidden = jnp.tanh(jnp.tanh(inputs) @ params['hidden'])
    return hidden @ params['out'], hidden @ params['value']

  def sample(params, key, B):
    def step(carry, place):
      before, history = carry
      number, own_key = place
      logits, _ = read(params, before, number, history)
      chosen = jax.random.categorical(own_key, logits)
      return (chosen, history + params['history'][chosen]), chosen

    start = (jnp.full(B, V), jnp.zeros((B, W)))
    places = (jnp.arange(T), jax.random.split(key, T))
    return jax.lax.scan(step, start, places)[1].T

  def evaluate(params, responses):
    read_before = params['history'][responses]  # [B, T, W]
    history = jnp.cumsum(read_before, axis=1) - read_before
    before = tokens_before(responses, V)
    logits, values = read(params, before, jnp.arange(T), history)
    return chosen_logprobs(logits, responses), values

  return Policy(init, sample, evaluate)


def run_adam(loss: Any, params: Any, keys: Any, rate: float) -> Any:
  """Runs Adam over the keys, with a rate that falls linearly to 0; `loss` is (params, key) → []."""
  optimizer = optax.adam(optax.linear_schedule(rate, 0.0, len(keys)))

  def step(carry, key):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params)


def ppo(
  policy: Policy,
  score: Callable[[Any, Any], Any],
  key: Any,
  options: Mapping[str, Any],
  mask_of: Callable[[Any], Any] | None = None,
) -> dict[str, np.ndarray]:
  """Trains a policy by PPO from the reference.

  Args:
    policy: whose parameters begin as the reference.
    score: (responses [B, T], mask) → [B] float32.
    key: the random key.
    options: steps; responses, B, of each step; epochs, updates from them; rate of Adam;
      coefficient, β at first; target and horizon of the adaptive β (0 = β stays);
      value_coefficient.
    mask_of: responses → [B, T] bool, the tokens up to the end; None = all.

  Returns:
    Curves over the steps: kl, reward (the score), beta, and the responses [steps, B, T].
  """
  B, target = options['responses'], options.get('target', 0.0)
  reference = policy.init(key)
  optimizer = optax.adam(options['rate'])

  def compute(params, responses, mask, scores, beta, old, old_values, kl):
    logprobs, values = policy.evaluate(params, responses)
    rewards = advantages.place_rewards(scores, kl, mask, beta)
    gains, returns = advantages.gae(rewards, old_values, mask, 1.0, 0.95)
    gains = (gains - gains.mean()) / (gains.std() + 1e-8)
    losses, *_ = policy_gradient.clipped(logprobs, old, gains, mask, 0.2, 0.2)
    value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
    total = losses + options['value_coefficient'] * value_losses
    return jnp.where(mask, total, 0).sum() / mask.sum()

  def step(carry, key):
    params, opt_state, beta = carry
    responses = policy.sample(params, key, B)
    mask = jnp.ones(responses.shape, bool) if mask_of is None else mask_of(responses)
    scores = score(responses, mask)
    old, old_values = policy.evaluate(params, responses)
    kl = divergence.k1(old, policy.evaluate(reference, responses)[0])
    mean_kl = jnp.where(mask, kl, 0.0).sum(1).mean()
    for _ in range(options.get('epochs', 1)):
      gradient = jax.grad(compute)(params, responses, mask, scores, beta, old, old_values, kl)
      updates, opt_state = optimizer.update(gradient, opt_state)
      params = optax.apply_updates(params, updates)
    next_beta = beta
    if target:
      # The horizon of Ziegler et al.: β changes by a few percent in a step, or less.
      next_beta = divergence.adapt_kl_coefficient(beta, mean_kl, target, options['horizon'], B)
    row = {'kl': mean_kl, 'reward': scores.mean(), 'beta': beta, 'responses': responses}
    return (params, opt_state, next_beta), row

  first = (reference, optimizer.init(reference), jnp.float32(options.get('coefficient', 0.0)))
  run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
  return jax.device_get(run(first, jax.random.split(key, options['steps'])))
