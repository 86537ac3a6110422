"""Two updates of every parameter against formulas written out anew, with unusual options.

Nothing of `objectives`, `heads`, the optimizer or the stages computes what is expected
here; only the network itself (`Model.apply`, tested elsewhere) is shared.
"""

import dataclasses
import functools
import json
import types
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.objectives.preference import DPOPSettings
from rlhf_jax.stages import (
  frozen_reward,
  online_preference,
  policy_gradient,
  ppo,
  preference,
  reward,
  sft,
)
from rlhf_jax.stages.shared import supervised, training
from rlhf_jax.stages.shared.context import Context

P, R = 3, 5
RATE, FINAL, B1, B2, EPS, DECAY, CLIP, UPDATES = 4e-3, 0.3, 0.8, 0.95, 1e-4, 0.2, 0.7, 10
TEMPERATURE = 0.7
SAMPLING = SamplingOptions(max_new_tokens=R, temperature=TEMPERATURE)


def make_definitions(make=testing.make_definitions, **changes):
  optimizer = testing.make_optimizer(
    RATE,
    UPDATES,
    schedule='linear',
    final_scale=FINAL,
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    clip_norm=CLIP,
  )
  return dataclasses.replace(make(), optimizer=optimizer, **changes)


# What is expected.


def adamw(params, gradients):
  """Parameters after updates with AdamW, whose gradients are those of functions of them."""
  first = jax.tree.map(np.zeros_like, params)
  second = jax.tree.map(np.zeros_like, params)
  for number, gradient in enumerate(gradients):
    g = jax.device_get(jax.jit(gradient)(params))
    norm = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in jax.tree.leaves(g)))
    assert norm > CLIP / 3  # clipping is far from being a no-op in some of the cases
    g = jax.tree.map(lambda leaf: leaf * min(1, CLIP / norm), g)
    rate = RATE * (1 + (FINAL - 1) * number / UPDATES)
    first = jax.tree.map(lambda m, leaf: B1 * m + (1 - B1) * leaf, first, g)
    second = jax.tree.map(lambda v, leaf: B2 * v + (1 - B2) * leaf**2, second, g)
    corrections = 1 - B1 ** (number + 1), 1 - B2 ** (number + 1)

    def move(path, old, m, v):
      name = jax.tree_util.keystr(path)
      decay = 0 if 'norm' in name or 'bias' in name else DECAY
      step = m / corrections[0] / (np.sqrt(v / corrections[1]) + EPS)
      return old - rate * (step + decay * old)

    params = jax.tree_util.tree_map_with_path(move, params, first, second)
  return params


def read(model, params, rows, temperature=1.0):
  """log p of tokens 1 … T − 1 of rows [N, T], and the hidden states of all."""
  hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
  logits = hidden @ params['embedding'].T / temperature
  logits = logits[:, :-1] - jax.nn.logsumexp(logits[:, :-1], -1, keepdims=True)
  logprobs = jnp.take_along_axis(logits, jnp.asarray(rows.tokens)[:, 1:, None], -1)[..., 0]
  return logprobs, hidden


def child(key, purpose):
  return jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def two_orders(state, size):
  """The rows of two minibatches, as the step of this state shuffles them; one epoch."""
  key = jax.random.fold_in(child(state.key, 'update'), 0)
  epoch = jax.random.split(key, 1)[0]
  return np.asarray(jax.random.permutation(child(epoch, 'order'), size)).reshape(2, -1)


def whiten(x, mask, shift=True):
  chosen = x[mask]
  white = (x - chosen.mean()) / np.sqrt(chosen.var() + 1e-8)
  return np.where(mask, white if shift else white + chosen.mean(), 0)


def run_twice(train_step, definitions, options, state, batches, *others):
  step = training.compile_train_step(train_step, definitions, options)
  for batch in batches:
    state, metrics = step(state, batch, *others)
  return jax.device_get(state), metrics


def assert_same(got, want, before):
  """Equal, where the update itself is far greater than the tolerance."""
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(want), before)
  assert min(jax.tree.leaves(moved)) > 1e-4
  testing.assert_trees_close(got, want, tolerance=2e-5)


# Pre-training and SFT; reward; preference.


