"""Provides what is common to the stages that learn from the policy's own responses.

One iteration is: rollout (the policy responds to prompts) → scores → update. The
update is the stage's `train_step`. This file has the rest: reading prompts, the
forward pass over responses, the epochs of minibatches, the metrics of a rollout
and the evaluation on held-out prompts.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import random_keys
from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.generation import responses, sampler, speculation
from rlhf_jax.generation.responses import Responses
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import heads
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import divergence
from rlhf_jax.options import Count, Natural, Number, Numbers
from rlhf_jax.rewards.sources import RewardSourceOptions
from rlhf_jax.runtime import hosts, loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.stages.shared import packing, response_judge, token_view, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse
from rlhf_jax.stages.shared.model_store import ModelStore, OpenModel
from rlhf_jax.stages.shared.packing import Chunks, PackedRows, Sharing
from rlhf_jax.stages.shared.scores import Score
from rlhf_jax.stages.shared.training import Definitions
from rlhf_jax.types import (
  Array,
  Params,
  Prompts,
  Samples,
  Sequences,
  TrainState,
)

Carry = TypeVar('Carry')


@dataclasses.dataclass(frozen=True)
class RolloutOptions(RewardSourceOptions):
  """The settings that all such stages have; each adds those of its method."""

  init: str = 'sft'  # the policy that is trained
  lora: LoraOptions = LoraOptions()  # adapters beside frozen matrices instead of all parameters
  reference: str = 'sft'  # the KL penalty is against this model; it stays as it is
  # Where rewards come from, each a stage that trained a reward model, its folder,
  # a directory, a function 'module:function' of texts (docs/rewards.md),
  # 'scorer:MODEL' (a language model that grades: direct RLAIF), or the address of
  # a server.
  reward: tuple[str, ...] = ('reward',)
  reward_weights: Numbers = ()  # of several rewards, in their order; all 1 if empty
  standardise_rewards: bool = False  # each of several to mean 0, variance 1 over the batch first
  batch_size: Count = 64  # prompts of a step, over all devices
  num_samples: Count = 1  # responses to each prompt, K
  max_length: Count = 48  # tokens of a prompt at most
  overlong: str = 'drop'  # a longer prompt: drop (they are counted), truncate_left, error
  minibatches: Count = 2  # optimizer updates in one pass over the responses of a step
  microbatches: Count = 1  # parts of a minibatch, one after the other, to save memory
  # Packed rows that are computed at a time, in the update and in every pass before it:
  # responses share the places that padding would take; 0 = nothing is packed. A
  # multiple of the devices that share a batch. It takes the place of microbatches.
  packed_rows: Natural = 0
  missing_eos: bool = True  # a response without an end token scores missing_eos_score
  missing_eos_score: Number = -1.0
  eval_records: Count = 64  # held-out prompts
  shown_responses: Natural = 4  # responses written at each evaluation
  data: DataOptions = DataOptions()
  sampling: SamplingOptions = SamplingOptions()

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = self.unread_without(self.reward)
    if not self.missing_eos:
      unread['missing_eos_score'] = 'missing_eos is False'
    if not self.keeps_reference:
      unread['reference'] = 'kl_coefficient is 0'
    return unread

  @property
  def keeps_reference(self) -> bool:
    """Whether the method reads a reference; if not, none is kept and no KL is measured."""
    return True

  @property
  def parts(self) -> int:
    """The number of parts in which a step computes its responses, one after the other."""
    return self.minibatches * self.microbatches


class ScoredRollout(flax.struct.PyTreeNode):
  """The data of one step: N = B * K responses with their scores.

  Attributes:
    sequences: prompts and responses, [N, P + R].
    samples: the responses as they were generated, [N, R].
    scores: [N] float32, as the reward gave them.
    pretraining: documents for PPO-ptx, [N, T]; None without.
  """

  sequences: Sequences
  samples: Samples
  scores: Array
  pretraining: Sequences | None = None


class RolloutParts(NamedTuple):
  """The parts of an iteration, defined before data and parameters are read.

  Attributes:
    definitions: the stage's; `model`, `reference_model`, `optimizer` and `layout` are
      in it.
    init: () → the state before the first step.
    generate: (params, Prompts, key) → Samples, compiled.
    update: the compiled train step.
    read_reference: () → the reference's parameters; None where there is none.
    store: the stage's models; reward models on the same frozen base share it.
  """

  definitions: Any
  init: Callable[[], TrainState]
  generate: Callable[[Params, Prompts, Array], Samples]
  update: steps.CompiledStep  # donates the state
  read_reference: Callable[[], Params | None]
  store: ModelStore


@dataclasses.dataclass(frozen=True)
class RolloutDefinitions(Definitions):
  """The definitions that the step of a policy with a reference is compiled with; they
  hold no arrays.

  Attributes:
    reference_model: the model that the KL is measured against. It may have another
      shape than the policy, but has the same tokens. None where no KL counts.
  """

  reference_model: Model | None


# Before the first step.


def check_batch(context: Context, options: RolloutOptions, together: int = 1) -> None:
  """Checks that the responses of a step divide over minibatches, micro-batches and devices.

  Args:
    context: the context of the stage.
    options: its options.
    together: responses that the loss compares with each other.
  """
  training.check_batch(context, options.batch_size * options.num_samples, options.parts)
  training.check_batch(context, options.batch_size, 1)  # the rollout computes all prompts at once
  shards = context.layout.batch_shards
  packing.check_rows(options.packed_rows, options.microbatches, shards, context.where, together)


def open_reference(store: ModelStore, options: RolloutOptions) -> OpenModel | None:
  """Opens the reference; None where the method reads none, so that none is kept in memory."""
  return store.open(options.reference) if options.keeps_reference else None


def reference_reader(reference: OpenModel | None) -> Callable[[], Params | None]:
  """Returns the function that reads the reference's parameters, or None where there is none."""
  return _read_nothing if reference is None else reference.read


