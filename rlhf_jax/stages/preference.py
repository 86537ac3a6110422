"""Preference optimisation: the policy learns from people's rankings without a reward model.

  minimise E_prompt[ 1/C(K,2) Σ_{w above l} ℓ(h_w, h_l) ],   h_i = log π(y_i|x) / π_ref(y_i|x)

This is DPO (Rafailov et al. 2023, arXiv:2305.18290) and its family, one formula
each in objectives/preference.py. Two of them do not compare pairs:
`plackett_luce` takes the complete order of K responses; `kto` takes each best and
worst response by itself, and single responses that somebody called good or bad.
The reference's logprobs are computed once, before the first step, and kept in the
stage's folder; or at every step (`reference_logprobs`). Left out: dropout.
"""

from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from rlhf_jax import files
from rlhf_jax import options as options_lib
from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import masked, preference, ranking
from rlhf_jax.options import Count, Natural
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_rankings,
  abstract_scalar,
  Program,
  resident,
  StagePlan,
)
from rlhf_jax.runtime import checkpoint, hosts, loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import (
  metering,
  packing,
  ranked_logprobs,
  response_judge,
  training,
)
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind, TINY_LOOP
from rlhf_jax.stages.shared.model_store import ModelStore
from rlhf_jax.stages.shared.ranked_logprobs import PackedRankings, ResponseLogprobs
from rlhf_jax.stages.shared.training import Definitions
from rlhf_jax.types import Array, Params, Rankings, TrainState


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a stage of preference optimisation, beside the settings of its loss."""

  init: str = 'sft'  # the policy that is trained
  lora: LoraOptions = LoraOptions()  # adapters beside frozen matrices instead of all parameters
  reference: str = 'sft'  # a stage, its folder or a directory; '' for losses that need none
  # stored: computed once, before the first step; live: at every step, for data that
  # is too large for a pass before training.
  reference_logprobs: str = 'stored'
  loss: str = 'dpo'  # a name in preference.PREFERENCE_LOSSES, which brings settings of its own
  batch_size: Count = 16  # rows of a batch, over all devices
  responses_per_row: Count = 4  # places of a row; complete rankings share a row, none is split
  max_length: Count = 96  # tokens of a prompt with one response
  # What becomes of a ranking with a longer response: drop (they are counted),
  # truncate_left (the prompt loses its beginning) or error.
  overlong: str = 'drop'
  microbatches: Count = 1  # parts of a batch, one after the other, to save memory
  # Packed rows that are computed at a time: responses share the places that padding
  # would take; 0 = nothing is packed. At least responses_per_row, and a multiple of the
  # devices that share a batch. It takes the place of microbatches.
  packed_rows: Natural = 0
  eval_records: Count = 200  # held-out rankings
  shown_responses: Natural = 4  # responses written at each evaluation
  data: DataOptions = DataOptions()
  sampling: SamplingOptions = SamplingOptions()
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=5e-6,
    schedule='linear',
    final_scale=0.0,
    warmup_steps=10,
  )
  loop: LoopOptions = LoopOptions(steps=200)
  # The settings of the chosen loss, from keys of the same section
  # (StageKind.choices).
  settings: Any = dataclasses.field(default=preference.DPOSettings(), metadata={'in_config': False})

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    unread = {} if self.shown_responses else {'sampling': 'shown_responses is 0'}
    if not self.reference:
      unread['reference_logprobs'] = "reference is ''"
    return unread


# The pure functions of a step.


def train_step(
  state: TrainState,
  batch: Rankings,
  anchor: Array | None = None,
  *,
  definitions: Definitions,
  options: Any,
) -> tuple[TrainState, dict[str, Array]]:
  """Makes one update of the policy from rankings.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: the policy, the optimizer's state, the step and the root key.
    batch: B rows of K places, with `reference_logprobs` for losses that need a
      reference; B is a multiple of `options.microbatches`.
    anchor: [] float32, KTO's z (`estimate_anchor`); None for the other losses.
    definitions: the definitions of the policy, its optimizer and the layout.
    options: with loss, settings, reference, microbatches and packed_rows;
      online_preference passes its own.

  Returns:
    The next state, and metrics ([] float32 each): loss, accuracy and margin over
    untied pairs, logprob/best, logprob/worst, tokens, and the norms of gradient,
    update and parameters.
  """

  def batch_loss(params: Params, batch: Rankings | PackedRankings, key: Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    return loss(params, batch, anchor, definitions.model, options)

  parts, packing_metrics = ranked_logprobs.pack_rankings(
    batch, definitions.model, definitions.layout, options.packed_rows
  )
  state, metrics = steps.gradient_step(
    batch_loss,
    definitions.optimizer,
    state,
    parts,
    microbatches=options.microbatches,
  )
  return state, metrics | packing_metrics


def loss(
  params: Params,
  batch: Rankings | PackedRankings,
  anchor: Array | None,
  model: Model,
  options: Any,
) -> steps.Loss:
  """Computes the loss that `options.loss` names.

  Args:
    params: the policy's parameters.
    batch: B rows of K places; or packed rankings.
    anchor: [] float32, KTO's z; None for the other losses.
    model: the policy's definition.
    options: with loss, settings and reference.

  Returns:
    The loss summed over prompts (KTO: over responses), and their number; statistics
    over untied pairs.
  """
  computed = ranked_logprobs.response_logprobs(model, params, batch)
  return loss_of_logprobs(computed, batch, anchor, options)


def loss_of_logprobs(
  computed: ResponseLogprobs,
  batch: Rankings | PackedRankings,
  anchor: Array | None,
  options: Any,
) -> steps.Loss:
  """Computes the loss from the policy's log-probabilities [B, K]; the rest is as for `loss`."""
  entry = preference.PREFERENCE_LOSSES[options.loss]
  logprobs, lengths = computed  # [B, K] both
  responses = preference.Response(logprobs, batch.reference_logprobs, lengths)
  labels = preference.Labels(batch.ranks, batch.group, batch.confidence, anchor)
  total, weight = entry.apply(responses, labels, options.settings)

  pairs = ranking.better_pairs(batch.ranks, batch.group)  # [B, K, K] bool
  best, worst = ranking.best_and_worst(batch.ranks, batch.group)  # [B, K] bool
  margins = responses.ratio[:, :, None] - responses.ratio[:, None, :]  # [B, K, K]
  pair_count = masked.total(1.0, pairs)
  # Without a reference the reward is the mean logprob of a token (SimPO).
  implicit_reward = responses.ratio if options.reference else responses.mean
  correct, _ = ranking.accuracy(implicit_reward, batch.ranks, batch.group)
  return steps.Loss(
    total=total,
    weight=weight,
    means={
      'accuracy': (correct, pair_count),
      'margin': (
        options.settings.beta * masked.total(margins, pairs),
        pair_count,
      ),
      'logprob/best': (
        masked.total(logprobs, best),
        masked.total(1.0, best),
      ),
      'logprob/worst': (
        masked.total(logprobs, worst),
        masked.total(1.0, worst),
      ),
    },
    counts={'tokens': batch.token_count},
  )


