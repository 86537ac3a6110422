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
from rlhf_jax.evaluation import answers
from rlhf_jax.feedback import rewards
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.objectives import advantages, divergence, language_model, masked, policy_gradient
from rlhf_jax.runtime import loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import common, reward
from rlhf_jax.types import TrainState

DEFAULTS = dict(
    init='sft',
    reference='sft',  # the KL penalty is against this one; it stays as it is
    reward='reward',  # a stage that trained a reward model, its folder, a directory, or 'module:function' on texts
    value='reward',  # whose trunk and head the value model begins with; '' = a head on the policy's own trunk
    batch_size=64,  # prompts of a step, over all devices
    samples=1,  # answers to each prompt
    length=48,  # tokens of a prompt at most
    overlong='drop',  # a longer prompt: drop (counted), truncate_left, error
    epochs=2,  # passes over the answers of a step
    minibatches=2,  # updates in a pass
    microbatches=1,  # parts of a minibatch, one after the other, to save memory
    kl_coefficient=0.05,  # beta, in reward per nat
    kl_target=0.0,  # nats per response the coefficient is steered to; 0 = it stays
    kl_horizon=10000.0,  # episodes over which the steered coefficient changes by a fifth
    clip=0.2,  # of the probability ratio
    value_clip=0.2,  # of the value's change
    value_coefficient=0.1,  # of the value loss beside the policy's
    discount=1.0,  # gamma
    smoothing=0.95,  # lambda
    whiten_rewards=False,
    whiten_advantages=True,
    score_place='eos',  # eos: the end token; after_eos: the place after it, as in the first code and TRL
    missing_eos=True,  # an answer without an end token scores missing_eos_score, whatever the reward says
    missing_eos_score=-1.0,
    pretraining_coefficient=0.0,  # gamma of PPO-ptx: weight of the language-model loss on `pretraining` documents
    pretraining_length=96,
    eval_records=64,  # held-out prompts
    shown=4,  # answers written at each evaluation
    data=dict(sources.DEFAULTS),
    pretraining=dict(sources.DEFAULTS),
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=3e-5, schedule='linear', final_scale=0.0, eps=1e-5),
    loop=dict(loop.DEFAULTS, eval_every=20, save_every=25, log_every=1),
)


def run(context: common.Context) -> None:
  """Trains; leaves checkpoints and a Hugging Face directory in the stage's folder."""
  state = loop.run(build(context), context.section.loop, context.directory, {'stage': context.name})
  common.export(context, state.params)


