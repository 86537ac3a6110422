"""Online preference optimisation: the policy answers, a reward or judge orders its answers, DPO or another pair loss
learns from the order, and so on with the new policy (online DPO: Guo et al. 2024, arXiv:2402.04792, algorithm 1).

  minimise E_{x ~ prompts, y_1 … y_K ~ π}[ 1/C(K,2) Σ_{r(y_w) > r(y_l)} ℓ(log π(y_w|x)/π_ref(y_w|x), …) ]

The losses are those of stages/preference.py but KTO's, whose anchor needs another prompt's answers. The answers are
taken as given: no gradient flows through who answered what. Left out: dropout, an older policy's answers.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.objectives import ranking
from rlhf_jax.runtime import loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import preference
from rlhf_jax.stages.shared import common, rollout
from rlhf_jax.types import Rankings

DEFAULTS = dict(
    rollout.DEFAULTS,
    batch_size=32,  # prompts of a step, over all devices
    num_samples=2,  # answers to each prompt, K
    minibatches=1,  # must stay 1: the answers of a step are one batch
    loss='dpo',  # one of preference.LOSSES but kto
    **{name: preference.DEFAULTS[name] for name in ('beta', 'label_smoothing', 'margin', 'nll_coefficient')},
    sampling=dict(sampler.DEFAULTS),
    optimizer=dict(steps.OPTIMIZER, learning_rate=5e-6, schedule='linear', final_scale=0.0, warmup_steps=10),
    loop=dict(loop.DEFAULTS, steps=200, eval_every=20, save_every=25, log_every=1),
)


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
  optimizer = steps.make_optimizer(section.optimizer, section.loop.steps)
  generate = sampler.build_sampler(model, section.sampling, (tokenizer.eos_id,), tokenizer.pad_id, section.num_samples,
                           layout=layout)
  update = steps.build(preference.build_loss(model, section), optimizer, layout, section.microbatches)
  return rollout.RolloutParts(model, lambda: common.init_state(context, read(), optimizer), generate, update, reference_model,
                       read_reference)


def build(context: common.Context) -> loop.Training:
  """The stage, ready to run."""
  section, parts = context.section, define(context)
  (train, examples), (held_out, held_out_examples) = rollout.read_prompts(context)
  score, score_held_out = rollout.build_scores(context, train, held_out)
  step = build_step(parts.generate, score, parts.update, parts.model, parts.reference_model, context.layout, section)
  reference = parts.read_reference()
  return loop.Training(
      name=context.name, init=parts.init, step=lambda state, prompts: step(state, prompts, reference),
      evaluate=rollout.build_evaluation(context, parts, reference, score_held_out, held_out, held_out_examples),
      batches=batches.prompts(examples, section.batch_size, context.config.seed))


def check(section, where: str) -> None:
  """Raises UserError for a loss that is none of these, or settings it cannot have."""
  preference.check(section, where)
  if section.loss == 'kto':
    raise UserError(f'{where}.loss: kto is for the stage `preference` only')
  if section.num_samples < 2 or section.minibatches != 1:
    raise UserError(f'{where}: expected samples from 2 and minibatches 1, got {section.num_samples} and '
                    f'{section.minibatches}')


def build_step(generate, score, update, model, reference_model, layout, config):
  """One step: rollout → scores → order → update.

  Args:
    generate: (params, Prompts, key) → Samples.
    score: (Prompts, Samples) → ([B * K] float32 on the mesh, metrics).
    update: (state, Rankings) → (state, metrics).

  Returns:
    step(state, Prompts, reference) → (state, metrics).
  """
  K, temperature = config.num_samples, config.sampling.temperature or 1.0

  @jax.jit
  def order(params, reference, prompts, samples, scores):
    """(Rankings, metrics) of scored answers."""
    sequences, P, R = sampler.join_sequences(prompts, samples), prompts.tokens.shape[1], samples.tokens.shape[1]
    rows = lambda x: x.reshape(-1, K, *x.shape[1:])
    places = lambda value, dtype=jnp.int32: jnp.full((len(scores) // K, K), value, dtype)
    final = rollout.final_scores(samples.ended, scores, config)
    batch = Rankings(
        tokens=rows(sequences.tokens), positions=rows(sequences.positions), segment_ids=rows(sequences.segment_ids),
        group=places(1), ranks=ranking.from_scores(rows(final)), index=jnp.repeat(prompts.index, K).reshape(-1, K),
        begins=places(P), confidence=places(1.0, jnp.float32), reference_logprobs=places(0.0, jnp.float32))
    batch = batch.replace(reference_logprobs=preference.response_logprobs(reference_model, reference, batch)[0])
    logprobs, entropies, _ = rollout.forward(model, params, sequences, R, temperature)
    reference_logprobs, _, _ = rollout.forward(reference_model, reference, sequences, R, temperature)
    kl = jnp.where(samples.mask, logprobs - reference_logprobs, 0.0)
    return batch, rollout.rollout_metrics(samples, sequences, logprobs, entropies, kl, scores) | {'reward/mean': jnp.mean(final)}

  def step(state, prompts, reference):
    prompts = layout.place(prompts)
    samples = generate(state.params, prompts, jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step))
    scores, said = score(prompts, samples)
    batch, described = order(state.params, reference, prompts, samples, scores)
    state, metrics = update(state, batch)
    return state, {**metrics, **described, **said}

  return step