def _read_nothing() -> None:
  return None


def check_sampling(options: RolloutOptions, where: str) -> None:
  """Refuses sampling from another distribution than the policy's, whose gradient is biased.

  The log-probabilities of the update are those of the whole vocabulary; responses
  that top-k, top-p or greedy decoding chose are no samples of that distribution.

  Args:
    options: the options of the stage.
    where: the section's name, for messages.

  Raises:
    UserError: the sampling restricts the choice of tokens.
  """
  sampling = options.sampling
  if sampling.temperature and not sampling.top_k and sampling.top_p == 1:
    return
  raise UserError(
    f'{where}.sampling: expected a temperature above 0, top_k 0 and top_p 1, as the gradient '
    f'would be biased otherwise; got temperature {sampling.temperature:g}, top_k '
    f'{sampling.top_k} and top_p {sampling.top_p:g}'
  )


class PromptSet(NamedTuple):
  """Prompts as records and as tokens.

  Attributes:
    records: the records that `Prompts.index` points at.
    examples: the encoded prompts, without those that are too long.
  """

  records: Sequence[Prompt]
  examples: list[dict]


def read_prompts(context: Context, options: RolloutOptions) -> tuple[PromptSet, PromptSet]:
  """Reads the training prompts and the held-out prompts, as a PromptSet each."""
  train = sources.load_records(options.data, 'prompt', 'train')
  held_out = sources.load_records(options.data, 'prompt', 'validation')
  held_out = sources.spread_evenly(held_out, options.eval_records)
  return _encode_prompts(context, train, options), _encode_prompts(context, held_out, options)


def _encode_prompts(
  context: Context, records: Sequence[Prompt], options: RolloutOptions
) -> PromptSet:
  examples = encode.prompts(
    records, context.tokenizer, options.max_length, options.overlong, hosts.spread
  )
  return PromptSet(records, examples)


def list_data(options: RolloutOptions, tokenizer: Any) -> list[DataUse]:
  """Lists the prompts that such a stage reads, with their encoding."""

  def encode_all(records: Sequence[Prompt], overlong: str) -> list[dict]:
    return encode.prompts(records, tokenizer, options.max_length, overlong)

  return [DataUse('data', options.data, 'prompt', encode_all, options.overlong)]


def build_generate(
  context: Context, model: Model, options: RolloutOptions
) -> Callable[[Params, Prompts, Array], Samples]:
  """Builds the compiled rollout of a policy.

  Returns:
    generate(params, prompts [B, P], key) → Samples [B * K, R].
  """
  tokenizer = context.tokenizer
  generate = sampler.build_sampler(
    model,
    options.sampling,
    tokenizer.stop_ids,
    tokenizer.pad_id,
    options.num_samples,
    layout=context.layout,
  )
  if not options.sampling.drafts or context.layout.abstract:
    return generate
  places = options.num_samples * options.sampling.max_new_tokens
  return speculation.RecallingSampler(generate, places, tokenizer.pad_id)