def mismatched(batch: Rankings) -> Rankings:
  """Pairs each prompt with a response to another prompt, for KTO's anchor.

  The other response has the same place in the next row (no prompt is split over
  rows, so its prompt differs). In a batch of one row it is the response in the
  next place, where that responds to another prompt. Prompt and response are cut
  at T tokens.
  """
  B, K, T = batch.tokens.shape
  shift = K if B > 1 else 1
  tokens = batch.tokens.reshape(B * K, T)
  begins = batch.begins.reshape(B * K, 1)  # where the own response begins
  lengths = batch.segment_ids.sum(-1).reshape(B * K, 1)  # of prompt and response
  present = batch.group.reshape(B * K, 1) > 0
  other_tokens = jnp.roll(tokens, -shift, axis=0)
  other_begins = jnp.roll(begins, -shift, axis=0)
  other_lengths = jnp.roll(lengths, -shift, axis=0)
  other_present = jnp.roll(present, -shift, axis=0)
  if B == 1:
    group = batch.group.reshape(K, 1)
    other_present &= jnp.roll(group, -shift, axis=0) != group

  places = jnp.arange(T)[None]
  # After the own prompt comes the other response, from where it begins in its row.
  source = jnp.clip(places - begins + other_begins, 0, T - 1)
  joined = jnp.where(
    places < begins,
    tokens,
    jnp.take_along_axis(other_tokens, source, axis=1),
  )
  # The end of the joined row; what is longer than T is cut.
  end = jnp.minimum(begins + other_lengths - other_begins, T)
  inside = (places < end) & present & other_present
  return batch.replace(
    tokens=jnp.where(inside, joined, 0).reshape(B, K, T),
    segment_ids=inside.astype(jnp.int32).reshape(B, K, T),
    positions=jnp.where(inside, places, 0).reshape(B, K, T),
  )


