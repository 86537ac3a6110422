"""Policy gradients without a value model: REINFORCE, RLOO, REINFORCE++, GRPO, Dr. GRPO, DAPO, …

  maximise E_{x ~ prompts, y_1 … y_K ~ π}[ Σ_k A(r_1 … r_K)_k · ℓ(π(y_k|x)) ]  − β KL(π ‖ π_ref)

One iteration: the policy responds to every prompt K times, the reward scores the
responses, and a response is compared with the others of its prompt
(objectives/advantages.py: GROUP_ADVANTAGES) instead of with a learned value. The
methods differ in four choices, each a function named in the
config: `advantage`, `loss`, `reduce` and the place of the KL; docs/policy_gradient.md has the
table. GSPO and CISPO are losses of this stage too.

Dynamic sampling (DAPO): prompts whose responses all score the same teach nothing, as
each is compared with its equals; with `resampling` > 0 other prompts take their place.

Responses of an older policy: with `sampler_every` = n > 1 the policy that
responds is updated only every n steps, and importance weights correct for that
(shared/off_policy.py).

Left out: dropout, an entropy bonus.

The path of a step: `build` → `iterate` → `train_step` → `update_once` or
`update_in_minibatches` → `assess_rollout` → `loss`.
"""

from collections.abc import Collection
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches
from rlhf_jax.errors import UserError
from rlhf_jax.objectives import (
  advantages,
  divergence,
  masked,
  policy_gradient,
)
from rlhf_jax.options import Count, Natural, NonNegative, Share
from rlhf_jax.planning.programs import StagePlan
from rlhf_jax.runtime import hosts, loop, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import (
  off_policy,
  packing,
  rollout,
  rollout_metering,
  rollout_plan,
  training,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import StageKind, TINY_LOOP
from rlhf_jax.stages.shared.model_store import ModelStore, OpenModel
from rlhf_jax.stages.shared.off_policy import SamplerState
from rlhf_jax.stages.shared.packing import Chunks, PackedRows
from rlhf_jax.stages.shared.rollout import (
  RolloutDefinitions,
  RolloutParts,
  ScoredRollout,
)
from rlhf_jax.stages.shared.scores import check_scores, open_scores, Score
from rlhf_jax.types import (
  Array,
  merge_params,
  Params,
  Prompts,
  Sequences,
  TrainState,
)


@dataclasses.dataclass(frozen=True)
class Options(off_policy.OffPolicyOptions):
  """The section of a policy-gradient stage."""

  batch_size: Count = 16  # prompts of a step, over all devices
  num_samples: Count = 4  # responses to each prompt, K
  minibatches: Count = 1  # optimizer updates in one pass over the responses of a step
  epochs: Count = 1  # passes over the responses of a step
  advantage: str = 'leave_one_out'  # a name in advantages.GROUP_ADVANTAGES
  whiten_advantages: bool = False  # over all tokens of a step (REINFORCE++)
  loss: str = 'clipped'  # clipped, reinforce, gspo, cispo
  reduce: str = 'token_mean'  # token_mean, sequence_mean, sequence_sum, constant
  clip_low: Share = 0.2  # ε below 1, of the probability ratio
  clip_high: NonNegative = 0.2  # ε above 1
  kl_coefficient: NonNegative = 0.05  # β; 0 = no KL, and no reference is kept
  # Where the KL counts. reward: subtracted from the score, as the response's sum of
  # k1; tokens: from a token's advantage, as the sum of what is still to come
  # (REINFORCE++); loss: a term of the loss (GRPO).
  kl_place: str = 'reward'
  kl_estimator: str = 'k3'  # of the loss's term: k1, k2, k3
  # Overlong shaping (DAPO): the last so many tokens before max_new_tokens cost a
  # reward of 1 together, each the same; 0 = none.
  overlong_buffer: Natural = 0
  resampling: Natural = 0  # dynamic sampling (DAPO): at most so many further batches a step
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=1e-5,
    schedule='linear',
    final_scale=0.0,
    eps=1e-5,
  )
  loop: LoopOptions = LoopOptions(eval_every=20, save_every=25, log_every=1)

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = super().unread()
    if self.kl_place != 'loss':
      unread['kl_estimator'] = "kl_place is not 'loss'"
    if not self.kl_coefficient:
      unread |= dict.fromkeys(('kl_place', 'kl_estimator'), 'kl_coefficient is 0')
    why = ''
    if self.loss == 'reinforce':
      why = "loss is 'reinforce'"
    elif self.epochs * self.minibatches == 1:
      why = 'a step makes one update, for which the ratio is 1'
    return unread | (dict.fromkeys(('clip_low', 'clip_high'), why) if why else {})

  @property
  def keeps_reference(self) -> bool:
    """Whether the KL counts."""
    return self.kl_coefficient > 0


