"""Proximal policy optimisation from a reward (Ouyang et al. 2022, section 3.5; Stiennon et al. 2020; details of
Huang et al. 2024, arXiv:2403.17031).

  maximise E_{x ~ prompts, y ~ π}[ r(x, y) − β log π(y|x) / π_ref(y|x) ]  ( + γ E_pretrain[ log π ] : PPO-ptx )

One step: the policy answers the prompts, the reward scores the answers, GAE makes advantages of score and per-token KL,
and several epochs of minibatches update policy and value model. Choices where implementations differ (docs/ppo.md):
  1. The score stands at the end token, or after it (`score_place`); an answer without one scores `missing_eos_score`.
  2. The probability ratio is against logprobs recomputed by the training forward, so it begins at exactly 1.
  3. GAE steps over masked tokens; whitening is over the whole rollout, with the population variance.
  4. Value and policy are updated together, with one clipped gradient and one optimizer.
Left out: dropout, an entropy bonus, several rollouts in flight.
"""

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, lora
from rlhf_jax.objectives import advantages, divergence, language_model, masked, policy_gradient
from rlhf_jax.runtime import loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import common, rollout
from rlhf_jax.types import TrainState, merge_params

DEFAULTS = dict(
    rollout.DEFAULTS,
    value='reward',  # whose trunk and head the value model begins with; '' = a head on the policy's own trunk
    epochs=2,  # passes over the answers of a step
    kl_coefficient=0.05,  # beta, in reward per nat
    kl_target=0.0,  # nats per response the coefficient is steered to; 0 = it stays
    kl_horizon=10000.0,  # episodes over which the steered coefficient changes by a fifth
    clip=0.2,  # of the probability ratio
    value_clip=0.2,  # of the value's change
    value_coefficient=0.1,  # of the value loss beside the policy's
    discount=1.0,  # gamma
    gae_lambda=0.95,  # lambda
    whiten_rewards=False,
    whiten_advantages=True,
    score_place='eos',  # eos: the end token; after_eos: the place after it, as in the first code and TRL
    pretraining_coefficient=0.0,  # gamma of PPO-ptx: weight of the language-model loss on `pretraining` documents
    pretraining_max_length=96,
    pretraining=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=3e-5, schedule='linear', final_scale=0.0, eps=1e-5),
    loop=dict(loop.DEFAULTS, eval_every=20, save_every=25, log_every=1),
)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def define(context: common.Context) -> rollout.RolloutParts:
  """What a step is made of, before data and parameters are read."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  if section.score_place not in ('eos', 'after_eos'):
    raise UserError(f'config.{context.name}.score_place: expected eos or after_eos, got {section.score_place!r}')
  rollout.check_batch(context)
  model, read = common.open_model(context, section.init, trained=True)
  value_model, read_value = common.open_model(context, section.value or section.init, head=True, trained=True)
  if not section.value:  # only the head; it begins at 0 (Ziegler et al. 2019)
    value_model, whole_model = model, read_value
    zeros = lambda tree: layout.create(
        lambda tree: jax.tree.map(jnp.zeros_like, tree), jax.tree.map(lambda leaf: leaf.sharding, tree), tree)
    read_value = lambda: {'score': zeros(whole_model()['score'])}
  reference_model, read_reference = common.open_model(context, section.reference)
  common.write_model_json(context, model)
  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps * section.epochs * section.minibatches)

  def init():
    (policy, rest), (value, value_rest) = lora.split_trainable(read()), lora.split_trainable(read_value())
    both = steps.create_train_state({'policy': policy, 'value': value}, optimizer, context.key(), layout)
    return PPOState(step=both.step, trained=policy, opt_state=both.opt_state, key=both.key, value_trained=value,
                    frozen={'params': rest, 'value_params': value_rest},
                    kl_coefficient=layout.create(lambda: jnp.float32(section.kl_coefficient), layout.sharding()))

  generate = sampler.build_sampler(model, section.sampling, (tokenizer.eos_id,), tokenizer.pad_id, section.num_samples,
                           layout=layout)
  update = build_update(model, value_model, reference_model, optimizer, layout, section)
  return rollout.RolloutParts(model, init, generate, update, reference_model, read_reference)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, parts = context.section, define(context)
  (train, examples), (held_out, held_out_examples) = rollout.read_prompts(context)
  score, score_held_out = rollout.build_scores(context, train, held_out)
  pretraining = None
  if section.pretraining_coefficient:
    documents = encode.documents(
        sources.load_records(section.pretraining, 'document', 'train'), context.tokenizer, section.pretraining_max_length)
    pretraining = batches.sequences(documents, section.batch_size * section.num_samples, section.pretraining_max_length,
                                    context.config.seed)
  step, reference = build_step(parts.generate, score, parts.update, context.layout), parts.read_reference()
  return loop.Training(
      name=context.name, init=parts.init, step=lambda state, batch: step(state, batch, reference),
      evaluate=rollout.build_evaluation(context, parts, reference, score_held_out, held_out, held_out_examples),
      batches=batches.ZippedBatches(
          batches.prompts(examples, section.batch_size, context.config.seed), pretraining))


@flax.struct.dataclass
class PPOState(TrainState):
  """A train state with its critic.

  Attributes:
    value_trained: what is trained of the value model; only its head where it shares the policy's trunk.
    kl_coefficient: [] float32, β.
  """
  value_trained: dict
  kl_coefficient: jax.Array

  @property
  def value_params(self):
    """The whole value model."""
    return merge_params(self.value_trained, self.frozen.get('value_params', {}))


@flax.struct.dataclass
class Rollout:
  """Answers and what is known of them; N = B * K rows.

  Attributes:
    sequences: prompts and answers, [N, P + R].
    mask: [N, R] bool, the answer up to and including its end token.
    value_mask: [N, R] bool, where the value model learns: the mask, and where the score stands.
    logprobs, reference_logprobs, values, advantages, returns: [N, R] float32.
  """
  sequences: object
  mask: jax.Array
  value_mask: jax.Array
  logprobs: jax.Array
  reference_logprobs: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array


def forward(model, value_model, params, value_params, sequences, R, temperature):
  """Logprobs, entropies and values of the last R tokens of each sequence: three of [N, R] float32."""
  logprobs, entropies, hidden = rollout.forward(model, params, sequences, R, temperature)
  if 'embedding' in value_params:  # a trunk of its own
    hidden, _ = value_model.apply(value_params, sequences.tokens, sequences.positions, sequences.segment_ids)
    hidden = hidden[:, -R - 1:-1]
  return logprobs, entropies, heads.scalar_scores(value_params, hidden)


def build_update(model, value_model, reference_model, optimizer, layout, config):
  """The compiled part of a step after the scores are known.

  Args:
    model, value_model, reference_model: definitions; value_model may be the policy's, for a head on its trunk.
    config: the stage's section.

  Returns:
    update(state, reference_params, sequences, samples, scores [N], pretraining: Sequences or None) → (state, metrics).
  """
  temperature = config.sampling.temperature

  def evaluate(reference, state, sequences, R):
    """Logprobs, values and reference logprobs before the update, in as many parts as the update has."""
    def part(sequences):
      logprobs, entropies, values = forward(
          model, value_model, state.params, state.value_params, sequences, R, temperature)
      return logprobs, entropies, values, rollout.forward(reference_model, reference, sequences, R, temperature)[0]
    return steps.map_in_parts(part, sequences, config.minibatches * config.microbatches)

  def loss(params, batch, key):
    del key
    policy_params, value_params = params['policy'], params['value']
    answered, pretraining, share = batch
    logprobs, entropies, values = forward(
        model, value_model, policy_params, value_params, answered.sequences, answered.mask.shape[1], temperature)
    mask = answered.mask
    policy, ratios, held = policy_gradient.clipped(
        logprobs, answered.logprobs, answered.advantages, mask, config.clip, config.clip)
    value, value_held = policy_gradient.clipped_value(values, answered.values, answered.returns, config.value_clip)
    total = lambda x: masked.total(x, mask)
    weight = masked.total(1.0, mask)
    value_total = masked.total(value, answered.value_mask)
    objective = total(policy) + config.value_coefficient * value_total
    means = {
        'policy/loss': total(policy), 'policy/clip_fraction': total(held), 'policy/ratio': total(ratios),
        'policy/approx_kl': 0.5 * total((logprobs - answered.logprobs) ** 2), 'policy/entropy': total(entropies),
        'value/loss': value_total, 'value/clip_fraction': total(value_held)}
    if pretraining is not None:
      hidden, _ = model.apply(policy_params, pretraining.tokens, pretraining.positions, pretraining.segment_ids)
      targets, _ = heads.token_logprobs(model, policy_params, hidden[:, :-1], pretraining.tokens[:, 1:])
      nll = language_model.nll(targets, pretraining.loss_mask[:, 1:])[0] * share[0]
      objective, means = objective + config.pretraining_coefficient * nll, {**means, 'pretraining/loss': nll}
    return steps.Loss(objective, weight, means)

  def update(state, reference, sequences, samples, scores, pretraining):
    N, R = samples.tokens.shape
    mask = samples.mask
    value_mask = advantages.after_end(mask) if config.score_place == 'after_eos' else mask
    logprobs, entropies, values, reference_logprobs = evaluate(reference, state, sequences, R)

    final = rollout.final_scores(samples.ended, scores, config)
    kl = jnp.where(mask, divergence.k1(logprobs, reference_logprobs), 0.0)
    rewards = advantages.place_rewards(final, kl, value_mask, state.kl_coefficient)
    placed = rewards
    if config.whiten_rewards:
      rewards = masked.whiten(rewards, value_mask, shift_mean=False)
    advantage, returns = advantages.gae(rewards, values, value_mask, config.discount, config.gae_lambda)
    if config.whiten_advantages:
      advantage = masked.whiten(advantage, mask)
    answered = Rollout(sequences, mask, value_mask, logprobs, reference_logprobs, values, advantage, returns)

    key = jax.random.fold_in(state.key, state.step)
    frozen = {name: state.frozen.get(whole, {}) for name, whole in (('policy', 'params'), ('value', 'value_params'))}

    def minibatch(carry, batch_and_key):
      trained, opt_state = carry
      (answered, pretraining), key = batch_and_key
      batch = answered, pretraining, None
      if pretraining is not None:  # a mean over its own tokens, however the minibatch is cut into parts
        share = masked.total(1.0, answered.mask) / jnp.maximum(masked.total(1.0, pretraining.loss_mask != 0), 1.0)
        batch = answered, pretraining, jnp.full(answered.mask.shape[0], share)
      grads, metrics = steps.compute_gradients(lambda p, b, k: loss(merge_params(p, frozen), b, k), trained, batch, key,
                                       config.microbatches)
      trained, opt_state, metrics = steps.apply_update(optimizer, trained, opt_state, grads, metrics)
      return (trained, opt_state), metrics

    def epoch(carry, key):
      order = jax.random.permutation(key, N)
      shuffled = rollout.shuffled_minibatches(layout, answered, order, config.minibatches)
      extra = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), pretraining)
      return jax.lax.scan(minibatch, carry, ((shuffled, extra), jax.random.split(key, config.minibatches)))

    carry = ({'policy': state.trained, 'value': state.value_trained}, state.opt_state)
    (trained, opt_state), metrics = jax.lax.scan(epoch, carry, jax.random.split(key, config.epochs))
    # a step in which any minibatch changed something counts as made, so that half of one is never kept as none
    fine = jnp.any(steps.update_is_finite(metrics))
    metrics = {**{name: jnp.mean(x) for name, x in metrics.items()},
               'policy/first_ratio': metrics['policy/ratio'][0, 0]}

    response_kl = jnp.sum(kl, axis=1)
    coefficient = state.kl_coefficient
    if config.kl_target:
      coefficient = divergence.adapt_kl_coefficient(coefficient, jnp.mean(response_kl), config.kl_target, config.kl_horizon, N)
    unexplained = masked.mean((returns - values - masked.mean(returns - values, value_mask)) ** 2, value_mask)
    variance = masked.mean((returns - masked.mean(returns, value_mask)) ** 2, value_mask)
    metrics |= rollout.rollout_metrics(samples, sequences, logprobs, entropies, kl, scores) | {
        'reward/mean': jnp.mean(jnp.sum(placed, axis=1)), 'kl_coefficient': state.kl_coefficient,
        'value/mean': masked.mean(values, value_mask),
        'value/explained_variance': 1.0 - unexplained / jnp.maximum(variance, 1e-8)}
    return state.replace(step=state.step + fine.astype(jnp.int32), trained=trained['policy'], opt_state=opt_state,
                         value_trained=trained['value'],
                         kl_coefficient=jnp.where(fine, coefficient, state.kl_coefficient)), metrics

  return steps.compile_step(update, layout)


def build_step(generate, score, update, layout):
  """One step of PPO: rollout → scores → update.

  Args:
    generate: (params, Prompts, key) → Samples.
    score: (Prompts, Samples) → ([N] float32 on the mesh, metrics).
    update: of build_update.

  Returns:
    step(state, (Prompts, Sequences or None), reference) → (state, metrics).
  """
  join = jax.jit(sampler.join_sequences)

  def step(state, batch, reference):
    prompts, pretraining = layout.place(batch)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
    samples = generate(state.params, prompts, key)
    scores, said = score(prompts, samples)
    state, metrics = update(state, reference, join(prompts, samples), samples, scores, pretraining)
    return state, {**metrics, **said}

  return step