def estimate_anchor(
  params: Params,
  reference_params: Params,
  batch: Rankings,
  definitions: Definitions,
  reference_model: Model,
  options: Any,
) -> Array:
  """Estimates KTO's z from prompts with responses to other prompts.

  z is the KL between policy and reference with which each response is compared
  (Ethayarajh et al. 2024, arXiv:2402.01306). Responses to other prompts take the
  place of samples of the policy.

  Args:
    params: the policy's parameters.
    reference_params: the reference's.
    batch: B rows of K places.
    definitions: of the policy and the layout.
    reference_model: the reference's definition.
    options: with packed_rows.

  Returns:
    [] float32, in nats.
  """
  other = mismatched(batch)
  how = (definitions.layout, options.packed_rows)
  policy = ranked_logprobs.map_logprobs(definitions.model, *how, params, other)
  reference = ranked_logprobs.map_logprobs(reference_model, *how, reference_params, other)
  return preference.kto_anchor(policy.sums - reference.sums, other.segment_ids.any(-1))


# The reference.


@dataclasses.dataclass(frozen=True)
class Reference:
  """The reference of a stage, with its parameters.

  Attributes:
    model: its definition.
    params: its parameters.
    logprobs: (params, Rankings) → [B, K] float32, compiled.
  """

  model: Model
  params: Params
  logprobs: Callable[[Params, Rankings], Array]


def open_reference(context: Context, options: Options) -> Reference | None:
  """Opens the reference and reads its parameters; None for a stage without one."""
  if not options.reference:
    return None
  opened = ModelStore(context, options.lora).open(options.reference)
  logprobs = build_logprobs(opened.model, context.layout, options)
  return Reference(opened.model, opened.read(), logprobs)


def build_logprobs(model: Model, layout: Layout, options: Options) -> Any:
  """Builds the compiled log π(y|x) of ranked responses: (params, Rankings) → [B, K] float32."""

  @jax.jit
  def logprobs(params: Params, batch: Rankings) -> Array:
    rows = options.packed_rows
    return ranked_logprobs.map_logprobs(model, layout, rows, params, batch).sums

  return logprobs


def store_reference_logprobs(
  context: Context,
  options: Options,
  reference: Reference,
  name: str,
  examples: Sequence[dict[str, Any]],
) -> None:
  """Adds the reference's logprobs to all examples, from the stage's folder or computed anew.

  Args:
    context: the context of the stage.
    options: the section.
    reference: the reference.
    name: the name of the split, which becomes part of the file's name.
    examples: encoded rankings, which are changed in place.
  """

  def compute(
    examples: Sequence[dict],
  ) -> Iterator[tuple[Rankings, np.ndarray]]:
    progress = tqdm.tqdm(
      _iterate_once(examples, options),
      desc=f'{context.name}: the reference reads',
      unit='batch',
      leave=False,
      disable=None,  # no bar without a terminal
    )
    for batch in progress:
      logprobs = reference.logprobs(reference.params, context.layout.place(batch))
      yield batch, hosts.to_host(logprobs)

  path = context.directory / f'reference-{name}.npz'
  add_reference(examples, path, checkpoint.fingerprint(reference.params), compute)


