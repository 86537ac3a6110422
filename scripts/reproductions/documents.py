"""PPO-ptx: a small language model that must keep its documents while it learns a task.

Half of the prompts begin documents, half ask for a task; one network serves both, so
that learning the task can spoil the documents, and need not.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reproductions import policies
from reproductions.claims import as_floats, Measured

from rlhf_jax.objectives import advantages, divergence, policy_gradient


@dataclasses.dataclass(frozen=True)
class World:
  """The sizes of the texts and of the network; half of the prompts begin documents."""

  V: int  # kinds of token
  T: int  # tokens of a text
  prompts: int
  width: int
  rows: int  # of a step

  @property
  def documents(self) -> Any:
    """The prompts that begin documents."""
    return jnp.arange(self.prompts // 2)

  @property
  def tasks(self) -> Any:
    """The prompts that ask for the task."""
    return jnp.arange(self.prompts // 2, self.prompts)


def init(world, key):
  shapes = {
    'prompt': (world.prompts, world.width),
    'before': (world.V + 1, world.width),
    'place': (world.T, world.width),
    'hidden': (world.width, 2 * world.width),
    'out': (2 * world.width, world.V),
    'value': (2 * world.width,),
  }
  keys = jax.random.split(key, len(shapes))
  params = {}
  for own, (name, shape) in zip(keys, shapes.items(), strict=True):
    params[name] = jax.random.normal(own, shape) / np.sqrt(world.width)
  return params


def hidden_of(params, prompts, before, places):
  inputs = params['prompt'][prompts] + params['before'][before] + params['place'][places]
  return jnp.tanh(jnp.tanh(inputs) @ params['hidden'])


def evaluate(world, params, prompts, tokens):
  """Returns log-probabilities and values, [B, T] each."""
  before = policies.tokens_before(tokens, world.V)
  hidden = hidden_of(params, prompts[:, None], before, jnp.arange(world.T))
  return policies.chosen_logprobs(hidden @ params['out'], tokens), hidden @ params['value']


def sample(world, params, prompts, key):
  def step(before, place):
    number, own_key = place
    hidden = hidden_of(params, prompts, before, number)
    chosen = jax.random.categorical(own_key, hidden @ params['out'])
    return chosen, chosen

  start = jnp.full(len(prompts), world.V)
  places = (jnp.arange(world.T), jax.random.split(key, world.T))
  _, tokens = jax.lax.scan(step, start, places)
  return tokens.T


def make_language(world, seed):
  """Returns the transitions of the documents, [prompts, V + 1, V]: a chain for each prompt."""
  rng = np.random.default_rng(seed)
  common = rng.normal(0, 1.5, (world.V + 1, world.V))
  own = rng.normal(0, 1.0, (world.prompts, 1, world.V))
  return jax.nn.log_softmax(jnp.float32(common + own))


def draw_documents(world, language, prompts, key):
  def step(before, own_key):
    chosen = jax.random.categorical(own_key, language[prompts, before])
    return chosen, chosen

  start = jnp.full(len(prompts), world.V)
  _, tokens = jax.lax.scan(step, start, jax.random.split(key, world.T))
  return tokens.T


def loss_of_documents(world, params, language, prompts, key):
  """Returns nats per token on fresh documents."""
  chosen = jax.random.choice(key, prompts, (world.rows,))
  tokens = draw_documents(world, language, chosen, jax.random.fold_in(key, 1))
  return -evaluate(world, params, chosen, tokens)[0].mean()


def rl_loss(world, reference, worth, language, options, params, key):
  """Computes PPO's loss on the task, plus that of documents (Ouyang et al. 2022, eq. 2)."""
  prompts = jax.random.choice(key, world.tasks, (world.rows,))
  tokens = sample(world, jax.lax.stop_gradient(params), prompts, jax.random.fold_in(key, 1))
  logprobs, values = evaluate(world, params, prompts, tokens)
  mask = jnp.ones(tokens.shape, bool)
  old, old_values = jax.lax.stop_gradient((logprobs, values))
  kl = divergence.k1(old, evaluate(world, reference, prompts, tokens)[0])
  scores = worth[tokens].sum(1)
  rewards = advantages.place_rewards(scores, kl, mask, jnp.float32(options['beta']))
  gains, returns = advantages.gae(rewards, old_values, mask, 1.0, 0.95)
  gains = (gains - gains.mean()) / (gains.std() + 1e-8)
  losses, *_ = policy_gradient.clipped(logprobs, old, gains, mask, 0.2, 0.2)
  value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
  own_key = jax.random.fold_in(key, 2)
  documents = loss_of_documents(world, params, language, world.documents, own_key)
  return losses.mean() + 0.1 * value_losses.mean() + options['coefficient'] * documents


def run_r13(settings: Mapping[str, Any], seed: int) -> Measured:
  """Trains with and without the documents' loss, and measures what each forgets."""
  sizes = (settings['tokens'], settings['length'], settings['prompts'])
  world = World(*sizes, settings['width'], settings['rows'])
  language = make_language(world, seed)
  worth = jnp.float32(np.random.default_rng(seed).normal(0, 0.5, world.V))
  key = jax.random.key(seed)

  def pretraining_loss(params, key):
    return loss_of_documents(world, params, language, jnp.arange(world.prompts), key)

  keys = jax.random.split(jax.random.fold_in(key, 1), settings['pretraining']['steps'])
  rate = settings['pretraining']['rate']
  reference = policies.run_adam(pretraining_loss, init(world, key), keys, rate)
  keys = jax.random.split(jax.random.fold_in(key, 2), settings['ppo']['steps'])

  @jax.jit
  def nats_of(params, key):
    return loss_of_documents(world, params, language, world.documents, key)

  @jax.jit
  def gold_of(params):
    tokens = sample(world, params, jnp.repeat(world.tasks, 512), jax.random.key(78))
    return worth[tokens].sum(1).mean()

  def measure(params):
    nats = [nats_of(params, own) for own in jax.random.split(jax.random.key(77), 16)]
    return float(np.mean(nats)), float(gold_of(params))

  before, base = measure(reference)
  values = {'nats per token before': before, 'gold before': base}
  curves = {}
  for name, coefficient in (('PPO', 0.0), ('PPO-ptx', settings['coefficient'])):
    options = {**settings['ppo'], 'coefficient': coefficient}
    loss = functools.partial(rl_loss, world, reference, worth, language, options)
    nats, gold = measure(policies.run_adam(loss, reference, keys, settings['ppo']['rate']))
    values[f'tax of {name}, nats per token'] = nats - before
    values[f'gold of {name}'] = gold
    curves[name] = (as_floats([base, gold]), as_floats([0, nats - before]))
  tax, cheap = values['tax of PPO, nats per token'], values['tax of PPO-ptx, nats per token']
  values['tax of PPO-ptx / of PPO'] = cheap / tax
  gains = [values[f'gold of {name}'] - base for name in ('PPO', 'PPO-ptx')]
  values['gold gain lost, share'] = (gains[0] - gains[1]) / gains[0]
  return Measured(values, {'tax, nats per token, against gold, before and after': curves})


MEASURES = {'R13': run_r13}
