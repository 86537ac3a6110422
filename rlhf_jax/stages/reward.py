"""A reward model trained on human rankings (step 3 of the four).

  minimise −E_prompt[ 1/C(K,2) Σ_{w above l} log σ(r(x, y_w) − r(x, y_l)) ]

The score is a linear head on the hidden state of a response's last token, its end of
turn. All responses to one prompt are one element of the batch. Other losses:
`plackett_luce` and `plain_pairs`. After the last step a bias is subtracted, so that
human demonstrations score 0 on average.

With `likelihood` the head also sees the mean and the minimum of the response's log-probabilities
under the model's own language-model head, so that what the model knows to be so can count even
where no ranking was about it. `language_model_coefficient` α keeps that head a language model:

  … − α E_prompt[ Σ log p(y_best | x) / |y_best| ],  over the responses that are ranked first

Source: Ouyang et al. 2022, section 3.5, equation 1; the second term is the SFT
regularisation of Yang et al. 2024, arXiv:2406.10216, section 3.

Departures from the paper:
  1. The mean is over the untied pairs of a prompt.
  2. A ranking's `confidence` below 1, such as an AI's label has, is a soft target.
Left out: dropout.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, encode, records, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import winrate
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads
from rlhf_jax.models.lora import LoraOptions
from rlhf_jax.models.transformer import Model
from rlhf_jax.objectives import ranking
from rlhf_jax.options import Count, Natural, NonNegative
from rlhf_jax.planning import work
from rlhf_jax.planning.programs import (
  abstract_rankings,
  Program,
  resident,
  StagePlan,
)
from rlhf_jax.report import kept_responses
from rlhf_jax.runtime import hosts, loop
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.loop import LoopOptions
from rlhf_jax.runtime.mesh import Layout
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages.shared import metering, packing, ranked_logprobs, training
from rlhf_jax.stages.shared.context import Context
from rlhf_jax.stages.shared.kind import DataUse, StageKind, TINY_LOOP
from rlhf_jax.stages.shared.packing import PackedRows
from rlhf_jax.stages.shared.ranked_logprobs import PackedRankings
from rlhf_jax.stages.shared.training import Definitions
from rlhf_jax.types import (
  Params,
  Prompts,
  Rankings,
  Samples,
  Sequences,
  TrainState,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """The section of a reward model."""

  init: str = 'sft'  # whose trunk it begins with; a new scalar head is added
  lora: LoraOptions = LoraOptions()  # adapters beside frozen matrices instead of all parameters
  loss: str = 'pairwise'  # pairwise, plackett_luce, plain_pairs
  likelihood: bool = False  # the head also sees how likely the response is to the model itself
  # α, of the log-likelihood of the best-ranked responses.
  language_model_coefficient: NonNegative = 0.0
  batch_size: Count = 16  # rows of a batch, over all devices
  responses_per_row: Count = 4  # places of a row; complete rankings share a row, none is split
  max_length: Count = 96  # tokens of a prompt with one response
  # What becomes of a ranking with a longer response: drop (they are counted),
  # truncate_left (the prompt loses its beginning) or error.
  overlong: str = 'drop'
  microbatches: Count = 1  # parts of a batch, one after the other, to save memory
  # Packed rows that are computed at a time: responses share their prompt, and the places
  # that padding would take; 0 = nothing is packed. At least responses_per_row, and a
  # multiple of the devices that share a batch. It takes the place of microbatches.
  packed_rows: Natural = 0
  eval_records: Count = 400  # held-out rankings
  centre: bool = True  # subtract the mean score of human demonstrations after the last step
  centre_records: Count = 256  # the number of demonstrations for that mean
  data: DataOptions = DataOptions()
  demonstrations: DataOptions = DataOptions()  # for `centre`
  optimizer: OptimizerOptions = OptimizerOptions(
    learning_rate=1e-4,
    schedule='linear',
    final_scale=0.0,
  )
  loop: LoopOptions = LoopOptions(steps=200)

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    if self.centre:
      return {}
    return dict.fromkeys(('centre_records', 'demonstrations'), 'centre is False')


# The pure functions of a step.


class ReadResponses(NamedTuple):
  """What a reward model reads from responses [..., T] with their prompts."""

  scores: jax.Array  # [...] float32
  # [..., T - 1] float32, nats, of all tokens but the first, and which of these
  # belong to the response; None where nobody asks for them
  logprobs: jax.Array | None = None
  mask: jax.Array | None = None


def last_scores(
  model: Model,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  response: jax.Array,
) -> jax.Array:
  """Computes the score of each row, at its last real token, wherever the padding is.

  Args:
    model: a definition with a scalar head.
    params: its parameters.
    tokens: [..., T] int32.
    positions: [..., T] int32.
    segment_ids: [..., T] int32, 0 = padding.
    response: [..., T] bool, the tokens of the response; only a head that sees likelihoods
      asks for it.

  Returns:
    [...] float32.
  """
  read = read_responses(
    model, params, tokens, positions, segment_ids, response, model.config.likelihood_head
  )
  return read.scores


def read_responses(
  model: Model,
  params: Params,
  tokens: jax.Array,
  positions: jax.Array,
  segment_ids: jax.Array,
  response: jax.Array,
  with_logprobs: bool,
) -> ReadResponses:
  """Computes scores as `last_scores` does, and if asked for the tokens' log-probabilities."""
  leading = tokens.shape[:-1]  # N rows in all
  tokens = _as_rows(tokens)  # [N, T]
  segment_ids = _as_rows(segment_ids)
  inputs = (tokens, _as_rows(positions), segment_ids)
  places = jnp.arange(segment_ids.shape[1])
  # The greatest place that is no padding, so left and right padding are read alike.
  last = jnp.max(jnp.where(segment_ids > 0, places, 0), axis=1, keepdims=True)  # [N, 1]
  if not with_logprobs:
    last_hidden, _ = model.apply(params, *inputs, places=last)
    return ReadResponses(heads.scalar_scores(params, last_hidden).reshape(leading))
  hidden, _ = model.apply(params, *inputs)
  last_hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]  # [N, D]
  scores = heads.scalar_scores(params, last_hidden)
  logprobs, _ = heads.token_logprobs(model, params, hidden[:, :-1], tokens[:, 1:])
  mask = _as_rows(response)[:, 1:]  # each place predicts the next token
  if model.config.likelihood_head:
    scores += heads.likelihood_scores(params, logprobs, mask)
  return ReadResponses(
    scores.reshape(leading), logprobs.reshape(*leading, -1), mask.reshape(*leading, -1)
  )