def memory_of(parts: RolloutParts) -> loop.Memory | None:
  """Returns what the rollout remembers of earlier steps; None without drafts."""
  generate = parts.generate
  return generate if isinstance(generate, speculation.RecallingSampler) else None


# Pure parts of a train step.


class ResponseForward(NamedTuple):
  """The output of a model's forward pass over the responses of a rollout.

  Attributes:
    logprobs: [N, R] float32, at the sampling temperature.
    entropies: [N, R] float32, of the distributions that they were drawn from.
    hidden: [N, R, D], the states that predict them; of packed rows [C, W, D], those at all tokens.
  """

  logprobs: Array
  entropies: Array
  hidden: Array


def forward_responses(
  model: Model,
  params: Params,
  sequences: Sequences | PackedRows,
  response_length: int,
  temperature: float,
) -> ResponseForward:
  """Runs a model over prompts with responses and keeps what concerns the responses.

  Args:
    model: the definition.
    params: its parameters.
    sequences: [N, P + R]; or packed rows with N slots.
    response_length: R, the last so many places.
    temperature: the sampling temperature; 0 (greedy) counts as 1.

  Returns:
    Logprobs and entropies [N, R] float32, and the hidden states of `run_trunk`.
  """
  hidden = run_trunk(model, params, sequences, response_length)
  if isinstance(sequences, PackedRows):
    logprobs, entropies = packing.packed_logprobs(model, params, hidden, sequences, temperature)
    return ResponseForward(
      sequences.at_responses(logprobs), sequences.at_responses(entropies), hidden
    )
  targets = sequences.tokens[:, -response_length:]  # [N, R]
  logprobs, entropies = heads.token_logprobs(model, params, hidden, targets, temperature)
  return ResponseForward(logprobs, entropies, hidden)


def run_trunk(
  model: Model, params: Params, sequences: Sequences | PackedRows, response_length: int
) -> Array:
  """Runs a model without its head; returns the states that predict responses.

  The arguments are those of `forward_responses`.

  Returns:
    The states one place before each response token, [N, R, D]; of packed rows the states at
    all tokens, [C, W, D].
  """
  if isinstance(sequences, PackedRows):
    return packing.run_trunk(model, params, sequences)
  hidden, _ = model.apply(
    params,
    sequences.tokens,
    sequences.positions,
    sequences.segment_ids,
    places=slice(-response_length - 1, -1),
  )
  return hidden


def before_responses(values: Array, sequences: Sequences | PackedRows) -> Array:
  """Takes values at the states of `run_trunk`: one for each response token, [N, R]."""
  if isinstance(sequences, PackedRows):
    return sequences.at_responses(values)
  return values


def reference_logprobs(
  model: Model | None,
  params: Params | None,
  sequences: Sequences | PackedRows,
  response_length: int,
  temperature: float,
) -> Array | None:
  """Computes the reference's logprobs of the responses, [N, R] float32; None without one.

  The arguments are those of `forward_responses`.
  """
  if model is None or params is None:
    return None
  return forward_responses(model, params, sequences, response_length, temperature).logprobs


def is_one_pass(options: Any) -> bool:
  """Says whether a step is one update from padded rows all at once.

  Its forward pass then also gives what was before the update.

  Args:
    options: the stage's, with epochs, parts and packed_rows.
  """
  return options.epochs * options.parts == 1 and not options.packed_rows


def evaluate_in_parts(
  function: Callable[[Sequences | PackedRows], Any],
  scored: ScoredRollout,
  definitions: RolloutDefinitions,
  options: RolloutOptions,
) -> Any:
  """Computes a function of all responses, before the update.

  It does so packed, or in as many parts as the update, so that both need the same memory.

  Args:
    function: prompts with responses → a tree of arrays, a row for each.
    scored: N responses.
    definitions: of the policy and the layout.
    options: the stage's.

  Returns:
    The tree of arrays [N, …].
  """
  return packing.map_responses(
    function,
    scored.sequences,
    scored.samples.tokens.shape[1],  # R
    definitions.model,
    definitions.layout,
    options,
    share_prompts(scored, definitions, options),
  )


