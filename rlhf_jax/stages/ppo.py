"""Proximal policy optimisation from a reward (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020; details of
Huang et al. 2024, arXiv:2403.17031).

  maximise E_{x ~ prompts, y ~ π}[ r(x, y) − β log π(y|x) / π_ref(y|x) ]  ( + γ E_pretrain[ log π ] : PPO-ptx )

One step: the policy answers the prompts, the reward scores the answers, GAE makes advantages of score and per-token KL,
and several epochs of minibatches update policy and value model. Choices where implementations differ (docs/ppo.md):
  1. The score stands at the end token; an answer without one scores `missing_eos_score` instead.
  2. The probability ratio is against logprobs recomputed by the training forward, so it begins at exactly 1.
  3. GAE steps over masked tokens; whitening is over the whole rollout, with the population variance.
  4. Value and policy are updated together, with one clipped gradient and one optimizer.
Left out: dropout, an entropy bonus, several rollouts in flight.
"""

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.objectives import advantages, divergence, language_model, masked, policy_gradient
from rlhf_jax.runtime import step as steps
from rlhf_jax.types import TrainState


@flax.struct.dataclass
class PPOState(TrainState):
  """A train state with its critic.

  Attributes:
    value_params: the value model's; only its head where it shares the policy's trunk.
    kl_coefficient: [] float32, β.
  """
  value_params: dict
  kl_coefficient: jax.Array


@flax.struct.dataclass
class Rollout:
  """Answers and what is known of them; N = B * K rows.

  Attributes:
    sequences: prompts and answers, [N, P + R].
    mask: [N, R] bool, the answer up to and including its end token.
    logprobs, reference_logprobs, values, advantages, returns: [N, R] float32.
  """
  sequences: object
  mask: jax.Array
  logprobs: jax.Array
  reference_logprobs: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


def forward(model, value_model, params, value_params, sequences, R, temperature):
  """Logprobs, entropies and values of the last R tokens of each sequence: three of [N, R] float32."""
  inputs = sequences.tokens, sequences.positions, sequences.segment_ids
  hidden, _ = model.apply(params, *inputs)
  logprobs, entropies = heads.token_logprobs(params, hidden[:, -R - 1:-1], sequences.tokens[:, -R:], temperature)
  if 'embedding' in value_params:  # a trunk of its own
    hidden, _ = value_model.apply(value_params, *inputs)
  return logprobs, entropies, heads.scores(value_params, hidden[:, -R - 1:-1])