def test_next_token_prediction():
  definitions = make_definitions()
  state = testing.make_state(definitions)
  params = jax.device_get(state.trained)
  batches = [testing.make_sequences(seed=n) for n in range(2)]

  def gradient(batch):
    def mean_nll(params):
      logprobs, _ = read(definitions.model, params, batch)
      targets = batch.loss_mask[:, 1:]
      return -jnp.sum(logprobs * targets) / targets.sum()

    return jax.grad(mean_nll)

  want = adamw(params, map(gradient, batches))
  options = sft.Options(microbatches=2)
  got, _ = run_twice(supervised.train_step, definitions, options, state, batches)
  del want['score'], params['score']  # the scalar head has no part in it, but for its decay
  assert_same({k: v for k, v in got.trained.items() if k != 'score'}, want, params)


def flat(batch):
  """Rankings as rows [B · K, T], with the mask of the responses' tokens [B · K, T − 1]."""
  rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
  inside = rows.segment_ids[:, 1:] > 0
  return rows, inside & (np.arange(1, rows.tokens.shape[1]) >= rows.begins[:, None])


def pairs_of(batch):
  """(weight, better row, worse row) of each pair; the pairs of a prompt weigh 1 together."""
  K = batch.ranks.shape[1]
  pairs = []
  for row, (ranks, group) in enumerate(zip(batch.ranks, batch.group)):
    own = [
      (row * K + i, row * K + j)
      for i in range(K)
      for j in range(K)
      if group[i] and group[j] and ranks[i] < ranks[j]
    ]
    pairs += [(1 / len(own), i, j) for i, j in own]
  return pairs


def soft_rankings(seed):
  batch = testing.make_rankings(4, seed=seed, ties=True)
  confidence = np.random.default_rng(seed).uniform(0.6, 0.9, len(batch.ranks))
  return batch.replace(confidence=np.broadcast_to(confidence[:, None], batch.ranks.shape))


def test_reward_model():
  config = dataclasses.replace(testing.MODEL_CONFIG, likelihood_head=True)
  model = transformer.build_model(config, testing.make_layout())
  definitions = make_definitions(model=model)
  state = testing.make_state(definitions)
  params = jax.device_get(state.trained)
  params['score']['likelihood'] = np.array([0.02, -0.03], np.float32)
  state = state.replace(trained=jax.device_put(params, definitions.layout.sharding()))
  batches = [soft_rankings(n) for n in range(2)]

  def gradient(batch):
    rows, mask = flat(batch)
    last = np.maximum(rows.segment_ids.sum(1) - 1, 0)
    best = (rows.group > 0) & (rows.ranks == 1)
    pairs = pairs_of(batch)

    def objective(params):
      logprobs, hidden = read(model, params, rows)
      mean = jnp.sum(logprobs * mask, 1) / np.maximum(mask.sum(1), 1)
      lowest = jnp.min(jnp.where(mask, logprobs, 0), 1)
      head = params['score']
      scores = hidden[np.arange(len(last)), last] @ head['kernel'] + head['bias']
      scores += hidden.shape[-1] * (mean * head['likelihood'][0] + lowest * head['likelihood'][1])
      total = -0.3 * jnp.sum(jnp.where(best, mean, 0))
      for weight, i, j in pairs:
        p, gap = rows.confidence[i], scores[i] - scores[j]
        total += weight * (p * jnp.log1p(jnp.exp(-gap)) + (1 - p) * jnp.log1p(jnp.exp(gap)))
      return total / len(batch.ranks)

    return jax.grad(objective)

  want = adamw(params, map(gradient, batches))
  options = reward.Options(likelihood=True, language_model_coefficient=0.3, microbatches=2)
  got, _ = run_twice(reward.train_step, definitions, options, state, batches)
  del want['score']['bias']  # only differences of scores count: it does not move
  before = {**params, 'score': {k: v for k, v in params['score'].items() if k != 'bias'}}
  trained = {**got.trained, 'score': {k: got.trained['score'][k] for k in before['score']}}
  assert_same(trained, want, before)


SETTINGS = DPOPSettings(beta=0.3, dpop_lambda=0.4, label_smoothing=0.1)


