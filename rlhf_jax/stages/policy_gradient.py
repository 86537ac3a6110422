"""Policy gradients without a value model: REINFORCE, RLOO, REINFORCE++, GRPO, Dr. GRPO, DAPO, GSPO, CISPO.

  maximise E_{x ~ prompts, y_1 … y_K ~ π}[ Σ_k A(r_1 … r_K)_k · ℓ(π(y_k|x)) ]  − β KL(π ‖ π_ref)

One step: the policy answers every prompt K times, the reward scores the answers, and an answer is compared with the
others of its prompt (objectives/advantages.py: GROUP_ADVANTAGES) instead of with a learned value. The methods differ in four
choices, each a function named in the config: `advantage`, `loss`, `reduce` and the place of the KL;
docs/policy_gradient.md has the table.

Dynamic sampling (DAPO): prompts whose answers all score the same teach nothing; with `resampling` > 0 other prompts
take their place. Answers of an older policy: with `sampler_every` > 1 the policy that answers is renewed every so many
steps, and `weight_limit` corrects for its age. Left out: dropout, an entropy bonus.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.objectives import advantages, divergence, masked, policy_gradient
from rlhf_jax.runtime import loop
from rlhf_jax.runtime.hosts import to_host
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common, rollout
from rlhf_jax.types import TrainState, merge_params

DEFAULTS = dict(
    rollout.DEFAULTS,
    batch_size=16,  # prompts of a step, over all devices
    num_samples=4,  # answers to each prompt, K
    minibatches=1,  # updates in a pass
    epochs=1,  # passes over the answers of a step
    advantage='leave_one_out',  # leave_one_out, above_mean, standardised, batch_baseline
    whiten_advantages=False,  # over all tokens of the step, to mean 0 and variance 1 (REINFORCE++)
    loss='clipped',  # clipped, reinforce, gspo, cispo
    reduce='token_mean',  # token_mean, sequence_mean, sequence_sum, constant
    clip_low=0.2,  # of the probability ratio
    clip_high=0.2,
    kl_coefficient=0.05,  # beta; 0 = no reference is kept
    kl_place='reward',  # reward: subtracted from the score, as the answer's sum of k1; tokens: from a token's advantage,
    # as the sum of what is still to come (REINFORCE++); loss: a term of the loss
    kl_estimator='k3',  # of the loss's term: k1, k2, k3
    overlong_buffer=0,  # of the last so many tokens before max_new_tokens each costs its share of 1 (DAPO)
    resampling=0,  # dynamic sampling: at most so many more batches of prompts for a step
    sampler_every=1,  # steps after which the policy that answers is renewed
    weight_limit=0.0,  # truncated importance weights for an older sampler; 0 = none
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=1e-5, schedule='linear', final_scale=0.0, eps=1e-5),
    loop=dict(loop.DEFAULTS, eval_every=20, save_every=25, log_every=1),
)
_CHOICES = dict(advantage=advantages.GROUP_ADVANTAGES, loss=policy_gradient.POLICY_LOSSES,
                reduce=policy_gradient.REDUCTIONS,
                kl_place=('reward', 'tokens', 'loss'), kl_estimator=divergence.KL_TERMS)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def define(context: common.Context) -> rollout.RolloutParts:
  """What a step is made of, before data and parameters are read."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  check(section, f'config.{context.name}')
  rollout.check_batch(context)
  model, read = common.open_model(context, section.init, trained=True)
  reference_model, read_reference = common.open_model(context, section.reference)
  common.write_model_json(context, model)
  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps * section.epochs * section.minibatches)

  def init():
    state = common.init_state(context, read(), optimizer)
    older = common.copy_tree(layout, state.trained) if section.sampler_every > 1 else {}
    return SamplerState(**vars(state), sampler_trained=older)

  generate = sampler.build_sampler(model, section.sampling, (tokenizer.eos_id,), tokenizer.pad_id, section.num_samples,
                           layout=layout)
  update = build_update(model, reference_model, optimizer, layout, section)
  return rollout.RolloutParts(model, init, generate, update, reference_model, read_reference)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, parts = context.section, define(context)
  (train, examples), (held_out, held_out_examples) = rollout.read_prompts(context)
  score, score_held_out = rollout.build_scores(context, train, held_out)
  step = build_step(parts.generate, score, parts.update, context.layout, section)
  reference = parts.read_reference()
  return loop.Training(
      name=context.name, init=parts.init, step=lambda state, batch: step(state, batch, reference),
      evaluate=rollout.build_evaluation(context, parts, reference, score_held_out, held_out, held_out_examples),
      batches=batches.prompts(examples, section.batch_size * (1 + section.resampling), context.config.seed))