def add_reference(
  examples: Sequence[dict[str, Any]],
  path: Path,
  reference_fingerprint: str,
  compute: Callable[[Sequence[dict]], Iterable[tuple[Rankings, np.ndarray]]],
) -> None:
  """Adds `reference_logprobs` [k] float32 to every example, read from a file or computed.

  Args:
    examples: encoded rankings.
    path: the file of the log-probabilities.
    reference_fingerprint: the fingerprint of the reference's parameters.
    compute: examples → batches with their log-probabilities [B, K].

  Raises:
    UserError: the file was made with another reference, or for other tokens (another
      data set or tokenizer).
  """
  tokens_fingerprint = _fingerprint_tokens(examples)
  if path.is_file():
    values = _read_reference(path, reference_fingerprint, tokens_fingerprint)
  else:
    # Batches keep the order of examples and of their responses.
    parts = [logprobs[batch.group > 0] for batch, logprobs in compute(examples)]
    values = np.concatenate(parts)
    if hosts.is_first_process():
      _write_reference(path, values, reference_fingerprint, tokens_fingerprint)
  counts = [len(example['ranks']) for example in examples]
  ends = np.cumsum(counts)[:-1]
  for example, own in zip(examples, np.split(values.astype(np.float32), ends), strict=True):
    example['reference_logprobs'] = own


def _fingerprint_tokens(
  examples: Sequence[Mapping[str, np.ndarray]],
) -> str:
  """Returns a fingerprint of the tokens that the reference reads, as a hex string."""
  digest = hashlib.sha256()
  for example in examples:
    for name in ('tokens', 'begins', 'lengths'):
      digest.update(example[name].tobytes())
  return digest.hexdigest()


def _read_reference(path: Path, reference: str, tokens: str) -> np.ndarray:
  """Reads stored log-probabilities; raises UserError if a fingerprint differs."""
  with np.load(path, allow_pickle=False) as stored:
    values = stored['logprobs']
    same_reference = str(stored['reference']) == reference
    same_tokens = str(stored['tokens']) == tokens
  if not same_reference:
    raise UserError(f'{path}: computed with another reference; delete it to compute it anew')
  if not same_tokens:
    raise UserError(
      f'{path}: computed for other data or with another tokenizer; delete it to compute it anew'
    )
  return values


def _write_reference(path: Path, values: np.ndarray, reference: str, tokens: str) -> None:
  # Replaced at once: a run that is cut while it writes leaves no half file.
  with files.replacing(path) as temporary, open(temporary, 'wb') as file:
    np.savez(file, logprobs=values, reference=reference, tokens=tokens)