def dpop_gradient(model, batch, reference=None):
  """Of DPO-Positive with smoothed, soft labels."""
  rows, mask = flat(batch)
  reference = rows.reference_logprobs if reference is None else reference
  pairs = pairs_of(batch)

  def objective(params):
    logprobs, _ = read(model, params, rows)
    h = jnp.sum(logprobs * mask, 1) - reference
    total = 0.0
    for weight, i, j in pairs:
      p = rows.confidence[i]

      def loss(i, j):
        right = h[i] - h[j] - 0.4 * jnp.maximum(-h[i], 0)
        wrong = h[j] - h[i] - 0.4 * jnp.maximum(-h[j], 0)
        return 0.9 * jnp.logaddexp(0, -0.3 * right) + 0.1 * jnp.logaddexp(0, -0.3 * wrong)

      total += weight * (p * loss(i, j) + (1 - p) * loss(j, i))
    return total / len(batch.ranks)

  return jax.grad(objective)


def without_score(params):
  return {name: value for name, value in params.items() if name != 'score'}


def test_preference():
  definitions = make_definitions()
  state = testing.make_state(definitions)
  params = jax.device_get(state.trained)
  batches = [soft_rankings(n) for n in range(2)]
  want = adamw(params, (dpop_gradient(definitions.model, batch) for batch in batches))
  options = preference.Options(loss='dpop', settings=SETTINGS, microbatches=2)

  def train_step(*arguments, **options):
    return preference.train_step(*arguments, None, **options)

  got, _ = run_twice(train_step, definitions, options, state, batches)
  assert_same(without_score(got.trained), without_score(want), without_score(params))


def make_rollout(groups, K, seed=0, pretraining=None):
  """Scored responses, some of the groups with a tie, with sampler logprobs of an older policy."""
  prompts = testing.make_prompts(groups, P, seed)
  samples = testing.make_samples(groups * K, R, seed + 1)
  rng = np.random.default_rng(seed)
  old = np.where(samples.mask, rng.normal(-4, 0.7, samples.mask.shape), 0)
  samples = samples.replace(logprobs=old.astype(np.float32))
  scores = rng.normal(size=groups * K).astype(np.float32)
  return prompts, testing.score_samples(prompts, samples, scores, pretraining)


def test_online_preference():
  K, B = 3, 4
  definitions = make_definitions(testing.make_rollout_definitions)
  model, layout = definitions.model, definitions.layout
  reference = testing.make_params(model, layout, seed=5)
  state = testing.make_state(definitions)
  params = jax.device_get(state.trained)
  options = online_preference.Options(
    batch_size=B,
    num_samples=K,
    loss='dpop',
    settings=SETTINGS,
    sampling=SAMPLING,
    missing_eos_score=-0.2,
    microbatches=2,
  )
  rollouts = [make_rollout(B, K, seed) for seed in range(2)]

  def gradient(prompts, scored):
    scores = np.where(scored.samples.ended, scored.scores, -0.2).reshape(B, K)
    ranks = 1 + np.sum(scores[:, None] > scores[:, :, None], 2)
    rows = scored.sequences
    mask = np.asarray(scored.samples.mask)
    logprobs, _ = read(model, jax.device_get(reference), rows)
    sums = np.sum(np.where(mask, logprobs[:, -R:], 0), 1)

    def objective(params):
      logprobs, _ = read(model, params, rows)
      h = jnp.sum(jnp.where(mask, logprobs[:, -R:], 0), 1) - sums
      total, counted = 0.0, 0
      for row in range(B):
        own = [(i, j) for i in range(K) for j in range(K) if ranks[row, i] < ranks[row, j]]
        counted += bool(own)
        for i, j in own:
          a, b = h[row * K + i], h[row * K + j]
          right = a - b - 0.4 * jnp.maximum(-a, 0)
          wrong = b - a - 0.4 * jnp.maximum(-b, 0)
          value = 0.9 * jnp.logaddexp(0, -0.3 * right) + 0.1 * jnp.logaddexp(0, -0.3 * wrong)
          total += value / len(own)
      return total / counted

    return jax.grad(objective)

  want = adamw(params, [gradient(*rollout) for rollout in rollouts])
  step = training.compile_train_step(online_preference.train_step, definitions, options)
  order = functools.partial(
    online_preference.order_responses, definitions=definitions, options=options
  )
  for prompts, scored in rollouts:
    batch, _ = jax.jit(order)(state.params, reference, layout.place(prompts), scored)
    state, _ = step(state, batch)
  assert_same(without_score(state.trained), without_score(want), without_score(params))