# The types of a step.


class AssessedRollout(flax.struct.PyTreeNode):
  """A rollout with its advantages; N = B * K rows.

  Attributes:
    sequences: prompts and responses, [N, P + R].
    mask: [N, R] bool, the response up to and including its end token.
    logprobs: [N, R] float32, of the policy before the update.
    reference_logprobs: [N, R] float32; None without a reference.
    advantages: [N, R] float32.
    weights: [N, R] float32, importance weights for another sampler.
    prompts: [N] int32, the number of each row's prompt in the step.
  """

  sequences: Sequences
  mask: Array
  logprobs: Array
  reference_logprobs: Array | None
  advantages: Array
  weights: Array
  prompts: Array


class Evaluated(NamedTuple):
  """The outputs of policy and reference on N responses, before the update."""

  logprobs: Array  # [N, R] float32, of the policy
  # [N, R] float32, of the policy's distributions; None if its logprobs are the sampler's
  entropies: Array | None
  reference_logprobs: Array | None  # [N, R] float32


# The pure functions of a step, in the order in which they are called.


def train_step(
  state: SamplerState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: RolloutDefinitions,
  options: Options,
) -> tuple[SamplerState, dict[str, Array]]:
  """Updates the policy from scored responses: assessment, then epochs of minibatches.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: the policy, the optimizer's state, the step and the root key.
    scored: N = B * K responses of at most R tokens, the K of a prompt beside each
      other.
    reference_params: the parameters of the reference; None where no KL counts.
    definitions: the definitions of policy, reference, optimizer and layout.
    options: the options of the stage.

  Returns:
    The next state, and metrics ([] float32 each; docs/metrics.md). Where loss or
    gradient of a minibatch is not finite, that minibatch changes nothing.
  """
  only_chunk = None
  if options.epochs * options.minibatches == 1:
    only_chunk = rollout.open_only_chunk(scored, definitions, options)
  if only_chunk or rollout.is_one_pass(options):
    (trained, opt_state), metrics, updated = update_once(
      state, scored, reference_params, definitions, options, only_chunk
    )
  else:
    (trained, opt_state), metrics, updated = update_in_minibatches(
      state, scored, reference_params, definitions, options
    )
  # A step in which no minibatch changed anything does not count: it is made again.
  step = state.step + updated.astype(jnp.int32)
  next_state = state.replace(
    step=step,
    trained=trained,
    opt_state=opt_state,
    sampler_trained=off_policy.next_sampler(trained, state.sampler_trained, step, options),
  )
  return next_state, metrics