def check(section, where: str) -> None:
  """Raises UserError for a choice there is not, or numbers it cannot have."""
  for name, known in _CHOICES.items():
    if section[name] not in known:
      raise UserError(f'{where}.{name}: expected one of {", ".join(known)}, got {section[name]!r}')
  if section.num_samples < 2 and (section.advantage != 'batch_baseline' or section.resampling):
    raise UserError(f'{where}.samples: expected 2 or more, as the answers to a prompt are compared with each other; with '
                    'advantage=batch_baseline and without resampling one will do')
  if min(section.resampling, section.overlong_buffer, section.weight_limit) < 0 or section.sampler_every < 1:
    raise UserError(f'{where}: expected resampling, overlong_buffer and weight_limit from 0, sampler_every from 1')
  if section.overlong_buffer > section.sampling.max_new_tokens:
    raise UserError(f'{where}.overlong_buffer: expected at most sampling.max_new_tokens = '
                    f'{section.sampling.max_new_tokens}, got {section.overlong_buffer}')


@flax.struct.dataclass
class SamplerState(TrainState):
  """A train state with what was trained of the policy that answers, where it is an older one (else an empty tree)."""
  sampler_trained: dict

  @property
  def sampler_params(self):
    """The whole policy that answers."""
    return merge_params(self.sampler_trained or self.trained, self.frozen.get('params', {}))


@flax.struct.dataclass
class Rollout:
  """N = B * K answers: sequences [N, P + R]; mask [N, R] bool; logprobs, reference_logprobs, advantages, weights
  [N, R] float32."""
  sequences: object
  mask: jax.Array
  logprobs: jax.Array
  reference_logprobs: jax.Array
  advantages: jax.Array
  weights: jax.Array