# Policy gradients and PPO: two minibatches of one step.


def response_logprobs(model, params, rows):
  return read(model, params, rows, TEMPERATURE)[0][:, -R:]


def pick(scored, rows):
  return jax.tree.map(lambda x: np.asarray(x)[rows], scored)


def clipped_surrogate(ratio, advantage, low, high):
  return jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - low, 1 + high))


@pytest.mark.parametrize('place', ['reward', 'loss'])
def test_policy_gradient(place):
  G, K, beta = 4, 3, 0.3
  definitions = make_definitions(testing.make_rollout_definitions)
  model, layout = definitions.model, definitions.layout
  reference = testing.make_params(model, layout, seed=5)
  state = testing.make_state(definitions)
  state = policy_gradient.SamplerState(**vars(state), sampler_trained={})
  params = jax.device_get(state.trained)
  options = policy_gradient.Options(
    batch_size=G,
    num_samples=K,
    minibatches=2,
    microbatches=2 if place == 'loss' else 3,
    advantage='standardised',
    whiten_advantages=True,
    reduce='sequence_mean',
    clip_low=0.2,
    clip_high=0.7,
    kl_coefficient=beta,
    kl_place=place,
    kl_estimator='k2',
    overlong_buffer=3,
    weight_limit=1.3,
    weight_level='token' if place == 'loss' else 'sequence',
    missing_eos_score=-0.4,
    sampling=SAMPLING,
  )
  _, scored = make_rollout(G, K)
  mask = np.asarray(scored.samples.mask)
  old = np.asarray(response_logprobs(model, params, scored.sequences))
  base = np.asarray(response_logprobs(model, jax.device_get(reference), scored.sequences))
  lengths = mask.sum(1)
  rewards = np.where(scored.samples.ended, scored.scores, -0.4)
  rewards = rewards + np.clip((R - 3 - lengths) / 3, -1, 0)
  if place == 'reward':
    rewards = rewards - beta * np.sum(np.where(mask, old - base, 0), 1)
  groups = rewards.reshape(G, K)
  groups = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
  advantage = whiten(np.broadcast_to(groups.reshape(-1, 1), mask.shape), mask)
  log_ratios = np.where(mask, old - scored.samples.logprobs, 0)
  if place == 'reward':
    log_ratios = np.broadcast_to(log_ratios.sum(1, keepdims=True), mask.shape)
  weights = np.minimum(np.exp(log_ratios), 1.3)
  assert 0.1 < np.mean(weights[mask] == 1.3) < 0.9

  def gradient(rows):
    part = pick(scored, rows)
    inside = mask[rows]

    def objective(params):
      now = response_logprobs(model, params, part.sequences)
      ratio = jnp.exp(jnp.where(inside, now - old[rows], 0))
      losses = weights[rows] * clipped_surrogate(ratio, advantage[rows], 0.2, 0.7)
      if place == 'loss':
        losses += beta * 0.5 * jnp.where(inside, now - base[rows], 0) ** 2
      return jnp.mean(jnp.sum(jnp.where(inside, losses, 0), 1) / lengths[rows])

    return jax.grad(objective)

  want = adamw(params, map(gradient, two_orders(state, G * K)))
  step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  got, metrics = step(state, scored, reference)
  assert 0.05 < metrics['policy/clip_fraction'] < 0.45
  assert_same(without_score(got.trained), without_score(want), without_score(params))