# The stage.


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def build(context: Context, options: Options) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation."""
  check_options(options, context.where)
  check_packing(context, options)
  trainable = training.open_trainable(context, options)
  definitions = trainable.definitions
  layout = context.layout
  train_records = sources.load_records(options.data, 'ranking', 'train')
  examples = _encode(context, train_records, options)
  held_out = sources.load_records(options.data, 'ranking', 'validation')
  held_out = sources.spread_evenly(held_out, options.eval_records)
  held_out_examples = _encode(context, held_out, options)
  _check_rankings(examples, held_out_examples, options, context.where)

  reference = open_reference(context, options)
  if reference is not None and options.reference_logprobs == 'stored':
    store_reference_logprobs(context, options, reference, 'train', examples)
    store_reference_logprobs(context, options, reference, 'validation', held_out_examples)
  prepare = functools.partial(_prepare, layout=layout, reference=reference, options=options)
  anchor = build_anchor(definitions, reference, options)
  step = training.compile_train_step(train_step, definitions, options)

  def full_step(state: TrainState, batch: Rankings) -> tuple[TrainState, dict[str, Array]]:
    placed = prepare(batch)
    # The anchor first: the step donates the parameters.
    return step(state, placed, anchor(state.params, placed))

  # The prompt of a ranking is what stands before its first response.
  shown = held_out_examples[: max(options.shown_responses, 1)]
  prompts = [example['tokens'][0, : example['begins'][0]] for example in shown]
  numbers = [int(example['index'][0]) for example in shown]
  asked = [response_judge.as_prompt(held_out[number]) for number in numbers]
  show = training.build_show_responses(
    context, definitions.model, prompts, options, asked, reference
  )
  measure = build_measure(definitions, options)

  def evaluate(
    state: TrainState,
  ) -> tuple[dict[str, float], list[dict[str, str]]]:
    losses = []
    for batch in _iterate_once(held_out_examples, options):
      placed = prepare(batch)
      value = measure(state.params, placed, anchor(state.params, placed))
      losses.append(jax.device_get(value))  # sums, so that they add up exactly
    return average_losses(losses), show(state)

  return loop.Training(
    name=context.name,
    init=trainable.init,
    evaluate=evaluate,
    step=full_step,
    meter=metering.meter_rows(
      definitions.model.config,
      options.batch_size * options.responses_per_row,
      options.max_length,
      one_text=True,
    ),
    batches=batches.rankings(
      examples,
      options.batch_size,
      options.responses_per_row,
      options.max_length,
      context.config.seed,
    ),
  )


def _check_rankings(
  train: Sequence[dict], held_out: Sequence[dict], options: Options, where: str
) -> None:
  """Refuses rankings that the loss cannot learn from, or that teach no order."""
  check_examples([*train, *held_out], options, where)
  for split, examples in (('train', train), ('validation', held_out)):
    check_order(examples, f'{where}.data: {split}')


def check_options(options: Any, where: str) -> None:
  """Checks the options of a stage with a preference loss.

  Args:
    options: with loss, settings and reference.
    where: the section's name, for messages.

  Raises:
    UserError: an unknown loss, settings out of their ranges, or no reference for a
      loss that needs one.
  """
  known = preference.PREFERENCE_LOSSES
  if options.loss not in known:
    raise UserError(f'{where}.loss: expected one of {", ".join(known)}, got {options.loss!r}')
  options_lib.check_ranges(options.settings, where)
  if not options.reference and known[options.loss].needs_reference:
    without = [name for name, entry in known.items() if not entry.needs_reference]
    raise UserError(f'{where}.reference: {options.loss} needs one; without: {", ".join(without)}')
  places = getattr(options, 'reference_logprobs', 'stored')  # online_preference has none
  if places not in ('stored', 'live'):
    raise UserError(f'{where}.reference_logprobs: expected stored or live, got {places!r}')


def check_packing(context: Context, options: Options) -> None:
  """Checks `packed_rows`; raises UserError if a row of rankings or the mesh does not fit it."""
  shards = context.layout.batch_shards
  packing.check_rows(
    options.packed_rows, options.microbatches, shards, context.where, options.responses_per_row
  )


def check_examples(
  examples: Sequence[Mapping[str, np.ndarray]],
  options: Options,
  where: str,
) -> None:
  """Checks that the loss can learn from these rankings; raises UserError if not."""
  known = preference.PREFERENCE_LOSSES
  entry = known[options.loss]
  soft = any((example['confidence'] != 1).any() for example in examples)
  if soft and not entry.accepts_soft_labels:
    able = [name for name, other in known.items() if other.accepts_soft_labels]
    raise UserError(
      f'{where}.loss: {options.loss} cannot learn from labels with a confidence below 1; '
      f'expected one of {", ".join(able)}, or data without'
    )
  single = any(len(example['ranks']) < 2 for example in examples)
  if single and not entry.single_responses:
    able = [name for name, other in known.items() if other.single_responses]
    raise UserError(
      f'{where}.loss: {options.loss} compares responses, but some prompts have one only; '
      f'expected {", ".join(able)}, or data without'
    )


def check_order(examples: Sequence[Mapping[str, np.ndarray]], where: str) -> None:
  """Raises UserError if all rankings are ties, of which a loss has no value."""
  for example in examples:
    is_single = len(example['ranks']) == 1
    if is_single or len(np.unique(example['ranks'])) > 1:
      return
  raise UserError(f'{where}: all responses are ties; expected some that are better than others')


def build_anchor(
  definitions: Definitions, reference: Reference | None, options: Options
) -> Callable[[Params, Rankings], Array | None]:
  """Builds KTO's anchor: (params, placed batch) → [] float32; None for the other losses."""
  if not preference.PREFERENCE_LOSSES[options.loss].single_responses or reference is None:
    return _no_anchor
  estimate = jax.jit(
    functools.partial(
      estimate_anchor,
      definitions=definitions,
      reference_model=reference.model,
      options=options,
    )
  )

  def anchor(params: Params, batch: Rankings) -> Array:
    return estimate(params, reference.params, batch)

  return anchor


def _no_anchor(params: Params, batch: Rankings) -> None:
  del params, batch
  return None