def build_update(model, value_model, optimizer, layout, config, temperature):
  """The compiled part of a step after the scores are known.

  Args:
    model, value_model: definitions; value_model may be the policy's, for a head on its trunk.
    config: the stage's section.
    temperature: the sampler's.

  Returns:
    update(state, reference_params, sequences, samples, scores [N], pretraining: Sequences or None) → (state, metrics).
  """
  def evaluate(reference, state, sequences, R):
    """Logprobs, values and reference logprobs before the update, in as many parts as the update has."""
    def part(sequences):
      logprobs, entropies, values = forward(model, value_model, state.params, state.value_params, sequences, R, temperature)
      hidden, _ = model.apply(reference, sequences.tokens, sequences.positions, sequences.segment_ids)
      reference_logprobs, _ = heads.token_logprobs(
          reference, hidden[:, -R - 1:-1], sequences.tokens[:, -R:], temperature)
      return logprobs, entropies, values, reference_logprobs
    parts = config.minibatches * config.microbatches
    cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), sequences)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, R), jax.lax.map(part, cut))

  def loss(params, batch, key):
    del key
    policy_params, value_params = params['policy'], params['value']
    rollout, pretraining, share = batch
    logprobs, entropies, values = forward(
        model, value_model, policy_params, value_params, rollout.sequences, rollout.mask.shape[1], temperature)
    mask = rollout.mask
    policy, ratios, held = policy_gradient.clipped_policy(
        logprobs, rollout.logprobs, rollout.advantages, config.clip)
    value, value_held = policy_gradient.clipped_value(values, rollout.values, rollout.returns, config.value_clip)
    total = lambda x: masked.total(x, mask)
    weight = masked.total(1.0, mask)
    objective = total(policy) + config.value_coefficient * total(value)
    means = {
        'policy/loss': total(policy), 'policy/clip_fraction': total(held), 'policy/ratio': total(ratios),
        'policy/approx_kl': 0.5 * total((logprobs - rollout.logprobs) ** 2), 'policy/entropy': total(entropies),
        'value/loss': total(value), 'value/clip_fraction': total(value_held)}
    if pretraining is not None:
      hidden, _ = model.apply(policy_params, pretraining.tokens, pretraining.positions, pretraining.segment_ids)
      targets, _ = heads.token_logprobs(policy_params, hidden[:, :-1], pretraining.tokens[:, 1:])
      nll = language_model.nll(targets, pretraining.loss_mask[:, 1:])[0] * share[0]
      objective, means = objective + config.pretraining_coefficient * nll, {**means, 'pretraining/loss': nll}
    return steps.Loss(objective, weight, means)

  def update(state, reference, sequences, samples, scores, pretraining):
    N, R = samples.tokens.shape
    mask = samples.mask
    logprobs, entropies, values, reference_logprobs = evaluate(reference, state, sequences, R)

    final = scores if config.missing_eos_score is None else jnp.where(
        samples.ended, scores, config.missing_eos_score)
    kl = divergence.k1(logprobs, reference_logprobs)
    rewards = advantages.place_rewards(final, kl, mask, state.kl_coefficient)
    placed = rewards
    if config.whiten_rewards:
      rewards = masked.whiten(rewards, mask, shift_mean=False)
    advantage, returns = advantages.gae(rewards, values, mask, config.discount, config.smoothing)
    if config.whiten_advantages:
      advantage = masked.whiten(advantage, mask)
    rollout = Rollout(sequences, mask, logprobs, reference_logprobs, values, advantage, returns)

    key = jax.random.fold_in(state.key, state.step)

    def minibatch(carry, batch_and_key):
      params, opt_state = carry
      (rollout, pretraining), key = batch_and_key
      batch = rollout, pretraining, None
      if pretraining is not None:  # a mean over its own tokens, however the minibatch is cut into parts
        share = masked.total(1.0, rollout.mask) / jnp.maximum(masked.total(1.0, pretraining.loss_mask != 0), 1.0)
        batch = rollout, pretraining, jnp.full(rollout.mask.shape[0], share)
      grads, metrics = steps.gradients(loss, params, batch, key, config.microbatches)
      params, opt_state, metrics = steps.update(optimizer, params, opt_state, grads, metrics)
      return (params, opt_state), metrics

    def epoch(carry, key):
      order = jax.random.permutation(key, N)
      cut = lambda x: x.reshape(config.minibatches, -1, *x.shape[1:])
      shuffled = jax.tree.map(lambda x: cut(x[order]), rollout)
      shuffled = jax.tree.map(
          lambda x: layout.constrain(x, (None, 'batch') + (None,) * (x.ndim - 2)), shuffled)
      extra = None if pretraining is None else jax.tree.map(cut, pretraining)
      return jax.lax.scan(minibatch, carry, ((shuffled, extra), jax.random.split(key, config.minibatches)))

    carry = ({'policy': state.params, 'value': state.value_params}, state.opt_state)
    (params, opt_state), metrics = jax.lax.scan(epoch, carry, jax.random.split(key, config.epochs))
    metrics = {**{name: jnp.mean(x) for name, x in metrics.items()},
               'policy/first_ratio': metrics['policy/ratio'][0, 0]}

    response_kl = jnp.sum(jnp.where(mask, kl, 0.0), axis=1)
    coefficient = state.kl_coefficient
    if config.kl_target:
      coefficient = divergence.adapt(coefficient, jnp.mean(response_kl), config.kl_target, config.kl_horizon, N)
    unexplained = masked.mean((returns - values - masked.mean(returns - values, mask)) ** 2, mask)
    variance = masked.mean((returns - masked.mean(returns, mask)) ** 2, mask)
    metrics |= {
        'reward/mean': jnp.mean(jnp.sum(placed, axis=1)), 'reward/score': jnp.mean(scores),
        'reward/score_std': jnp.std(scores), 'kl': jnp.mean(response_kl), 'kl_coefficient': state.kl_coefficient,
        'policy/rollout_entropy': masked.mean(entropies, mask),
        'policy/sampler_gap': jnp.max(jnp.where(mask, jnp.abs(logprobs - samples.logprobs), 0.0)),
        'value/mean': masked.mean(values, mask),
        'value/explained_variance': 1.0 - unexplained / jnp.maximum(variance, 1e-8),
        'response/length': jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        'response/eos_rate': jnp.mean(samples.ended.astype(jnp.float32)),
        'tokens': jnp.sum(sequences.segment_ids > 0, dtype=jnp.float32)}
    fine = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['norm/gradient'])
    return state.replace(step=state.step + fine.astype(jnp.int32), params=params['policy'], opt_state=opt_state,
                         value_params=params['value'], kl_coefficient=coefficient), metrics

  return steps.compile_step(update, layout)


def build_step(generate, score, update, layout):
  """One step of PPO: rollout → scores → update.

  Args:
    generate: (params, Prompts, key) → Samples.
    score: (Prompts, Samples) → [N] float32 on the mesh.
    update: of build_update.

  Returns:
    step(state, (Prompts, Sequences or None), reference) → (state, metrics).
  """
  join = jax.jit(sampler.join)

  def step(state, batch, reference):
    prompts, pretraining = layout.place(batch)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
    samples = generate(state.params, prompts, key)
    return update(state, reference, join(prompts, samples), samples, score(prompts, samples), pretraining)

  return step