def test_the_kl_of_each_token_counts_for_those_before_it():
  G, K, beta = 4, 3, 0.3
  _, scored = make_rollout(G, K)
  mask = np.asarray(scored.samples.mask)
  logprobs, base = np.random.default_rng(1).normal(-4, 1, (2, *mask.shape)).astype(np.float32)
  options = policy_gradient.Options(
    batch_size=G,
    num_samples=K,
    advantage='standardised',
    whiten_advantages=False,
    kl_coefficient=beta,
    kl_place='tokens',
    missing_eos_score=-0.4,
    sampling=SAMPLING,
  )
  evaluated = policy_gradient.Evaluated(logprobs, np.zeros_like(base), base)
  assessed, _ = policy_gradient.assess_rollout(scored, evaluated, options)
  groups = np.where(scored.samples.ended, scored.scores, -0.4).reshape(G, K)
  groups = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
  kl = np.where(mask, logprobs - base, 0)
  want = groups.reshape(-1, 1) - beta * np.cumsum(kl[:, ::-1], 1)[:, ::-1]
  np.testing.assert_allclose(assessed.advantages[mask], want[mask], rtol=1e-4, atol=1e-5)


def placed_rewards(scored, kl, mask, beta):
  """−β kl, and the score behind the last token, where there is a place."""
  N = len(mask)
  inside = mask.copy()
  rewards = np.where(mask, -beta * kl, 0)
  for row in range(N):
    end = mask[row].sum()  # the place after the last token
    if end < R:
      inside[row, end] = True
    score = scored.scores[row] if scored.samples.ended[row] else -0.4
    rewards[row, min(end, R - 1)] += score
  return rewards, inside


def estimate(rewards, values, inside, discount, decay):
  advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
  for row in range(len(rewards)):
    following, after = 0.0, 0.0
    for t in reversed(range(int(inside[row].sum()))):
      delta = rewards[row, t] + discount * after - values[row, t]
      following = delta + discount * decay * following
      after = values[row, t]
      advantages[row, t] = following
      returns[row, t] = following + values[row, t]
  return advantages, returns


def test_ppo():
  N, beta = 8, 0.3
  definitions = make_definitions(testing.make_ppo_definitions)
  model, layout = definitions.model, definitions.layout
  reference = testing.make_params(model, layout, seed=5)
  options = ppo.Options(
    batch_size=N,
    epochs=1,
    minibatches=2,
    microbatches=2,
    kl_coefficient=beta,
    kl_target=0.7,
    kl_horizon=100.0,
    clip=0.05,
    value_clip=3.0,
    value_coefficient=0.6,
    discount=0.9,
    gae_lambda=0.7,
    whiten_rewards=True,
    whiten_advantages=True,
    score_place='after_eos',
    missing_eos_score=-0.4,
    pretraining_coefficient=0.25,
    weight_limit=2.0,
    weight_rule='mask',
    weight_level='token',
    sampling=SAMPLING,
  )
  state = testing.make_ppo_state(definitions, options)
  params = jax.device_get({'policy': state.trained, 'value': state.value_trained})
  documents = testing.make_sequences(N, 6, seed=3)
  _, scored = make_rollout(N, 1, pretraining=documents)

  def values_of(params, rows):
    hidden = read(model, params, rows)[1][:, -R - 1 : -1]
    return hidden @ params['score']['kernel'] + params['score']['bias']

  mask = np.asarray(scored.samples.mask)
  old = np.asarray(response_logprobs(model, params['policy'], scored.sequences))
  base = np.asarray(response_logprobs(model, jax.device_get(reference), scored.sequences))
  values = np.asarray(values_of(params['value'], scored.sequences))
  kl = np.where(mask, old - base, 0)
  rewards, inside = placed_rewards(scored, kl, mask, beta)
  rewards = whiten(rewards, inside, shift=False)
  advantages, returns = estimate(rewards, values, inside, 0.9, 0.7)
  advantages = whiten(advantages, mask)
  weights = np.exp(np.where(mask, old - scored.samples.logprobs, 0))
  weights = np.where((weights >= 0.5) & (weights <= 2), weights, 0)

  def gradient(rows, extra):
    part, own, learned = pick(scored, rows), mask[rows], inside[rows]
    texts = pick(documents, extra)

    def objective(params):
      now = response_logprobs(model, params['policy'], part.sequences)
      ratio = jnp.exp(jnp.where(own, now - old[rows], 0))
      losses = weights[rows] * clipped_surrogate(ratio, advantages[rows], 0.05, 0.05)
      policy = jnp.sum(jnp.where(own, losses, 0)) / own.sum()
      new = values_of(params['value'], part.sequences)
      near = jnp.clip(new, values[rows] - 3.0, values[rows] + 3.0)
      errors = jnp.maximum((new - returns[rows]) ** 2, (near - returns[rows]) ** 2) / 2
      value = jnp.sum(jnp.where(learned, errors, 0)) / learned.sum()
      logprobs, _ = read(model, params['policy'], texts)
      targets = texts.loss_mask[:, 1:]
      return policy + 0.6 * value - 0.25 * jnp.sum(logprobs * targets) / targets.sum()

    return jax.grad(objective)

  orders = two_orders(state, N)
  extras = np.arange(N).reshape(2, -1)  # documents are not shuffled
  want = adamw(params, map(gradient, orders, extras))
  step = training.compile_train_step(ppo.train_step, definitions, options)
  got, metrics = step(state, layout.place(scored), reference)
  assert metrics['policy/clip_fraction'] > 0 and 0 < metrics['value/clip_fraction'] < 0.4
  trained = {'policy': without_score(got.trained), 'value': got.value_trained}
  want['policy'] = without_score(want['policy'])
  before = {'policy': without_score(params['policy']), 'value': params['value']}
  assert_same(trained, want, before)
  mean_kl = kl.sum(1).mean()
  beta *= 1 + np.clip(mean_kl / 0.7 - 1, -0.2, 0.2) * N / 100
  np.testing.assert_allclose(got.kl_coefficient, beta, rtol=1e-5)