def build(context: common.Context) -> loop.Stage:
  """The stage, ready to run."""
  section, layout, tokenizer = context.section, context.layout, context.tokenizer
  rows = section.batch_size * section.samples
  if section.score_place not in ('eos', 'after_eos'):
    raise UserError(f'config.{context.name}.score_place: expected eos or after_eos, got {section.score_place!r}')
  common.check_batch(context, rows, section.minibatches * section.microbatches)
  common.check_batch(context, parts=1)
  model, read = common.open_model(context, section.init)
  value_model, read_value = common.open_model(context, section.value or section.init, head=True)
  if not section.value:  # only the head; it begins at 0 (Ziegler et al. 2019)
    value_model, whole_model = model, read_value
    read_value = lambda: {'score': jax.tree.map(jnp.zeros_like, whole_model()['score'])}
  reference_model, read_reference = common.open_model(context, section.reference)
  common.describe(context, model)
  read_records = lambda split: sources.load(section.data, 'prompt', split)
  train, held_out = read_records('train'), sources.evenly(read_records('validation'), section.eval_records)
  fit = lambda records: encode.prompts(records, tokenizer, section.length, section.overlong)
  score = rewards.build(section.reward, train, tokenizer, layout)
  score_held_out = rewards.build(section.reward, held_out, tokenizer, layout)
  if score is None:
    reward_model, read_reward = common.open_model(context, section.reward, head=True)
    reward_params, of = read_reward(), reward.build_score(reward_model, section.minibatches * section.microbatches)
    score = lambda prompts, samples: of(reward_params, prompts, samples)
    score_held_out = score
  pretraining = None
  if section.pretraining_coefficient:
    documents = encode.documents(
        sources.load(section.pretraining, 'document', 'train'), tokenizer, section.pretraining_length)
    pretraining = batches.sequences(documents, rows, section.pretraining_length, context.config.seed, **context.hosts)

  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps * section.epochs * section.minibatches)

  def init():
    both = steps.init_state({'policy': read(), 'value': read_value()}, optimizer, context.key(), layout)
    return PPOState(step=both.step, params=both.params['policy'], opt_state=both.opt_state, key=both.key,
                    value_params=both.params['value'],
                    kl_coefficient=jax.jit(lambda: jnp.float32(section.kl_coefficient), out_shardings=layout.sharding())())

  generate = sampler.build(model, section.sampling, (tokenizer.eos_id,), tokenizer.pad_id, section.samples)
  update = build_update(model, value_model, reference_model, optimizer, layout, section)
  step, reference = build_step(generate, score, update, layout), read_reference()
  held_out_examples = fit(held_out)
  answer = answers.build(model, section.sampling, tokenizer, layout, 1, reference_model, score_held_out)

  def evaluate(state):
    given = answer(state.params, batches.prompts_once(held_out_examples, section.batch_size), context.key(), reference)
    values = {'reward/score': given.scores.mean(), 'kl': given.kl.mean(), 'response/length': given.lengths.mean(),
              'response/eos_rate': given.ended.mean()}
    shown = zip(held_out_examples[:section.shown], given.texts, given.scores)
    return values, [{'prompt': held_out[int(example['index'])].messages[-1]['content'], 'response': texts[0],
                     'score': float(scores[0])} for example, texts, scores in shown]

  return loop.Stage(
      name=context.name, init=init, step=lambda state, batch: step(state, batch, reference), evaluate=evaluate,
      batches=batches.Together(
          batches.prompts(fit(train), section.batch_size, context.config.seed, **context.hosts), pretraining))


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
  inputs = sequences.tokens, sequences.positions, sequences.segment_ids
  hidden, _ = model.apply(params, *inputs)
  logprobs, entropies = heads.token_logprobs(params, hidden[:, -R - 1:-1], sequences.tokens[:, -R:], temperature)
  if 'embedding' in value_params:  # a trunk of its own
    hidden, _ = value_model.apply(value_params, *inputs)
  return logprobs, entropies, heads.scores(value_params, hidden[:, -R - 1:-1])


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
      hidden, _ = reference_model.apply(reference, sequences.tokens, sequences.positions, sequences.segment_ids)
      reference_logprobs, _ = heads.token_logprobs(
          reference, hidden[:, -R - 1:-1], sequences.tokens[:, -R:], temperature)
      return logprobs, entropies, values, reference_logprobs
    return steps.in_parts(part, sequences, config.minibatches * config.microbatches)

  def loss(params, batch, key):
    del key
    policy_params, value_params = params['policy'], params['value']
    rollout, pretraining, share = batch
    logprobs, entropies, values = forward(
        model, value_model, policy_params, value_params, rollout.sequences, rollout.mask.shape[1], temperature)
    mask = rollout.mask
    policy, ratios, held = policy_gradient.clipped(
        logprobs, rollout.logprobs, rollout.advantages, mask, config.clip, config.clip)
    value, value_held = policy_gradient.clipped_value(values, rollout.values, rollout.returns, config.value_clip)
    total = lambda x: masked.total(x, mask)
    weight = masked.total(1.0, mask)
    value_total = masked.total(value, rollout.value_mask)
    objective = total(policy) + config.value_coefficient * value_total
    means = {
        'policy/loss': total(policy), 'policy/clip_fraction': total(held), 'policy/ratio': total(ratios),
        'policy/approx_kl': 0.5 * total((logprobs - rollout.logprobs) ** 2), 'policy/entropy': total(entropies),
        'value/loss': value_total, 'value/clip_fraction': total(value_held)}
    if pretraining is not None:
      hidden, _ = model.apply(policy_params, pretraining.tokens, pretraining.positions, pretraining.segment_ids)
      targets, _ = heads.token_logprobs(policy_params, hidden[:, :-1], pretraining.tokens[:, 1:])
      nll = language_model.nll(targets, pretraining.loss_mask[:, 1:])[0] * share[0]
      objective, means = objective + config.pretraining_coefficient * nll, {**means, 'pretraining/loss': nll}
    return steps.Loss(objective, weight, means)

  def update(state, reference, sequences, samples, scores, pretraining):
    N, R = samples.tokens.shape
    mask = samples.mask
    value_mask = advantages.after_end(mask) if config.score_place == 'after_eos' else mask
    logprobs, entropies, values, reference_logprobs = evaluate(reference, state, sequences, R)

    final = jnp.where(samples.ended, scores, config.missing_eos_score) if config.missing_eos else scores
    kl = jnp.where(mask, divergence.k1(logprobs, reference_logprobs), 0.0)
    rewards = advantages.place_rewards(final, kl, value_mask, state.kl_coefficient)
    placed = rewards
    if config.whiten_rewards:
      rewards = masked.whiten(rewards, value_mask, shift_mean=False)
    advantage, returns = advantages.gae(rewards, values, value_mask, config.discount, config.smoothing)
    if config.whiten_advantages:
      advantage = masked.whiten(advantage, mask)
    rollout = Rollout(sequences, mask, value_mask, logprobs, reference_logprobs, values, advantage, returns)

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
    # a step in which any minibatch changed something counts as made, so that half of one is never kept as none
    fine = jnp.any(steps.finite(metrics))
    metrics = {**{name: jnp.mean(x) for name, x in metrics.items()},
               'policy/first_ratio': metrics['policy/ratio'][0, 0]}

    response_kl = jnp.sum(kl, axis=1)
    coefficient = state.kl_coefficient
    if config.kl_target:
      coefficient = divergence.adapt(coefficient, jnp.mean(response_kl), config.kl_target, config.kl_horizon, N)
    unexplained = masked.mean((returns - values - masked.mean(returns - values, value_mask)) ** 2, value_mask)
    variance = masked.mean((returns - masked.mean(returns, value_mask)) ** 2, value_mask)
    metrics |= {
        'reward/mean': jnp.mean(jnp.sum(placed, axis=1)), 'reward/score': jnp.mean(scores),
        'reward/score_std': jnp.std(scores), 'kl': jnp.mean(response_kl), 'kl_coefficient': state.kl_coefficient,
        'policy/rollout_entropy': masked.mean(entropies, mask),
        'policy/sampler_gap': jnp.max(jnp.where(mask, jnp.abs(logprobs - samples.logprobs), 0.0)),
        'value/mean': masked.mean(values, value_mask),
        'value/explained_variance': 1.0 - unexplained / jnp.maximum(variance, 1e-8),
        'response/length': jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
        'response/eos_rate': jnp.mean(samples.ended.astype(jnp.float32)),
        'tokens': jnp.sum(sequences.segment_ids > 0, dtype=jnp.float32)}
    return state.replace(step=state.step + fine.astype(jnp.int32), params=params['policy'], opt_state=opt_state,
                         value_params=params['value'],
                         kl_coefficient=jnp.where(fine, coefficient, state.kl_coefficient)), metrics

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