def share_prompts(
  scored: ScoredRollout, definitions: RolloutDefinitions, options: RolloutOptions
) -> Sharing | None:
  """Returns how responses to one prompt share it in packed rows; None where they do not."""
  return packing.share_prompts(
    scored.sequences,
    options.num_samples,
    list_models(definitions),
    definitions.layout,
    scored.samples.tokens.shape[1],  # R
  )


def open_only_chunk(
  scored: ScoredRollout, definitions: RolloutDefinitions, options: RolloutOptions
) -> Chunks | None:
  """Packs all responses of a step into one chunk; None where that may not hold them."""
  N, T = scored.sequences.tokens.shape
  R = scored.samples.tokens.shape[1]
  if not fit_in_one_chunk(N, T, R, definitions, options):
    return None
  return packing.open_chunks(
    scored.sequences,
    R,
    options.packed_rows,
    definitions.model,
    definitions.layout,
    sharing=share_prompts(scored, definitions, options),
  )


def fit_in_one_chunk(
  rows: int,
  length: int,
  response_length: int,
  definitions: RolloutDefinitions,
  options: RolloutOptions,
) -> bool:
  """Tells whether packed rows of one chunk hold all responses of a step, however long they are.

  Args:
    rows: N responses.
    length: T, places of a prompt with its response.
    response_length: R.
    definitions: of the policy and the layout.
    options: the stage's.
  """
  sharing = packing.plan_sharing(
    range(rows),
    length,
    options.num_samples,
    list_models(definitions),
    definitions.layout,
    response_length,
    complete=True,
  )
  chunks, _, _ = packing.divide(rows, 1, options.packed_rows, length, sharing)
  return options.packed_rows > 0 and chunks == 1


def list_models(definitions: RolloutDefinitions) -> list[Model]:
  """Returns all models that read a stage's responses."""
  return [value for value in vars(definitions).values() if isinstance(value, Model)]


def kl_to_reference(logprobs: Array, reference_logprobs: Array | None, mask: Array) -> Array:
  """Computes log π − log π_ref where the mask is, else 0; [N, R] float32.

  Args:
    logprobs: [N, R] float32, of the policy.
    reference_logprobs: [N, R] float32; None without a reference, which gives 0.
    mask: [N, R] bool.
  """
  if reference_logprobs is None:
    return jnp.zeros_like(logprobs)
  return jnp.where(mask, divergence.k1(logprobs, reference_logprobs), 0.0)


def final_scores(ended: Array, scores: Array, options: RolloutOptions) -> Array:
  """Replaces the scores of responses without an end token by `missing_eos_score`, if asked to.

  Args:
    ended: [N] bool.
    scores: [N] float32.
    options: of which missing_eos and missing_eos_score are read.

  Returns:
    [N] float32.
  """
  if not options.missing_eos:
    return scores
  return jnp.where(ended, scores, options.missing_eos_score)


def shuffled_minibatches(layout: Layout, batch: Any, order: Array, count: int) -> Any:
  """Cuts a batch into minibatches in a new order.

  Args:
    layout: each minibatch lies on all devices.
    batch: a tree of arrays [N, …].
    order: [N] int32, a permutation.
    count: how many minibatches.

  Returns:
    The tree with arrays [count, N / count, …].
  """

  def cut(x: Array) -> Array:
    # Sharded anew: without this, XLA may put each minibatch on a part of the devices.
    minibatches = x[order].reshape(count, -1, *x.shape[1:])
    names = (None, 'batch') + (None,) * (minibatches.ndim - 2)
    return layout.constrain(minibatches, names)

  return jax.tree.map(cut, batch)