def build_update(model, reference_model, optimizer, layout, config):
  """The compiled part of a step after the scores are known.

  Returns:
    update(state, reference_params, sequences, samples, scores [N]) → (state, metrics).
  """
  temperature = config.sampling.temperature
  advantage_of, reduced = advantages.GROUP_ADVANTAGES[config.advantage], policy_gradient.REDUCTIONS[config.reduce]
  policy_loss, estimate = policy_gradient.POLICY_LOSSES[config.loss], divergence.KL_TERMS[config.kl_estimator]

  def loss(params, answered, key):
    del key
    mask = answered.mask
    logprobs, entropies, _ = rollout.forward(model, params, answered.sequences, mask.shape[1], temperature)
    losses, ratios, held = policy_loss(logprobs, answered.logprobs, answered.advantages, mask, config.clip_low,
                                       config.clip_high)
    losses = losses * answered.weights
    if config.kl_coefficient and config.kl_place == 'loss':
      losses += config.kl_coefficient * estimate(logprobs, answered.reference_logprobs)
    total, weight = reduced(losses, mask)
    count = masked.total(1.0, mask)
    mean = lambda x: (masked.total(x, mask), count)
    return steps.Loss(total, weight, {
        'policy/clip_fraction': mean(held), 'policy/ratio': mean(ratios), 'policy/entropy': mean(entropies),
        'policy/approx_kl': mean(0.5 * (logprobs - answered.logprobs) ** 2)})

  def update(state, reference, sequences, samples, scores):
    N, R = samples.tokens.shape
    mask = samples.mask

    def before(sequences):
      logprobs, entropies, _ = rollout.forward(model, state.params, sequences, R, temperature)
      return logprobs, entropies, rollout.forward(reference_model, reference, sequences, R, temperature)[0]
    logprobs, entropies, reference_logprobs = steps.map_in_parts(
        before, sequences, config.minibatches * config.microbatches)

    kl = jnp.where(mask, divergence.k1(logprobs, reference_logprobs), 0.0)
    graded = final = rollout.final_scores(samples.ended, scores, config)
    if config.overlong_buffer:
      final += advantages.overlong_penalty(jnp.sum(mask, axis=1), R, config.overlong_buffer)
    if config.kl_place == 'reward':
      final -= config.kl_coefficient * jnp.sum(kl, axis=1)
    group = lambda x: x.reshape(-1, config.num_samples)
    advantage = advantage_of(group(final), group(jnp.sum(mask, axis=1, dtype=jnp.int32)))
    advantage = jnp.broadcast_to(advantage.reshape(-1, 1), (N, R))
    if config.kl_place == 'tokens':
      advantage -= config.kl_coefficient * advantages.reward_to_go(kl)
    if config.whiten_advantages:
      advantage = masked.whiten(advantage, mask)
    weights = jnp.ones((N, R))
    if config.weight_limit:
      weights = policy_gradient.truncated_weights(logprobs, samples.logprobs, mask, config.weight_limit)
    answered = Rollout(sequences, mask, logprobs, reference_logprobs, advantage, weights)
    key, frozen = jax.random.fold_in(state.key, state.step), state.frozen.get('params', {})

    def minibatch(carry, batch_and_key):
      trained, opt_state = carry
      grads, metrics = steps.compute_gradients(lambda p, b, k: loss(merge_params(p, frozen), b, k), trained, *batch_and_key,
                                       config.microbatches)
      trained, opt_state, metrics = steps.apply_update(optimizer, trained, opt_state, grads, metrics)
      return (trained, opt_state), metrics

    def epoch(carry, key):
      parts = rollout.shuffled_minibatches(layout, answered, jax.random.permutation(key, N), config.minibatches)
      return jax.lax.scan(minibatch, carry, (parts, jax.random.split(key, config.minibatches)))

    (trained, opt_state), metrics = jax.lax.scan(
        epoch, (state.trained, state.opt_state), jax.random.split(key, config.epochs))
    fine = jnp.any(steps.update_is_finite(metrics))  # half a step counts as one
    step = state.step + fine.astype(jnp.int32)
    metrics = {**{name: jnp.mean(x) for name, x in metrics.items()},
               'policy/first_ratio': metrics['policy/ratio'][0, 0]}
    metrics |= rollout.rollout_metrics(samples, sequences, logprobs, entropies, kl, scores) | {
        'reward/mean': jnp.mean(final), 'weight/mean': masked.mean(weights, mask),
        'reward/equal_groups': jnp.mean(jnp.ptp(graded.reshape(-1, config.num_samples), axis=1) == 0, dtype=jnp.float32)}
    renew = step % config.sampler_every == 0
    older = jax.tree.map(lambda new, old: jnp.where(renew, new, old), trained,
                         state.sampler_trained) if config.sampler_every > 1 else {}
    return state.replace(step=step, trained=trained, opt_state=opt_state, sampler_trained=older), metrics

  return steps.compile_step(update, layout)


def build_step(generate, score, update, layout, config):
  """One step: rollout → scores → (other prompts for those that teach nothing) → update.

  Returns:
    step(state, Prompts [B * (1 + resampling)], reference) → (state, metrics).
  """
  join = jax.jit(sampler.join_sequences)
  merge = jax.jit(lambda kept, new, order: jax.tree.map(lambda a, b: layout.constrain(
      jnp.concatenate([a, b])[order], ('batch',) + (None,) * (a.ndim - 1)), kept, new))
  B, K = config.batch_size, config.num_samples

  def step(state, prompts, reference):
    params = state.sampler_params
    key, extra = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step), 0

    def answers(number):
      some = layout.place(jax.tree.map(lambda x: x.reshape(1 + config.resampling, -1, *x.shape[1:])[number], prompts))
      samples = generate(params, some, jax.random.fold_in(key, number) if number else key)
      scores, said = score(some, samples)
      return (join(some, samples), samples, scores), said

    def uneven(rolled):  # groups that teach something; neither KL nor the overlong penalty makes one
      ended, scores = to_host((rolled[1].ended, rolled[2]))
      return np.ptp(rollout.final_scores(ended, scores, config).reshape(-1, K), axis=1) > 0

    kept, said = answers(0)
    for number in range(1, 1 + config.resampling):
      good = uneven(kept)
      if good.all():
        break
      (new, more), extra = answers(number), extra + 1
      said = jax.tree.map(lambda a, b: (a * number + b) / (number + 1), said, more)
      groups = np.argsort(~np.r_[good, uneven(new)], kind='stable')[:B]  # those that teach something first
      kept = merge(kept, new, (groups[:, None] * K + np.arange(K)).ravel())
    state, metrics = update(state, reference, *kept)
    return state, {**metrics, **said, 'response/extra': np.float32(extra * B * K)}

  return step