def response_tokens(batch: Rankings) -> jax.Array:
  """Returns which tokens of rankings belong to responses, [B, K, T] bool."""
  return (batch.segment_ids > 0) & (batch.positions >= batch.begins[..., None])


def loss(
  params: Params, batch: Rankings | PackedRankings, model: Model, options: Options
) -> steps.Loss:
  """Computes the loss of a batch of rankings.

  Args:
    params: the reward model's parameters.
    batch: B rows of K places; or packed rankings.
    model: its definition.
    options: the options of the stage, of which `loss` and `language_model_coefficient` are read.

  Returns:
    The loss summed over prompts (`plain_pairs`: over pairs), and their number; the
    accuracy over untied pairs.
  """
  formula = ranking.REWARD_LOSSES[options.loss]
  read = _read_rankings(params, batch, model, options)
  scores = read.scores
  if formula.accepts_soft_labels:
    total, weight = formula.function(scores, batch.ranks, batch.group, batch.confidence)
  else:
    total, weight = formula.function(scores, batch.ranks, batch.group)
  correct, pairs = ranking.accuracy(scores, batch.ranks, batch.group)
  present = batch.group > 0  # [B, K]
  means = {'accuracy': (correct, pairs)}
  if options.language_model_coefficient:
    nll, count = best_nll(read, batch)
    # Divided by the weight of the rankings, so that micro-batches change nothing.
    total += options.language_model_coefficient * nll
    means['language_model_loss'] = (nll, count)
  return steps.Loss(
    total=total,
    weight=weight,
    means=means,
    counts={
      'pairs': pairs,
      'score/sum': jnp.sum(jnp.where(present, scores, 0.0)),
      'tokens': batch.token_count,
    },
  )


def _read_rankings(
  params: Params, batch: Rankings | PackedRankings, model: Model, options: Options
) -> ReadResponses:
  """Reads rankings [B, K, T], or packed ones, whose slots are the places of one row."""
  with_logprobs = reads_likelihoods(options)
  if isinstance(batch, PackedRankings):
    read = _read_packed(model, params, batch.rows, with_logprobs)
    return jax.tree.map(_as_one_row, read)
  return read_responses(
    model,
    params,
    batch.tokens,
    batch.positions,
    batch.segment_ids,
    response_tokens(batch),
    with_logprobs,
  )