def build_measure(definitions: Definitions, options: Options) -> Callable[..., steps.Loss]:
  """Builds the compiled loss of held-out rankings: (params, Rankings, anchor) → Loss."""

  @jax.jit
  def measure(params: Params, batch: Rankings, anchor: Array | None) -> steps.Loss:
    computed = ranked_logprobs.map_logprobs(
      definitions.model, definitions.layout, options.packed_rows, params, batch
    )
    return loss_of_logprobs(computed, batch, anchor, options)

  return measure


def average_losses(losses: Sequence[steps.Loss]) -> dict[str, float]:
  """Averages losses and statistics over several batches, each by its own weight."""
  totals = [(value.total, value.weight) for value in losses]
  values = {'loss': _average(totals)}
  for name in losses[0].means:
    values[name] = _average([value.means[name] for value in losses])
  return values


def _average(pairs: Sequence[tuple[Any, Any]]) -> Any:
  """Divides a sum of sums by the sum of their weights."""
  total = sum(value for value, _ in pairs)
  weight = sum(weight for _, weight in pairs)
  return total / max(weight, 1e-9)


def _prepare(
  batch: Rankings,
  layout: Layout,
  reference: Reference | None,
  options: Options,
) -> Rankings:
  """Places a batch on the mesh; adds the reference's logprobs if `reference_logprobs` is live."""
  placed = layout.place(batch)
  if reference is None or options.reference_logprobs == 'stored':
    return placed
  return placed.replace(reference_logprobs=reference.logprobs(reference.params, placed))


def _encode(context: Context, records: Sequence[Any], options: Options) -> list[dict]:
  return encode.rankings(
    records, context.tokenizer, options.max_length, options.overlong, hosts.spread
  )


def _iterate_once(examples: Sequence[Mapping], options: Options) -> Iterable[Rankings]:
  return batches.rankings_once(
    examples,
    options.batch_size,
    options.responses_per_row,
    options.max_length,
  )


# The plan.


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  check_options(options, context.where)
  check_packing(context, options)
  layout = context.layout
  trainable = training.open_trainable(context, options)
  definitions = trainable.definitions
  state = trainable.init()
  batch = abstract_rankings(
    layout,
    options.batch_size,
    options.responses_per_row,
    options.max_length,
  )
  responses = options.batch_size * options.responses_per_row
  # The reference reads all at once if they are not packed, the step in micro-batches.
  sharing = packing.plan_sharing(
    range(responses), options.max_length, options.responses_per_row, [definitions.model], layout
  )
  how = (options.packed_rows, options.max_length, sharing)
  reads, rows_read, length = packing.divide(responses, 1, *how)
  parts, rows, _ = packing.divide(responses, options.microbatches, *how)
  residents = resident(state)
  programs = []
  anchor = None  # for all losses but KTO
  if options.reference:
    opened = ModelStore(context, options.lora).open(options.reference)
    reference_params = opened.read()
    residents['reference'] = reference_params
    logprobs = build_logprobs(opened.model, layout, options)
    reading = work.forward(
      opened.model.config,
      layout,
      rows_read,
      length,
      length,
    )
    lower = functools.partial(logprobs.lower, reference_params, batch)
    programs.append(Program('reference', lower, reading * reads))
    if preference.PREFERENCE_LOSSES[options.loss].single_responses:
      anchor = abstract_scalar(layout, jnp.float32)
  step = training.compile_train_step(train_step, definitions, options)
  update = work.training(
    definitions.model.config,
    layout,
    rows * parts,
    length,
    length,
    parts,
    state.trained,
  )
  lower_step = functools.partial(step.lower, state, batch, anchor)
  programs.append(Program('step', lower_step, update))
  return StagePlan(residents, programs, [])


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_all(records: Sequence[Any], overlong: str) -> list[dict]:
    examples = encode.rankings(records, tokenizer, options.max_length, overlong)
    check_examples(examples, options, 'preference')  # before the first stage runs
    return examples

  return [DataUse('data', options.data, 'ranking', encode_all, options.overlong)]


LOSS_SETTINGS = {name: entry.settings_class for name, entry in preference.PREFERENCE_LOSSES.items()}
TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'max_length': 128,
  'eval_records': 8,
}
STAGE = StageKind(
  options=Options,
  run=run,
  plan=plan,
  tiny=TINY,
  choices={'loss': LOSS_SETTINGS},
  data=list_data,
)