# The head of a frozen model.


def write_rankings(path):
  """Rankings of texts with ties, doubt, two sources and openers that come twice."""
  rng = np.random.default_rng(0)

  def words(count):
    return ' '.join(rng.choice(['red', 'blue', 'old', 'sun', 'we', 'go', 'far'], count))

  rows = []
  for number in range(12):
    count = int(rng.integers(2, 5))
    row = {
      'id': str(number),
      'source': 'ab'[number % 2],
      'messages': [{'role': 'user', 'content': f'{number // 2} {words(6)}' if number % 4 else 'x'}],
      'responses': [words(int(rng.integers(2, 9))) for _ in range(count)],
      'ranks': [1, 2, *rng.integers(1, 4, count - 2).tolist()],
      'confidence': float(rng.uniform(0.6, 1)),
    }
    rows.append(row)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows


def features_of_texts(model, params, texts, length):
  """The hidden state of the last token, and mean and least log-probability of the response."""
  tokens = np.array([[*a, *b, *[0] * (length - len(a) - len(b))] for a, b in texts], np.int32)
  places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  ends = np.array([len(prompt) + len(response) for prompt, response in texts])
  inside = (places < ends[:, None]).astype(np.int32)
  rows = types.SimpleNamespace(tokens=tokens, positions=places, segment_ids=inside)
  logprobs, hidden = jax.jit(lambda params: read(model, params, rows))(params)
  features = []
  for row, (prompt, _) in enumerate(texts):
    own = logprobs[row, len(prompt) - 1 : ends[row] - 1]
    features.append([*hidden[row, ends[row] - 1], own.mean(), own.min()])
  return np.array(features, np.float64)


def fit_by_newton(features, pairs, ridge):
  """Minimises the mean logistic loss of pairs (weight, probability, better, worse) plus ridge."""
  weight, p, better, worse = map(np.array, zip(*pairs, strict=True))
  differences = features[better] - features[worse]
  weight = weight / weight.sum()
  w = np.zeros(features.shape[1])
  for _ in range(30):
    s = 1 / (1 + np.exp(-differences @ w))
    gradient = differences.T @ (weight * (s - p)) + ridge * w
    curvature = differences.T * (weight * s * (1 - s)) @ differences + ridge * np.eye(len(w))
    w = w - np.linalg.solve(curvature, gradient)
  return w