def epochs_of_minibatches(
  update: Callable[[Carry, Any, Any, Array], tuple[Carry, dict[str, Array]]],
  carry: Carry,
  batch: Any,
  key: Array,
  *,
  epochs: int,
  minibatches: int,
  layout: Layout,
  unshuffled: Any = None,
) -> tuple[Carry, dict[str, Array]]:
  """Passes over a batch several times, in minibatches that are shuffled anew for each pass.

  Both loops are `lax.scan`s: nothing is unrolled, whatever their lengths.

  Args:
    update: (carry, minibatch, its part of `unshuffled`, key) → (carry, metrics).
    carry: what is updated, such as (trained parameters, optimizer state).
    batch: a tree of arrays [N, …], N a multiple of `minibatches`.
    key: one key is used for each pass and each minibatch.
    epochs: passes over the batch.
    minibatches: updates in a pass.
    layout: how minibatches lie on the mesh.
    unshuffled: another tree of arrays [N, …], which is cut into minibatches without
      shuffling.

  Returns:
    The last carry, and metrics [epochs, minibatches].
  """
  size = jax.tree.leaves(batch)[0].shape[0]  # N

  def split_rows(x: Array) -> Array:
    return x.reshape(minibatches, -1, *x.shape[1:])

  def minibatch_step(carry: Carry, inputs: Any) -> tuple[Carry, dict[str, Array]]:
    (minibatch, extra), key = inputs
    return update(carry, minibatch, extra, key)

  def epoch_step(carry: Carry, key: Array) -> tuple[Carry, dict[str, Array]]:
    order = jax.random.permutation(random_keys.for_purpose(key, 'order'), size)
    shuffled = shuffled_minibatches(layout, batch, order, minibatches)
    # Documents are drawn in random order already.
    extra = jax.tree.map(split_rows, unshuffled)
    keys = jax.random.split(random_keys.for_purpose(key, 'minibatches'), minibatches)
    return jax.lax.scan(minibatch_step, carry, ((shuffled, extra), keys))

  return jax.lax.scan(epoch_step, carry, jax.random.split(key, epochs))


def rollout_metrics(
  rollout: ScoredRollout, logprobs: Array, entropies: Array | None, kl: Array | None
) -> dict[str, Array]:
  """Describes a rollout as it was before the update.

  Args:
    rollout: N responses of at most R tokens.
    logprobs: [N, R] float32, of the policy before the update.
    entropies: [N, R] float32; None where the log-probabilities are the sampler's, so that
      its gap and the entropies come from the first minibatch (`epoch_metrics`).
    kl: [N, R] float32, log π − log π_ref, 0 outside the mask; None = not measured.

  Returns:
    Metrics, [] float32 each; docs/metrics.md explains them.
  """
  samples = rollout.samples
  mask = samples.mask
  count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)  # tokens of all responses
  metrics = {
    'reward/score': jnp.mean(rollout.scores),
    'reward/score_std': jnp.std(rollout.scores),
    'response/length': jnp.mean(jnp.sum(mask, axis=1, dtype=jnp.float32)),
    'response/eos_rate': jnp.mean(samples.ended.astype(jnp.float32)),
    'tokens': jnp.sum(rollout.sequences.segment_ids > 0, dtype=jnp.float32),
  }
  if entropies is not None:
    # From the sampler's logprobs to the training forward's; 0 but for rounding.
    gap = jnp.where(mask, jnp.abs(logprobs - samples.logprobs), 0.0)  # [N, R]
    metrics |= {
      'policy/rollout_entropy': jnp.sum(jnp.where(mask, entropies, 0.0)) / count,
      'policy/sampler_gap': jnp.max(gap),
      'policy/sampler_gap_mean': jnp.sum(gap) / count,
    }
  if kl is not None:
    metrics['kl'] = jnp.mean(jnp.sum(kl, axis=1))  # nats per response
  return metrics


def epoch_metrics(metrics: Mapping[str, Array]) -> dict[str, Array]:
  """Averages the metrics [epochs, minibatches] of all updates of a step.

  `policy/first_ratio` is the ratio in the first minibatch, before any update of the
  step. It is 1 up to rounding; another value shows that two forward passes disagree.
  Where the step takes the sampler's log-probabilities, its gap is measured there too.
  """
  means = {name: jnp.mean(x) for name, x in metrics.items()}
  first = {'policy/first_ratio': 'policy/ratio'}
  if 'policy/sampler_gap' in metrics:
    first |= {name: name for name in ('policy/sampler_gap', 'policy/sampler_gap_mean')}
    first |= {'policy/rollout_entropy': 'policy/entropy'}
  return means | {name: metrics[source][0, 0] for name, source in first.items()}


def made_an_update(metrics: dict[str, Array]) -> Array:
  """Returns whether any minibatch of a step changed the parameters, [] bool.

  A step of which some minibatches were skipped (their gradients were not finite)
  counts as made: the parameters did change, so its number must not be used for
  another step.
  """
  return jnp.any(steps.update_is_finite(metrics))


# What runs on the host.


