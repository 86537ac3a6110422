"""PPO-ptx: a small language model that must keep its documents while it learns a task.

24 tokens, sequences of 12 behind a prompt token. Eight prompts begin documents, eight
ask for a task; one network serves both, so that learning the task can spoil the
documents, and need not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from reproductions.claims import Band, Claim, Measured

from rlhf_jax.objectives import advantages, divergence, policy_gradient

V, T, PROMPTS, WIDTH = 24, 12, 16, 32
ROWS = 256
BETA, COEFFICIENT = 0.05, 1.0  # of the KL, and of the documents' loss
PRETRAINING, STEPS = 800, 300
MASK = jnp.ones((ROWS, T), bool)
DOCUMENTS = jnp.arange(PROMPTS // 2)
TASKS = jnp.arange(PROMPTS // 2, PROMPTS)


def init(key):
  shapes = {
    'prompt': (PROMPTS, WIDTH),
    'before': (V + 1, WIDTH),
    'place': (T, WIDTH),
    'hidden': (WIDTH, 2 * WIDTH),
    'out': (2 * WIDTH, V),
    'value': (2 * WIDTH,),
  }
  keys = jax.random.split(key, len(shapes))
  params = {}
  for own, (name, shape) in zip(keys, shapes.items(), strict=True):
    params[name] = jax.random.normal(own, shape) / np.sqrt(WIDTH)
  return params


def hidden_of(params, prompts, before, places):
  inputs = params['prompt'][prompts] + params['before'][before] + params['place'][places]
  return jnp.tanh(jnp.tanh(inputs) @ params['hidden'])


def evaluate(params, prompts, tokens):
  """Returns log-probabilities and values, [B, T] each."""
  before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=V)
  hidden = hidden_of(params, prompts[:, None], before, jnp.arange(T))
  logprobs = jax.nn.log_softmax(hidden @ params['out'])
  own = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
  return own, hidden @ params['value']


def sample(params, prompts, key):
  def step(before, place):
    number, own_key = place
    hidden = hidden_of(params, prompts, before, number)
    chosen = jax.random.categorical(own_key, hidden @ params['out'])
    return chosen, chosen

  start = jnp.full(len(prompts), V)
  _, tokens = jax.lax.scan(step, start, (jnp.arange(T), jax.random.split(key, T)))
  return tokens.T


def make_language(seed):
  """Returns the transitions of the documents, [PROMPTS, V + 1, V]: a chain for each prompt."""
  rng = np.random.default_rng(seed)
  common = rng.normal(0, 1.5, (V + 1, V))
  own = rng.normal(0, 1.0, (PROMPTS, 1, V))
  return jax.nn.log_softmax(jnp.float32(common + own))


def draw_documents(language, prompts, key):
  def step(before, own_key):
    chosen = jax.random.categorical(own_key, language[prompts, before])
    return chosen, chosen

  _, tokens = jax.lax.scan(step, jnp.full(len(prompts), V), jax.random.split(key, T))
  return tokens.T


def loss_of_documents(params, language, prompts, key):
  """Returns nats per token on fresh documents."""
  chosen = jax.random.choice(key, prompts, (ROWS,))
  tokens = draw_documents(language, chosen, jax.random.fold_in(key, 1))
  return -evaluate(params, chosen, tokens)[0].mean()


def run_steps(loss, params, keys, rate):
  """Runs Adam over the keys; `loss` is (params, key) → scalar."""
  optimizer = optax.adam(optax.linear_schedule(rate, 0.0, len(keys)))

  def step(carry, key):
    params, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(params, key), opt_state)
    return (optax.apply_updates(params, updates), opt_state), None

  return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys)[0][0])(params)


def rl_loss(reference, worth, language, coefficient, params, key):
  """Computes PPO's loss on the task, plus that of documents (Ouyang et al. 2022, eq. 2)."""
  prompts = jax.random.choice(key, TASKS, (ROWS,))
  tokens = sample(jax.lax.stop_gradient(params), prompts, jax.random.fold_in(key, 1))
  logprobs, values = evaluate(params, prompts, tokens)
  old, old_values = jax.lax.stop_gradient((logprobs, values))
  kl = divergence.k1(old, evaluate(reference, prompts, tokens)[0])
  scores = worth[tokens].sum(1)
  rewards = advantages.place_rewards(scores, kl, MASK, jnp.float32(BETA))
  gains, returns = advantages.gae(rewards, old_values, MASK, 1.0, 0.95)
  gains = (gains - gains.mean()) / (gains.std() + 1e-8)
  losses, *_ = policy_gradient.clipped(logprobs, old, gains, MASK, 0.2, 0.2)
  value_losses, _ = policy_gradient.clipped_value(values, old_values, returns, 0.2)
  documents = loss_of_documents(params, language, DOCUMENTS, jax.random.fold_in(key, 2))
  return losses.mean() + 0.1 * value_losses.mean() + coefficient * documents


def run_r13(seed):
  language = make_language(seed)
  worth = jnp.float32(np.random.default_rng(seed).normal(0, 0.5, V))
  key = jax.random.key(seed)
  everything = jnp.arange(PROMPTS)

  def pretraining_loss(params, key):
    return loss_of_documents(params, language, everything, key)

  keys = jax.random.split(jax.random.fold_in(key, 1), PRETRAINING)
  reference = run_steps(pretraining_loss, init(key), keys, 1e-2)
  keys = jax.random.split(jax.random.fold_in(key, 2), STEPS)
  held_out = jax.random.split(jax.random.key(77), 16)

  def measure(params):
    nats = np.mean([loss_of_documents(params, language, DOCUMENTS, own) for own in held_out])
    prompts = jnp.repeat(TASKS, 512)
    tokens = sample(params, prompts, jax.random.key(78))
    return float(nats), float(worth[tokens].sum(1).mean())

  before, base = measure(reference)
  values = {'nats per token before': before, 'gold before': base}
  for name, coefficient in (('PPO', 0.0), ('PPO-ptx', COEFFICIENT)):
    loss = functools.partial(rl_loss, reference, worth, language, coefficient)
    nats, gold = measure(run_steps(loss, reference, keys, 3e-3))
    values[f'tax of {name}, nats per token'] = nats - before
    values[f'gold of {name}'] = gold
  tax, cheap = values['tax of PPO, nats per token'], values['tax of PPO-ptx, nats per token']
  values['tax of PPO-ptx / of PPO'] = cheap / tax
  gains = [values[f'gold of {name}'] - base for name in ('PPO', 'PPO-ptx')]
  values['gold gain lost, share'] = (gains[0] - gains[1]) / gains[0]
  return Measured(values)


CLAIMS = (
  Claim(
    id='R13',
    text='Mixing pre-training into PPO removes most of the alignment tax at little cost',
    source='Ouyang et al. 2022',
    arrangement='a network of two layers, pre-trained on Markov chains; PPO on eight prompts, '
    'documents behind eight others; 300 rollouts of 256',
    bands={
      'tax of PPO-ptx / of PPO': Band(high=0.5),
      'gold gain lost, share': Band(high=0.05),
    },
    run=run_r13,
    reported=(
      'tax of PPO, nats per token',
      'tax of PPO-ptx, nats per token',
      'gold of PPO',
      'gold of PPO-ptx',
    ),
  ),
)