def update_once(
  state: SamplerState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: RolloutDefinitions,
  options: Options,
  only_chunk: Chunks | None = None,
) -> tuple[tuple[Params, Any], dict[str, Array], Array]:
  """Makes the only update of a step, whose forward pass also gives the logprobs before it.

  The results are those of `update_in_minibatches`, which would run the policy once more.

  The arguments are those of `train_step`; `only_chunk` are the responses as they are packed,
  if they are.

  Returns:
    (trained parameters, the optimizer's state), metrics, and whether they changed, [] bool.
  """
  frozen = state.frozen.get('params', {})
  responses = (
    only_chunk.read(jnp.int32(0)) if only_chunk else scored.sequences,
    scored.samples.tokens.shape[1],
    options.sampling.temperature,
  )

  def in_order(tree: Any) -> Any:
    return only_chunk.put_back(tree) if only_chunk else tree

  reference = in_order(
    rollout.reference_logprobs(definitions.reference_model, reference_params, *responses)
  )

  def batch_loss(trained: Params, scored: ScoredRollout, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    params = merge_params(trained, frozen)
    now = rollout.forward_responses(definitions.model, params, *responses)
    now = now._replace(logprobs=in_order(now.logprobs), entropies=in_order(now.entropies))
    evaluated = Evaluated(now.logprobs, now.entropies, reference)
    assessed, metrics = assess_rollout(scored, jax.lax.stop_gradient(evaluated), options)
    return dataclasses.replace(loss(now, assessed, options), counts=metrics)

  trained, opt_state, metrics = steps.update_params(
    batch_loss,
    definitions.optimizer,
    state.trained,
    state.opt_state,
    scored,
    steps.update_key(state),
  )
  metrics['policy/first_ratio'] = metrics['policy/ratio']
  metrics |= only_chunk.metrics() if only_chunk else {}
  return (trained, opt_state), metrics, steps.update_is_finite(metrics)


def update_in_minibatches(
  state: SamplerState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: RolloutDefinitions,
  options: Options,
) -> tuple[tuple[Params, Any], dict[str, Array], Array]:
  """Assesses the responses, then passes over them in epochs of minibatches.

  The arguments are those of `train_step`.

  Returns:
    (trained parameters, the optimizer's state), metrics, and whether any minibatch changed
    them, [] bool.
  """
  # Recomputed here, unless the sampler's are the same to the bit, so that the first ratio is
  # exactly 1.
  evaluated = evaluate_responses(state, scored, reference_params, definitions, options)
  assessed, metrics = assess_rollout(scored, evaluated, options)
  update = functools.partial(
    update_minibatch,
    frozen=state.frozen.get('params', {}),
    definitions=definitions,
    options=options,
  )
  carry, update_metrics = rollout.epochs_of_minibatches(
    update,
    (state.trained, state.opt_state),
    assessed,
    steps.update_key(state),
    epochs=options.epochs,
    minibatches=options.minibatches,
    layout=definitions.layout,
  )
  metrics |= rollout.epoch_metrics(update_metrics)
  return carry, metrics, rollout.made_an_update(update_metrics)


def evaluate_responses(
  state: TrainState,
  scored: ScoredRollout,
  reference_params: Params | None,
  definitions: RolloutDefinitions,
  options: Options,
) -> Evaluated:
  """Runs the models over the responses, before the update; the policy only if that is needed."""
  response_length = scored.samples.tokens.shape[1]
  temperature = options.sampling.temperature

  def evaluate_reference(sequences: Sequences | PackedRows) -> Array | None:
    return rollout.reference_logprobs(
      definitions.reference_model, reference_params, sequences, response_length, temperature
    )

  def evaluate_both(sequences: Sequences | PackedRows) -> Evaluated:
    policy = rollout.forward_responses(
      definitions.model, state.params, sequences, response_length, temperature
    )
    return Evaluated(policy.logprobs, policy.entropies, evaluate_reference(sequences))

  evaluate = functools.partial(
    rollout.evaluate_in_parts, scored=scored, definitions=definitions, options=options
  )
  if not off_policy.trusts_sampler(definitions.model, options):
    return evaluate(evaluate_both)
  reference = None if reference_params is None else evaluate(evaluate_reference)
  return Evaluated(scored.samples.logprobs, None, reference)


def assess_rollout(
  scored: ScoredRollout, evaluated: Evaluated, options: Options
) -> tuple[AssessedRollout, dict[str, Array]]:
  """Computes advantages from scores and KL.

  Args:
    scored: N responses with their scores.
    evaluated: the outputs of the models on them, [N, R].
    options: the options of the stage.

  Returns:
    The rollout with advantages and weights, and its metrics.
  """
  samples = scored.samples
  mask = samples.mask  # [N, R] bool
  N, R = samples.tokens.shape
  K = options.num_samples
  lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)  # [N]
  reference = evaluated.reference_logprobs
  kl = rollout.kl_to_reference(evaluated.logprobs, reference, mask)  # [N, R]

  scores = rollout.final_scores(samples.ended, scored.scores, options)  # [N]
  rewards = scores  # [N]
  if options.overlong_buffer:
    rewards = rewards + advantages.overlong_penalty(lengths, R, options.overlong_buffer)
  if options.kl_place == 'reward':
    rewards = rewards - options.kl_coefficient * jnp.sum(kl, axis=1)

  # Each response is compared with the other K - 1 of its prompt.
  group_advantage = advantages.GROUP_ADVANTAGES[options.advantage]
  response_advantages = group_advantage(rewards.reshape(-1, K), lengths.reshape(-1, K))  # [B, K]
  advantage = jnp.broadcast_to(response_advantages.reshape(-1, 1), (N, R))
  if options.kl_place == 'tokens':
    advantage = advantage - options.kl_coefficient * advantages.reward_to_go(kl)
  if options.whiten_advantages:
    advantage = masked.whiten(advantage, mask)

  weights, weight_metrics = off_policy.importance_weights(evaluated.logprobs, samples, options)
  assessed = AssessedRollout(
    sequences=scored.sequences,
    mask=mask,
    logprobs=evaluated.logprobs,
    reference_logprobs=reference,
    advantages=advantage,
    weights=weights,
    prompts=jnp.arange(N) // K,
  )
  # Of the scores alone: KL and length would make nearly all groups unequal.
  equal_groups = jnp.ptp(scores.reshape(-1, K), axis=1) == 0
  metrics = rollout.rollout_metrics(
    scored, evaluated.logprobs, evaluated.entropies, kl if reference is not None else None
  )
  metrics |= weight_metrics
  metrics |= {
    'reward/mean': jnp.mean(rewards),
    'reward/equal_groups': jnp.mean(equal_groups, dtype=jnp.float32),
  }
  return assessed, metrics