def sampling_key(state: TrainState) -> Array:
  """Returns the key with which the responses of this step are drawn."""
  return jax.random.fold_in(random_keys.for_purpose(state.key, 'rollout'), state.step)


join_sequences = jax.jit(sampler.join_sequences)


def response_logprobs(
  state: TrainState,
  sequences: Sequences,
  samples: Samples,
  scores: Array,
  reference_params: Params | None,
  definitions: RolloutDefinitions,
  temperature: float,
) -> dict[str, Array]:
  """Computes what the report shows of single tokens: log-probabilities of policy and reference.

  Args:
    state: has the policy.
    sequences: [n, P + R].
    samples: [n, R].
    scores: [n], not used.
    reference_params: the parameters of the reference; None = there is none.
    definitions: of both models.
    temperature: with which the responses were sampled.

  Returns:
    Name → [n, R] float32.
  """
  del scores
  length = samples.tokens.shape[1]
  policy = forward_responses(definitions.model, state.params, sequences, length, temperature)
  columns = {'logprob': policy.logprobs}
  if definitions.reference_model is not None:
    reference = forward_responses(
      definitions.reference_model, reference_params, sequences, length, temperature
    )
    columns['reference_logprob'] = reference.logprobs
  return columns


def build_evaluation(
  context: Context,
  options: RolloutOptions,
  parts: RolloutParts,
  reference_params: Params | None,
  score: Score,
  prompts: PromptSet,
  assess_tokens: token_view.AssessTokens | None = None,
) -> Callable[[TrainState], tuple[dict[str, float], list[dict]]]:
  """Builds the evaluation on held-out prompts, which keeps every response (kept_responses.py).

  Args:
    context: the context of the stage.
    options: the stage's options.
    parts: of which the definitions are used.
    reference_params: the parameters of the reference; None = no KL.
    score: the reward of held-out prompts; its metrics are not used.
    prompts: the held-out prompts.
    assess_tokens: computes what the report shows of the tokens of a few responses; None
      for `response_logprobs`.

  Returns:
    evaluate(state) → (score, KL, length and EOS rate, a few responses as
    {prompt, response, score}).
  """

  def score_only(prompts: Prompts, samples: Samples) -> Array:
    return score(prompts, samples)[0]

  respond = responses.build_responder(
    parts.definitions.model,
    options.sampling,
    context.tokenizer,
    context.layout,
    1,  # response to each prompt, whatever num_samples is in training
    parts.definitions.reference_model,
    score_only,
  )
  if assess_tokens is None:
    temperature = options.sampling.temperature
    assess_tokens = functools.partial(
      response_logprobs, definitions=parts.definitions, temperature=temperature
    )
  look_at_tokens = token_view.build_token_view(
    context, assess_tokens, prompts.examples[: options.shown_responses], options.sampling
  )
  asked = [prompts.records[int(example['index'])] for example in prompts.examples]
  judge = response_judge.open_judge(context, asked, options.data, options.reward)

  def evaluate(state: TrainState) -> tuple[dict[str, float], list[dict]]:
    host_batches = batches.prompts_once(prompts.examples, options.batch_size)
    # The same key every time: differences are those of the policy.
    key = context.key('evaluation')
    completed = respond(state.params, host_batches, key, reference_params)
    assert completed.scores is not None  # they were asked for
    values = {
      'reward/score': completed.scores.mean(),
      'response/length': completed.lengths.mean(),
      'response/eos_rate': completed.ended.mean(),
    }
    if completed.kl is not None:
      values['kl'] = completed.kl.mean()
    tokens = look_at_tokens(state, completed, reference_params)
    training.keep_responses(
      context,
      state,
      options.sampling,
      completed,
      [record.messages[-1]['content'] or '' for record in asked],
      [record.id for record in asked],
      judge(completed.texts),
      tokens,
    )
    return values, _list_samples(asked[: options.shown_responses], completed)

  return evaluate


def _list_samples(asked: Sequence[Prompt], completed: Responses) -> list[dict]:
  """Lists the first responses of an evaluation, to be shown and kept in samples.jsonl."""
  assert completed.scores is not None
  shown = []
  for number, record in enumerate(asked):
    sample = {
      'prompt': record.messages[-1]['content'],  # the last turn of the conversation
      'response': completed.texts[number][0],
      'score': float(completed.scores[number][0]),
    }
    shown.append(sample)
  return shown