def fit_best(features, pairs, chooses):
  """The fit to all pairs with the ridge that is right most often where `chooses` holds."""
  rest = [pair for pair, chosen in zip(pairs, chooses, strict=True) if not chosen]

  def rate(ridge):
    w = fit_by_newton(features, rest, ridge)
    own = [pair for pair, chosen in zip(pairs, chooses, strict=True) if chosen]
    return np.mean([features[i] @ w > features[j] @ w for _, _, i, j in own]), ridge

  return fit_by_newton(features, pairs, max(map(rate, (0.001, 0.01, 0.1, 1.0)))[1])


def test_frozen_reward(tmp_path):
  tokenizer = testing.make_tokenizer()
  config = dataclasses.replace(
    testing.MODEL_CONFIG, vocab_size=tokenizer.vocab_size, likelihood_head=True
  )
  layout = testing.make_layout()
  model = transformer.build_model(config, layout)
  params = testing.make_params(model, layout)
  rows = write_rankings(tmp_path / 'rows.jsonl')
  context = Context(ml_collections.ConfigDict(), 'frozen', tmp_path, layout, tokenizer)
  options = frozen_reward.Options(
    init='random',
    likelihood=True,
    batch_size=3,
    max_length=30,
    overlong='truncate_left',
    folds=3,
    measured_pairs=1,
    data=DataOptions(source='jsonl', path=(str(tmp_path / 'rows.jsonl'),)),
  )

  known, pairs, clusters, owners = [], [], [], []
  cut = 0
  for row in rows:
    texts = [tokenizer.exchange(row['messages'], response) for response in row['responses']]
    room = 30 - max(len(response) for _, response in texts)
    cut += len(texts[0][0]) > room
    texts = [(prompt[-room:], response) for prompt, response in texts]
    known += [text for number, text in enumerate(texts) if text not in known + texts[:number]]
    numbers = [known.index(text) for text in texts]
    ranks = row['ranks']
    own = [(i, j) for i, a in zip(numbers, ranks) for j, b in zip(numbers, ranks) if a < b]
    pairs += [(1 / len(own), row['confidence'], i, j) for i, j in own]
    clusters += [row['messages'][0]['content']] * len(own)
    owners += [row['source']] * len(own)
  assert 0 < cut < len(rows)
  want = features_of_texts(model, params, known, 30)

  texts = frozen_reward.read_texts(context, options, 'train')
  got = frozen_reward.compute_features(
    context, model, params, texts, np.arange(len(texts.ids)), 3, np.zeros((0, 0)), lambda _: None
  )
  np.testing.assert_allclose(got, want, atol=2e-5)

  # Whole clusters, the largest first, go to the fold with the fewest pairs.
  sizes = {name: clusters.count(name) for name in clusters}
  order = sorted(sizes, key=lambda name: (-sizes[name], zlib.crc32(name.encode())))
  filled, fold_of = [0, 0, 0], {}
  for name in order:
    fold_of[name] = filled.index(min(filled))
    filled[fold_of[name]] += sizes[name]
  folds = np.array([fold_of[name] for name in clusters])
  scales = want.std(0)
  w = fit_best(want / scales, pairs, folds == 0) / scales
  head = frozen_reward.fit_head(got.astype(np.float64), texts.pairs, 3)
  np.testing.assert_allclose(got @ head.weights, want @ w, atol=2e-2)
  score = frozen_reward.place_head(head, params['score'])
  placed = {**params, 'score': score}
  sequences = frozen_reward._pad(texts, np.arange(len(texts.ids)), tokenizer.pad_id)
  scores = reward.score_sequences(model, placed, sequences)
  np.testing.assert_allclose(scores, want @ w - (want @ w).mean(), atol=2e-2)

  right = np.zeros(len(pairs))
  for fold in range(3):
    others = [pair for pair, own in zip(pairs, folds) if own != fold]
    w = fit_best(want / scales, others, folds[folds != fold] == (fold + 1) % 3)
    for place in np.flatnonzero(folds == fold):
      _, _, i, j = pairs[place]
      right[place] = want[i] / scales @ w > want[j] / scales @ w
  report = frozen_reward.measure_folds(got.astype(np.float64), texts, options)
  for source in 'ab':
    own = right[np.array(owners) == source]
    assert report[source]['pairs'] == len(own) > 5
    np.testing.assert_allclose(report[source]['accuracy']['joint'], own.mean())