def update_minibatch(
  carry: tuple[Params, Any],
  assessed: AssessedRollout,
  unshuffled: None,
  key: Array,
  frozen: Params,
  definitions: RolloutDefinitions,
  options: Options,
) -> tuple[tuple[Params, Any], dict[str, Array]]:
  """Makes one optimizer update from a minibatch of responses.

  Args:
    carry: (the trained parameters, the optimizer's state).
    assessed: the minibatch.
    unshuffled: None; PPO has documents here.
    key: the random key of this minibatch.
    frozen: the parameters beside the trained ones.
    definitions: the definitions of the policy, the optimizer and the layout.
    options: the options of the stage.

  Returns:
    The next carry, and metrics ([] float32 each).
  """
  del unshuffled
  trained, opt_state = carry

  def batch_loss(trained: Params, batch: Any, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    assessed, _ = batch
    now = rollout.forward_responses(
      definitions.model,
      merge_params(trained, frozen),
      assessed.sequences,
      assessed.mask.shape[1],
      options.sampling.temperature,
    )
    value = loss(now, assessed, options)
    if off_policy.trusts_sampler(definitions.model, options):
      value = off_policy.measure_gap(value, now.logprobs, assessed.logprobs, assessed.mask)
    return value

  sharing = packing.plan_sharing(
    assessed.prompts,
    assessed.sequences.tokens.shape[1],
    options.num_samples,
    [definitions.model],
    definitions.layout,
    assessed.mask.shape[1],
    complete=options.minibatches == 1,
  )
  batch, packing_metrics = packing.pack_minibatch(assessed, definitions, options, sharing=sharing)
  trained, opt_state, metrics = steps.update_params(
    batch_loss, definitions.optimizer, trained, opt_state, batch, key, options.microbatches
  )
  return (trained, opt_state), metrics | packing_metrics


def loss(now: rollout.ResponseForward, assessed: AssessedRollout, options: Options) -> steps.Loss:
  """Computes the policy loss that `options.loss` names, with the KL term if it is in the loss.

  Args:
    now: the outputs of the policy on n responses.
    assessed: these responses, of at most R tokens.
    options: the options of the stage.

  Returns:
    The sum and its weight as `options.reduce` defines them (over tokens or
    responses), and statistics over response tokens.
  """
  mask = assessed.mask  # [n, R] bool
  policy_loss = policy_gradient.POLICY_LOSSES[options.loss]
  losses, ratios, clipped = policy_loss(
    now.logprobs,
    assessed.logprobs,
    assessed.advantages,
    mask,
    options.clip_low,
    options.clip_high,
  )
  losses = losses * assessed.weights  # [n, R]
  reference = assessed.reference_logprobs
  if reference is not None and options.kl_place == 'loss':
    kl_term = divergence.KL_TERMS[options.kl_estimator]
    kl = kl_term(masked.keep(now.logprobs, mask), masked.keep(reference, mask))
    losses = losses + options.kl_coefficient * kl
  total, weight = policy_gradient.REDUCTIONS[options.reduce](losses, mask)
  count = masked.total(1.0, mask)  # also where `reduce` divides by something else
  approx_kl = 0.5 * (now.logprobs - assessed.logprobs) ** 2
  means = {
    'policy/clip_fraction': (masked.total(clipped, mask), count),
    'policy/ratio': (masked.total(ratios, mask), count),
    'policy/entropy': (masked.total(now.entropies, mask), count),
    'policy/approx_kl': (masked.total(approx_kl, mask), count),
  }
  return steps.Loss(total=total, weight=weight, means=means)


# The stage: what runs around the compiled step.


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def takes_one_pass(definitions: RolloutDefinitions, options: Options) -> bool:
  """Tells whether a step runs the policy over its responses once only, see `train_step`."""
  if options.epochs * options.minibatches > 1:
    return False
  new_tokens = options.sampling.max_new_tokens
  in_one_chunk = rollout.fit_in_one_chunk(
    options.batch_size * options.num_samples,
    options.max_length + new_tokens,
    new_tokens,
    definitions,
    options,
  )
  return in_one_chunk or rollout.is_one_pass(options)


def build(context: Context, options: Options) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation."""
  parts = define(context, options)
  train, held_out = rollout.read_prompts(context, options)
  score, score_held_out = open_scores(
    context, parts.store, options, train.records, held_out.records
  )
  meter = rollout_metering.meter_rollout(
    parts.definitions,
    options,
    options.epochs,
    assessed_before=not takes_one_pass(parts.definitions, options),
    trusts_sampler=off_policy.trusts_sampler(parts.definitions.model, options),
  )
  memory = rollout.memory_of(parts)
  parts, score = rollout_metering.time_phases(meter, parts, score)
  reference_params = parts.read_reference()
  step = functools.partial(
    iterate,
    parts=parts,
    score=score,
    reference_params=reference_params,
    layout=context.layout,
    options=options,
  )
  # A step takes its prompts for resampling from the data too, whether it needs them
  # or not: a resumed run then reads on at the same place.
  prompts_per_step = options.batch_size * (1 + options.resampling)
  return loop.Training(
    name=context.name,
    init=parts.init,
    step=step,
    meter=meter,
    memory=memory,
    evaluate=rollout.build_evaluation(
      context, options, parts, reference_params, score_held_out, held_out
    ),
    batches=batches.prompts(train.examples, prompts_per_step, context.config.seed),
    warn=off_policy.build_warning(options),
  )


def iterate(
  state: SamplerState,
  batch: Prompts,
  parts: RolloutParts,
  score: Score,
  reference_params: Params | None,
  layout: Layout,
  options: Options,
) -> tuple[SamplerState, dict[str, Any]]:
  """Makes one iteration: rollout → scores → (dynamic sampling) → update.

  Args:
    state: before the step; its buffers are donated.
    batch: prompts [B * (1 + resampling), P] as host arrays.
    parts: the compiled rollout and train step.
    score: the reward, which may leave the devices to read texts.
    reference_params: the parameters of the reference; None where no KL counts.
    layout: the mesh on which batches are placed.
    options: the options of the stage.

  Returns:
    The next state, and the metrics of update and reward.
  """
  # number → the scored responses to part `number` of the step's prompts
  respond = functools.partial(
    _respond,
    state.sampler_params,
    batch,
    rollout.sampling_key(state),
    parts,
    score,
    layout,
    options,
  )
  scored, score_metrics = respond(0)
  extra = 0  # batches beside the first
  for number in range(1, 1 + options.resampling):
    useful = _useful_groups(scored, options)
    if useful.all():
      break
    more, more_metrics = respond(number)
    extra += 1
    score_metrics = _running_mean(score_metrics, more_metrics, number)
    useful = np.concatenate([useful, _useful_groups(more, options)])
    scored = _keep_useful(scored, more, useful, layout, options)
  state, metrics = parts.update(state, scored, reference_params)
  extra_responses = extra * options.batch_size * options.num_samples
  return state, {
    **metrics,
    **score_metrics,
    'response/extra': np.float32(extra_responses),
  }


def _respond(
  params: Params,
  prompts: Prompts,
  key: Array,
  parts: RolloutParts,
  score: Score,
  layout: Layout,
  options: Options,
  number: int,
) -> tuple[ScoredRollout, dict[str, Array]]:
  """Responds to part `number` of a step's prompts, and scores the responses."""
  batches_in_step = 1 + options.resampling

  def take_part(x: np.ndarray) -> np.ndarray:
    return x.reshape(batches_in_step, -1, *x.shape[1:])[number]

  placed = layout.place(jax.tree.map(take_part, prompts))
  samples = parts.generate(params, placed, jax.random.fold_in(key, number))
  scores, metrics = score(placed, samples)
  sequences = rollout.join_sequences(placed, samples)
  return ScoredRollout(sequences, samples, scores), metrics


def _useful_groups(scored: ScoredRollout, options: Options) -> np.ndarray:
  """Returns for each prompt whether its responses have different scores, [B] bool.

  Neither the KL nor the overlong penalty makes a prompt useful.
  """
  ended, scores = hosts.to_host((scored.samples.ended, scored.scores))
  final = rollout.final_scores(ended, scores, options)
  return np.ptp(np.asarray(final).reshape(-1, options.num_samples), axis=1) > 0


def _keep_useful(
  kept: ScoredRollout,
  new: ScoredRollout,
  useful: np.ndarray,
  layout: Layout,
  options: Options,
) -> ScoredRollout:
  """Keeps B of the 2 * B groups of two batches, useful groups first.

  Args:
    kept: B groups of K responses.
    new: B more.
    useful: [2 * B] bool, first those of `kept`, then those of `new`.
    layout: the mesh on which the result is sharded.
    options: of which batch_size and num_samples are read.

  Returns:
    B groups of K responses.
  """
  # A stable sort: among equals, earlier groups are kept.
  groups = np.argsort(~useful, kind='stable')[: options.batch_size]
  rows = groups[:, None] * options.num_samples + np.arange(options.num_samples)
  return _merge_rows(kept, new, rows.ravel(), layout=layout)


@functools.partial(jax.jit, static_argnames='layout')
def _merge_rows(kept: Any, new: Any, rows: Array, layout: Layout) -> Any:
  """Takes rows of two trees of arrays [N, …], numbered as if they were concatenated."""

  def pick(a: Array, b: Array) -> Array:
    picked = jnp.concatenate([a, b])[rows]
    return layout.constrain(picked, ('batch',) + (None,) * (picked.ndim - 1))

  return jax.tree.map(pick, kept, new)


def _running_mean(mean: Any, new: Any, count: int) -> Any:
  """Returns the mean of `count` + 1 trees from the mean of `count` and a new one."""

  def update(mean: Any, new: Any) -> Any:
    return (mean * count + new) / (count + 1)

  return jax.tree.map(update, mean, new)


def define(context: Context, options: Options) -> RolloutParts:
  """Defines the parts of an iteration; data and parameters are read later."""
  check_options(options, context.where)
  rollout.check_batch(context, options)
  store = ModelStore(context, options.lora)
  policy = store.open(options.init, trained=True)
  reference = rollout.open_reference(store, options)
  training.write_model_json(context, policy.model)
  # The learning rate falls with every minibatch, so the schedule counts those.
  updates = options.loop.steps * options.epochs * options.minibatches
  definitions = RolloutDefinitions(
    model=policy.model,
    reference_model=reference.model if reference else None,
    optimizer=optimizers.make_optimizer(options.optimizer, updates),
    layout=context.layout,
  )
  return RolloutParts(
    definitions=definitions,
    init=functools.partial(_init_state, context, options, definitions, policy),
    generate=rollout.build_generate(context, policy.model, options),
    update=training.compile_train_step(train_step, definitions, options),
    read_reference=rollout.reference_reader(reference),
    store=store,
  )


def _init_state(
  context: Context,
  options: Options,
  definitions: RolloutDefinitions,
  policy: OpenModel,
) -> SamplerState:
  """Creates the state before the first step."""
  state = training.create_state(context, policy.read(), definitions.optimizer)
  sampler_trained = off_policy.first_sampler(context.layout, state.trained, options)
  return SamplerState(**vars(state), sampler_trained=sampler_trained)


def check_options(options: Options, where: str) -> None:
  """Checks the options.

  Args:
    options: the options of the stage.
    where: the section's name, for messages.

  Raises:
    UserError: an unknown choice, or a number out of its range.
  """
  choices: dict[str, Collection[str]] = {
    'advantage': advantages.GROUP_ADVANTAGES,
    'loss': policy_gradient.POLICY_LOSSES,
    'reduce': policy_gradient.REDUCTIONS,
    'kl_place': ('reward', 'tokens', 'loss'),
    'kl_estimator': divergence.KL_TERMS,
  }
  for name, known in choices.items():
    value = getattr(options, name)
    if value not in known:
      raise UserError(f'{where}.{name}: expected one of {", ".join(known)}, got {value!r}')
  # The baseline of a whole batch needs no second response to a prompt; all others do.
  compares_groups = options.advantage != 'batch_baseline' or options.resampling > 0
  if options.num_samples < 2 and compares_groups:
    raise UserError(
      f'{where}.num_samples: expected 2 or more, as the responses to a prompt are compared with '
      'each other; with advantage=batch_baseline and without resampling one will do'
    )
  updates = options.epochs * options.minibatches
  if options.loss == 'reinforce' and updates > 1:
    raise UserError(
      f'{where}.loss: reinforce is unbiased for the first update from some responses only; '
      f'expected epochs and minibatches 1, got {options.epochs} and {options.minibatches}; '
      'clipped corrects for further ones'
    )
  rollout.check_sampling(options, where)
  off_policy.check_options(options, where)
  limit = options.sampling.max_new_tokens
  if options.overlong_buffer > limit:
    raise UserError(
      f'{where}.overlong_buffer: expected at most sampling.max_new_tokens = {limit}, got '
      f'{options.overlong_buffer}'
    )


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  return rollout_plan.plan_rollout(
    context, options, define(context, options), passes=options.epochs
  )


TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'eval_records': 8,
}
STAGE = StageKind(
  options=Options,
  run=run,
  plan=plan,
  tiny=TINY,
  data=rollout.list_data,
  check=check_scores,
)