def _as_one_row(x: jax.Array) -> jax.Array:
  """Reshapes [K, …] to [1, K, …]."""
  return x[None]


def best_nll(read: ReadResponses, batch: Rankings | PackedRankings) -> tuple[jax.Array, jax.Array]:
  """Sums the negative log-likelihood per token over the best-ranked responses.

  Args:
    read: of [B, K] responses.
    batch: the rankings.

  Returns:
    (the sum, the number of these responses), both [] float32.
  """
  assert read.logprobs is not None and read.mask is not None  # asked for
  is_best = ((batch.group > 0) & (batch.ranks == 1)).astype(jnp.float32)  # [B, K]
  mean = heads.likelihood_features(read.logprobs, read.mask)[..., 0]  # [B, K]
  return -jnp.sum(is_best * mean), jnp.sum(is_best)


def train_step(
  state: TrainState,
  batch: Rankings,
  definitions: Definitions,
  options: Options,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Makes one update of the reward model.

  Pure and un-jitted; `compile_step` in runtime/step.py compiles it over a mesh.

  Args:
    state: the parameters, the optimizer's state, the step and the root key.
    batch: B rows of K places, each with one response to a prompt; B is a multiple of
      `options.microbatches`.
    definitions: the definitions of the model (which has a scalar head), its
      optimizer and the layout.
    options: the options of the stage, of which the loss, `microbatches` and `packed_rows` are
      read.

  Returns:
    The next state, and metrics ([] float32 each): loss, accuracy over untied pairs,
    pairs, score/sum, tokens, and the norms of gradient, update and parameters.
  """

  def batch_loss(params: Params, batch: Rankings | PackedRankings, key: jax.Array) -> steps.Loss:
    del key  # nothing is drawn: dropout is left out
    return loss(params, batch, definitions.model, options)

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


def _as_rows(x: jax.Array) -> jax.Array:
  """Reshapes [..., T] to [N, T]."""
  return x.reshape(-1, x.shape[-1])


# Scores of generated responses, for stages that learn from them.


def score_sequences(model: Model, params: Params, sequences: Sequences | PackedRows) -> jax.Array:
  """Scores whole sequences, prompts with their responses, the targets.

  Args:
    model: a definition with a scalar head.
    params: its parameters.
    sequences: [N, T]; or packed rows with N slots.

  Returns:
    [N] float32.
  """
  if isinstance(sequences, PackedRows):
    return _score_packed(model, params, sequences)
  return last_scores(
    model,
    params,
    sequences.tokens,
    sequences.positions,
    sequences.segment_ids,
    sequences.loss_mask > 0,
  )


def _score_packed(model: Model, params: Params, rows: PackedRows) -> jax.Array:
  """Scores the slots of packed rows as `last_scores` does rows: [C * S] float32."""
  return _read_packed(model, params, rows, model.config.likelihood_head).scores


def _read_packed(
  model: Model, params: Params, rows: PackedRows, with_logprobs: bool
) -> ReadResponses:
  """Reads the slots of packed rows as `read_responses` does rows: [C * S], and [C * S, R]."""
  if not with_logprobs:
    last = packing.run_trunk(model, params, rows, rows.last_columns)  # [C, S, D]
    return ReadResponses(heads.scalar_scores(params, last).reshape(-1))
  hidden = packing.run_trunk(model, params, rows)
  scores = heads.scalar_scores(params, rows.at_ends(hidden))
  computed, _ = packing.packed_logprobs(model, params, hidden, rows)
  logprobs = rows.at_responses(computed)
  if model.config.likelihood_head:
    scores += heads.likelihood_scores(params, logprobs, rows.mask)
  return ReadResponses(scores, logprobs, rows.mask)


def build_score(model: Model, layout: Layout, options: Any) -> jax.stages.Wrapped:
  """Builds the compiled score of generated responses.

  Args:
    model: a definition with a scalar head.
    layout: the mesh.
    options: with `parts` and `packed_rows`: how the responses are read, as in the update.

  Returns:
    score(params, prompts [B, P], samples [B * K, R]) → [B * K] float32.
  """

  @jax.jit
  def score(params: Params, prompts: Prompts, samples: Samples) -> jax.Array:
    sequences = sampler.join_sequences(prompts, samples)
    N, R = samples.tokens.shape
    num_samples = N // len(prompts.tokens)
    sharing = packing.share_prompts(sequences, num_samples, [model], layout, R)
    return packing.map_responses(
      functools.partial(score_sequences, model, params),
      sequences,
      R,
      model,
      layout,
      options,
      sharing,
    )

  return score


# The stage.


def run(context: Context) -> None:
  """Runs the stage; leaves checkpoints and a Hugging Face directory in its folder."""
  options = context.read_options(STAGE)
  training.train_and_export(context, build(context, options), options.loop)


def build(context: Context, options: Options) -> loop.Training:
  """Builds what the training loop runs: state, batches, step and evaluation."""
  check_options(options, context.where)
  check_packing(context, options)
  trainable = training.open_trainable(context, options, head=True, likelihood=options.likelihood)
  definitions = trainable.definitions
  train = sources.load_records(options.data, 'ranking', 'train')
  held_out = sources.load_records(options.data, 'ranking', 'validation')
  held_out = sources.spread_evenly(held_out, options.eval_records)
  _check_records(train, held_out, options, context.where)
  held_out_examples = _encode(context, held_out, options, options.overlong)
  if all(_is_tie(example['ranks']) for example in held_out_examples):
    hosts.say(f'{context.name}: no held-out pair is ordered, so accuracy is not measured')
  score = build_batch_score(definitions.model, context.layout, options.packed_rows)

  def score_all(state: TrainState, examples: Sequence[Mapping]) -> Iterator:
    for batch in _iterate_once(examples, options):
      yield (
        batch,
        hosts.to_host(score(state.params, context.layout.place(batch))),
      )

  def evaluate(state: TrainState) -> tuple[dict[str, float], list]:
    scored = list(score_all(state, held_out_examples))
    _keep_scores(context, state, scored, held_out)
    return measure_accuracy(scored, held_out), []

  def centre(state: TrainState) -> TrainState:
    # Long demonstrations are dropped whatever `overlong` says: only a mean is wanted.
    examples = _encode(context, _demonstrations_as_rankings(options), options, 'drop')
    # Without the empty places that fill up rows.
    scores = [values[batch.group > 0] for batch, values in score_all(state, examples)]
    mean = np.concatenate(scores).mean(dtype=np.float64)
    head = state.trained['score']
    head = {
      **head,
      'bias': head['bias'] - np.float32(mean),
    }  # other leaves are untouched
    return state.replace(trained={**state.trained, 'score': head})

  return loop.Training(
    name=context.name,
    init=trainable.init,
    evaluate=evaluate,
    finish=centre if options.centre else None,
    batches=batches.rankings(
      _encode(context, train, options, options.overlong),
      options.batch_size,
      options.responses_per_row,
      options.max_length,
      context.config.seed,
    ),
    step=training.compile_train_step(train_step, definitions, options),
    meter=metering.meter_rows(
      definitions.model.config,
      options.batch_size * options.responses_per_row,
      options.max_length,
      head=reads_likelihoods(options),
      one_text=True,
    ),
  )


def build_batch_score(model: Model, layout: Layout, packed_rows: int) -> jax.stages.Wrapped:
  """Builds the compiled score of a batch of rankings: (params, Rankings) → [B, K] float32."""

  @jax.jit
  def score(params: Params, batch: Rankings) -> jax.Array:
    if packed_rows:
      chunks = ranked_logprobs.open_chunks(batch, model, layout, packed_rows, together=1)
      scores = packing.map_chunks(functools.partial(_score_packed, model, params), chunks)
      return scores.reshape(batch.group.shape)
    response = response_tokens(batch)
    return last_scores(model, params, batch.tokens, batch.positions, batch.segment_ids, response)

  return score


def check_options(options: Options, where: str) -> None:
  """Checks the options; raises UserError for an unknown loss."""
  if options.loss not in ranking.REWARD_LOSSES:
    known = ', '.join(ranking.REWARD_LOSSES)
    raise UserError(f'{where}.loss: expected one of {known}, got {options.loss!r}')


def check_packing(context: Context, options: Options) -> None:
  """Checks `packed_rows`; raises UserError if a row of rankings or the mesh does not fit it."""
  shards = context.layout.batch_shards
  packing.check_rows(
    options.packed_rows, options.microbatches, shards, context.where, options.responses_per_row
  )


def reads_likelihoods(options: Options) -> bool:
  """Says whether the step computes log-probabilities, over the whole vocabulary."""
  return options.likelihood or bool(options.language_model_coefficient)


def _check_records(
  train: Sequence[records.Ranking],
  held_out: Sequence[records.Ranking],
  options: Options,
  where: str,
) -> None:
  """Checks that the loss can learn from these rankings; raises UserError if not."""
  soft = any(row.confidence < 1 for row in train)
  if soft and not ranking.REWARD_LOSSES[options.loss].accepts_soft_labels:
    raise UserError(
      f'{where}.loss: {options.loss} cannot learn from soft labels (confidence below 1); '
      'pairwise and plain_pairs can'
    )
  if any(len(row.responses) < 2 for row in [*train, *held_out]):
    raise UserError(
      f'{where}.data: a reward model learns from responses that are compared, but some prompts '
      'have one only'
    )
  if all(_is_tie(row.ranks) for row in train):
    raise UserError(f'{where}.data: all responses are ties, so there is nothing to learn')


def _is_tie(ranks: Iterable[int]) -> bool:
  """Tells whether ranks [K] order no pair of responses."""
  return len({int(rank) for rank in ranks}) < 2


def _encode(
  context: Context,
  rows: Sequence[records.Ranking],
  options: Options,
  overlong: str,
) -> list[dict]:
  return encode.rankings(rows, context.tokenizer, options.max_length, overlong, hosts.spread)


def _iterate_once(examples: Sequence[Mapping], options: Options) -> Iterable[Rankings]:
  return batches.rankings_once(
    examples,
    options.batch_size,
    options.responses_per_row,
    options.max_length,
  )


def _demonstrations_as_rankings(
  options: Options,
) -> list[records.Ranking]:
  """Reads human demonstrations as rankings of a single response each."""
  demonstrations = sources.load_records(options.demonstrations, 'demonstration', 'train')
  rankings = []
  for row in sources.spread_evenly(demonstrations, options.centre_records):
    ranking_of_one = records.Ranking(
      id=row.id,
      source=row.source,
      license=row.license,
      domain='',
      context='',
      messages=row.messages,
      responses=[row.response],
      ranks=[1],
      tools=row.tools,
      place=row.place,
    )
    rankings.append(ranking_of_one)
  return rankings


# Evaluation.


def _keep_scores(
  context: Context,
  state: TrainState,
  scored_batches: Iterable[tuple[Rankings, np.ndarray]],
  held_out: Sequence[records.Ranking],
) -> None:
  """Keeps the score of every held-out response, for the report, on process 0."""
  scores: dict[int, list[float]] = {}
  lengths: dict[int, list[int]] = {}
  for batch, values in scored_batches:
    # The responses of a ranking stand in their order.
    of_responses = np.asarray(response_tokens(batch).sum(axis=-1))
    for row, place in np.argwhere(batch.group > 0):
      number = int(batch.index[row, place])
      scores.setdefault(number, []).append(float(values[row, place]))
      lengths.setdefault(number, []).append(int(of_responses[row, place]))
  if hosts.is_first_process():
    step = int(jax.device_get(state.step))
    rows = kept_responses.make_given_rows(held_out, scores, lengths, stage=context.name, step=step)
    kept_responses.keep(context.workdir, rows)


def measure_accuracy(
  scored_batches: Iterable[tuple[Rankings, np.ndarray]],
  held_out: Sequence[records.Ranking],
) -> dict[str, float]:
  """Measures how often the score agrees with people on pairs that they did not tie.

  Args:
    scored_batches: batches with their scores [B, K] float32.
    held_out: the records that the batches' `index` points at.

  Returns:
    accuracy; accuracy_low and accuracy_high, its 95% interval, which resamples whole
    rankings; length_accuracy, that of always preferring the longer response;
    log_loss, the mean of −log σ(r_w − r_l) in nats; pairs. If there are several
    sources, also accuracy, length_accuracy and pairs of each. If people ordered no pair,
    only pairs, 0.
  """
  # source of the data → (correct, longer is right, log-loss) of each pair
  by_source: dict[str, list[tuple[float, float, float]]] = {}
  rankings = []  # (the ranking of a pair, whether the score is right)
  for batch, scores in scored_batches:
    for row, better, worse in untied_pairs(batch):
      number = int(batch.index[row, better])
      measured = _measure_pair(batch, scores, row, better, worse)
      by_source.setdefault(held_out[number].source, []).append(measured)
      rankings.append((number, measured[0]))
  if not by_source:
    return {'pairs': 0.0}
  everything = np.array([pair for pairs in by_source.values() for pair in pairs])
  clusters, correct = zip(*rankings, strict=True)
  low, high = winrate.bootstrap(correct, [str(number) for number in clusters], resamples=1000)
  values = {
    'accuracy': everything[:, 0].mean(),
    'length_accuracy': everything[:, 1].mean(),
    'log_loss': everything[:, 2].mean(),
    'pairs': len(everything),
    'accuracy_low': low,
    'accuracy_high': high,
  }
  if len(by_source) > 1:
    for source, pairs in sorted(by_source.items()):
      right, longer, _ = np.mean(pairs, axis=0)
      values[f'accuracy/{source}'] = right
      values[f'length_accuracy/{source}'] = longer
      values[f'pairs/{source}'] = len(pairs)
  return {name: float(value) for name, value in values.items()}


def untied_pairs(batch: Rankings) -> Iterator[tuple[int, int, int]]:
  """Yields (row, better place, worse place) of all pairs of one prompt that are not tied."""
  rows, places = batch.group.shape
  for row in range(rows):
    for better in range(places):
      for worse in range(places):
        same_prompt = batch.group[row, better] and (
          batch.group[row, better] == batch.group[row, worse]
        )
        if same_prompt and batch.ranks[row, better] < batch.ranks[row, worse]:
          yield row, better, worse


def _measure_pair(
  batch: Rankings, scores: np.ndarray, row: int, better: int, worse: int
) -> tuple[float, float, float]:
  """Measures a pair: whether the score is right, whether the longer response is, the log-loss."""
  margin = scores[row, better] - scores[row, worse]
  # With the prompt, which is the same for both.
  lengths = (batch.segment_ids[row] > 0).sum(axis=-1).astype(np.int64)
  longer = 0.5 + 0.5 * np.sign(lengths[better] - lengths[worse])
  correct = 0.5 + 0.5 * np.sign(margin)  # a tie counts as half
  return float(correct), float(longer), float(np.logaddexp(0, -margin))


# The plan.


def plan(context: Context) -> StagePlan:
  """Plans the programs and the memory of the stage; `context` has an abstract layout."""
  options = context.read_options(STAGE)
  check_options(options, context.where)
  check_packing(context, options)
  trainable = training.open_trainable(context, options, head=True, likelihood=options.likelihood)
  definitions = trainable.definitions
  state = trainable.init()
  batch = abstract_rankings(
    context.layout,
    options.batch_size,
    options.responses_per_row,
    options.max_length,
  )
  step = training.compile_train_step(train_step, definitions, options)
  responses = options.batch_size * options.responses_per_row
  sharing = packing.plan_sharing(
    range(responses),
    options.max_length,
    options.responses_per_row,
    [definitions.model],
    context.layout,
  )
  parts, rows, length = packing.divide(
    responses, options.microbatches, options.packed_rows, options.max_length, sharing
  )
  estimate = work.training(
    definitions.model.config,
    context.layout,
    rows * parts,
    length,
    length if reads_likelihoods(options) else 0,  # places with logits
    parts,
    state.trained,
  )
  program = Program('step', functools.partial(step.lower, state, batch), estimate)
  return StagePlan(resident(state), [program], [])


def list_data(options: Options, tokenizer: Any) -> list[DataUse]:
  """Lists the data that the stage reads, with the encoding of its records."""

  def encode_rankings(rows: Sequence[records.Ranking], overlong: str) -> list[dict]:
    _check_records(rows, [], options, 'reward')  # before the first stage runs
    return encode.rankings(rows, tokenizer, options.max_length, overlong)

  def encode_demonstrations(rows: Sequence[records.Demonstration], overlong: str) -> list[dict]:
    return encode.demonstrations(rows, tokenizer, options.max_length, overlong)

  uses = [DataUse('data', options.data, 'ranking', encode_rankings, options.overlong)]
  if options.centre:
    demonstrations = DataUse(
      'demonstrations',
      options.demonstrations,
      'demonstration',
      encode_demonstrations,
      splits=('train',),
    )
    uses.append(demonstrations)
  return uses


TINY: dict[str, Any] = {
  'loop': TINY_LOOP,
  'batch_size': 8,
  'max_length': 128,
}
STAGE = StageKind(options=Options, run=run, plan=plan, tiny=TINY, data=list_data)
