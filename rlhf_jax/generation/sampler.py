"""Samples responses to prompts: prefill and decoding in one compiled call.

`build_sampler` compiles `generate`; its parts (`prefill`, `draw`, `decode_step`)
are pure functions of values. All responses are decoded together until the longest
has ended, or, with `slots`, only some of them at a time: one that has ended gives
its place to the next (`generate_in_slots`). With `drafts`, several tokens are read
at a time if an earlier response to the prompt said them (`decode_drafts`). There is
no beam search.

Letters: B prompts of P tokens, K responses to each, R tokens of a response, N = B
* K, V vocabulary, D width, S slots.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.generation import row_groups, speculation
from rlhf_jax.models import attention, column_blocks, heads, rope, transformer
from rlhf_jax.models.block import Pair
from rlhf_jax.models.transformer import Cache, Model
from rlhf_jax.options import Count, Natural, NonNegative, PositiveShare
from rlhf_jax.types import Params, Prompts, Samples, Sequences

# Platform → options of XLA. On a GPU, cuBLAS takes two thirds of the time of
# XLA's own kernels for products with some hundred rows.
COMPILER_OPTIONS = {'gpu': {'xla_gpu_enable_triton_gemm': False}}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
  """How tokens are chosen."""

  max_new_tokens: Count = 32  # R; a longer response is cut off, without an end token
  temperature: NonNegative = 1.0  # 0 = greedy
  top_k: Natural = 0  # choose among the k likeliest tokens; 0 = all
  top_p: PositiveShare = 1.0  # choose among the fewest tokens with this probability; 1 = all
  # responses decoded at a time; one that has ended gives its place to the next; 0 = all
  slots: Natural = 0
  # Tokens of earlier responses to the same prompt that are verified at a time; 0 = none.
  # They change no response, only the time that it takes (speculation.py).
  drafts: Natural = 0

  def unread(self) -> dict[str, str]:
    """Returns the settings that are not read with these values, and why."""
    return {} if self.temperature else dict.fromkeys(('top_k', 'top_p'), 'temperature is 0')


@dataclasses.dataclass(frozen=True)
class Definition:
  """Everything about a sampler that is fixed when it is compiled."""

  model: Model  # the policy's definition, with the layout of decoding
  axes: Any  # the axis names of the parameters, as in training
  options: SamplingOptions  # how tokens are chosen
  stop_ids: tuple[int, ...]  # tokens that end a response
  pad_id: int  # the token that fills up a response after its end
  num_samples: int  # K responses to each prompt
  layout: Any  # the layout of training; None for one device
  unroll: bool  # layers are a tuple rather than stacked, which decodes faster

  @property
  def platform(self) -> str:
    """Where it runs: cpu, gpu or tpu."""
    return self.layout.platform if self.layout else jax.default_backend()

  @property
  def is_one_device(self) -> bool:
    """Whether nothing is sharded, as there is one device only."""
    return self.layout is None or self.layout.is_one_device

  @property
  def keeps_one_segment(self) -> bool:
    """Whether the cache is one segment: on a GPU, whose kernel reads only what is filled."""
    return self.platform == 'gpu'


class DecodeState(flax.struct.PyTreeNode):
  """What decoding carries from token to token."""

  # [] int32, the index in the response of the token that is drawn next; with drafts [B * K]
  place: jax.Array
  done: jax.Array  # [B * K] bool, rows that have ended
  token: jax.Array  # [B * K] int32, the token that was drawn last
  cache: Cache  # keys and values of all tokens before it
  tokens: jax.Array  # [B * K, R] int32, PAD where nothing is drawn yet
  logprobs: jax.Array  # [B * K, R] float32
  mask: jax.Array  # [B * K, R] bool


class SlotState(flax.struct.PyTreeNode):
  """What decoding in slots carries from token to token."""

  next: jax.Array  # [] int32, the next response that gets a slot
  row: jax.Array  # [S] int32, the response that a slot decodes, in 0 … N − 1; N = none yet
  place: jax.Array  # [S] int32, its tokens so far; R where a slot is idle
  token: jax.Array  # [S] int32, the last of them
  cache: Cache  # of S rows
  samples: Samples  # [N, R], what is drawn so far


def build_sampler(
  model: Model,
  options: SamplingOptions,
  stop_ids: Sequence[int],
  pad_id: int,
  num_samples: int = 1,
  layout: Any = None,
  unroll: bool | None = None,
) -> Callable[..., Samples]:
  """Builds the compiled sampler of a model.

  Args:
    model: the policy's definition.
    options: how tokens are chosen.
    stop_ids: tokens that end a response; they belong to it.
    pad_id: the token that fills up a response after its end.
    num_samples: K responses to each prompt.
    layout: the layout of training (runtime/mesh.py: Layout). The compiled call reshards
      parameters and rows for decoding, and shards the samples as training needs
      them. None is one device.
    unroll: whether to unroll the layers. This decodes faster, as scanned layers
      copy their cache at every step, but takes longer to compile. None unrolls
      them on a CPU and on a GPU.

  Returns:
    generate(params, prompts: Prompts [B, P], key) → Samples [B * K, R]. Decoding stops
    as soon as every row has ended. With `drafts` it also takes earlier responses to each
    prompt, [B, K * R] int32.

  Raises:
    UserError: an option is out of its range, or slots are wanted where there are none.
  """
  options_lib.check_ranges(options, 'sampling')
  check_slots(options, model, layout)
  check_drafts(options, model, layout)
  platform = layout.platform if layout else jax.default_backend()
  is_abstract = layout is not None and layout.abstract
  if unroll is None:
    unroll = platform in ('cpu', 'gpu') and not is_abstract
  decoding_model = model
  if layout is not None:
    decoding_model = transformer.build_model(model.config, layout.decoding)
  definition = Definition(
    model=decoding_model,
    axes=model.axes,
    options=options,
    stop_ids=tuple(stop_ids),
    pad_id=pad_id,
    num_samples=num_samples,
    layout=layout,
    unroll=unroll,
  )
  if unroll:
    return UnrolledSampler(definition)
  return jax.jit(
    functools.partial(generate, definition),
    compiler_options=COMPILER_OPTIONS.get(platform),
  )


class UnrolledSampler:
  """The compiled sampler of a model whose layers are unrolled; see `build_sampler`.

  The layers are unstacked in a call of its own, so that each of them is an argument of the
  decoding program.
  """

  def __init__(self, definition: Definition) -> None:
    """Compiles nothing yet."""
    self.definition = definition
    self.prepare = jax.jit(functools.partial(prepare_params, definition), static_argnums=1)
    self.generate = jax.jit(
      functools.partial(generate, definition),
      compiler_options=COMPILER_OPTIONS.get(definition.platform),
    )
    self.draw_uniforms = jax.jit(draw_uniforms, static_argnums=(1, 2))
    self.respond_in_groups = row_groups.GroupedCalls(
      jax.jit(functools.partial(respond, definition))
    )

  def __call__(
    self, params: Params, prompts: Prompts, key: jax.Array, earlier: jax.Array | None = None
  ) -> Samples:
    """Samples as `generate` does, on a CPU in groups of rows at the same time."""
    definition = self.definition
    options = definition.options
    rows = len(prompts.tokens) * definition.num_samples
    groups = groups_for_prompts(definition, params, len(prompts.tokens))
    at_once = min(options.slots or rows, rows // groups)
    # with drafts several tokens of each row are read at a time
    prepared = self.prepare(params, 0 if options.drafts else at_once)
    if groups == 1:
      return self.generate(prepared, prompts, key, earlier)
    uniforms = self.draw_uniforms(key, options.max_new_tokens, rows)
    return self.respond_in_groups(prepared, prompts, uniforms, groups)


def check_slots(options: SamplingOptions, model: Model, layout: Any) -> None:
  """Raises UserError where responses cannot be decoded in slots."""
  if not options.slots:
    return
  where = f'sampling: slots {options.slots}'
  if layout is not None and layout.mesh.size > 1:
    raise UserError(f'{where}: expected 0 on a mesh of {layout.mesh.size} devices')
  if rope.short_length(model.config):
    raise UserError(f'{where}: expected 0 for a model with longrope, which reads texts again')


def check_drafts(options: SamplingOptions, model: Model, layout: Any) -> None:
  """Raises UserError where drafts cannot be verified."""
  if not options.drafts:
    return
  where = f'sampling: drafts {options.drafts}'
  if options.slots:
    raise UserError(f'{where}: expected 0 beside slots, got slots {options.slots}')
  if layout is not None and layout.mesh.size > 1:
    raise UserError(f'{where}: expected 0 on a mesh of {layout.mesh.size} devices')
  if rope.short_length(model.config):
    raise UserError(f'{where}: expected 0 for a model with longrope, which reads texts again')


def prepare_params(definition: Definition, params: Params, rows: int = 0) -> Params:
  """Prepares parameters for decoding: casts, reshards and, if unrolled, unstacks them.

  Args:
    definition: the definition of the sampler.
    params: the parameters as in training.
    rows: of which one token each is read at a time; for a few, matrices are cut into blocks
      where that is faster. 0 = that is not known.
  """
  config = definition.model.config
  params = transformer.cast_for_compute(params, config.dtype)
  if definition.layout is not None:
    params = definition.layout.reshard_for_decoding(params, definition.axes)
  if not definition.unroll:
    return params
  # Matrices that are sharded along their outputs cannot be joined along them; on a CPU
  # joined ones are no faster.
  join = definition.is_one_device and definition.platform == 'gpu'
  params = transformer.unstack_layers(params, join)
  can_cut = definition.is_one_device and definition.platform == 'cpu'
  if can_cut and column_blocks.are_worth_it(config, params, rows):
    params = column_blocks.cut_matrices(params, heads.unembedding(params))
  return params


def groups_for_prompts(definition: Definition, params: Params, num_prompts: int) -> int:
  """Returns in how many groups of rows, at the same time, prompts are best responded to.

  Args:
    definition: the definition of the sampler.
    params: the parameters.
    num_prompts: B.
  """
  options = definition.options
  if (
    definition.platform != 'cpu' or not definition.is_one_device or options.slots or options.drafts
  ):
    return 1
  cores = row_groups.count_cores()
  return row_groups.count_groups(params, num_prompts, definition.num_samples, cores)


def generate(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  key: jax.Array,
  earlier: jax.Array | None = None,
) -> Samples:
  """Samples K responses to each prompt.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params` if the layers are unrolled, else as in training.
    prompts: Prompts [B, P], left-padded.
    key: the random key of this batch; token n of each response is drawn with fold_in(key, n).
    earlier: [B, K * R] int32, earlier responses, PAD where there are none; None = there
      are none at all.

  Returns:
    Samples [B * K, R].
  """
  rows = prompts.tokens.shape[0] * definition.num_samples
  uniforms = draw_uniforms(key, definition.options.max_new_tokens, rows)
  return respond(definition, params, prompts, uniforms, earlier)


def respond(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  uniforms: jax.Array,
  earlier: jax.Array | None = None,
) -> Samples:
  """Samples responses to each prompt, as many as there are random numbers for.

  Args:
    definition: the definition of the sampler, whose `num_samples` is not read.
    params: as `generate` takes them.
    prompts: Prompts [B, P], left-padded.
    uniforms: [R, B * K, 2] float32, from `draw_uniforms`.
    earlier: as `generate` takes them.

  Returns:
    Samples [B * K, R].
  """
  if not definition.unroll:
    params = prepare_params(definition, params)
  rows = uniforms.shape[1]
  definition = dataclasses.replace(definition, num_samples=rows // len(prompts.tokens))
  if 0 < definition.options.slots < rows:
    return generate_in_slots(definition, params, prompts, uniforms)
  hidden, cache, lengths = prefill(definition, params, prompts)
  state = begin_decoding(definition, params, hidden, cache, uniforms)

  decode = functools.partial(decode_one_by_one, definition, params, prompts, lengths, uniforms)
  if earlier is None:
    state = decode(state)
  else:
    first = lengths if definition.model.config.is_exact else prompts.tokens.shape[1]
    guesses = jnp.repeat(earlier, definition.num_samples, axis=0)
    decode_more = functools.partial(
      decode_drafts, definition, params, first, lengths, uniforms, guesses
    )
    has_drafts = jnp.any(earlier != definition.pad_id)  # not in the first epoch
    state = jax.lax.cond(has_drafts, decode_more, decode, state)
  samples = Samples(
    tokens=state.tokens,
    mask=state.mask,
    logprobs=state.logprobs,
    ended=state.done,
  )
  if definition.layout is None:
    return samples
  # sharded again as the rows of training
  constrain = definition.layout.constrain
  return jax.tree.map(lambda x: constrain(x, ('batch', None)[: x.ndim]), samples)


def decode_one_by_one(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  lengths: jax.Array,
  uniforms: jax.Array,
  state: DecodeState,
) -> DecodeState:
  """Draws all further tokens, one of each row at a time, until every row has ended.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    prompts: Prompts [B, P].
    lengths: [B * K] int32, tokens of the prompts.
    uniforms: [R, B * K, 2] float32, from `draw_uniforms`.
    state: the state after the first token.
  """
  R = definition.options.max_new_tokens
  limit = rope.short_length(definition.model.config)
  may_cross = 0 < limit < prompts.tokens.shape[1] + R

  def has_more(state: DecodeState) -> jax.Array:
    return (state.place < R) & ~jnp.all(state.done)

  def step(state: DecodeState) -> DecodeState:
    if may_cross:
      state = reread_long_rows(definition, params, prompts, lengths, state)
    return decode_step(definition, params, lengths, uniforms, state)

  return jax.lax.while_loop(has_more, step, state)


def prefill(
  definition: Definition,
  params: Params,
  prompts: Prompts,
) -> tuple[jax.Array, Cache, jax.Array]:
  """Runs the model on the prompts once, and repeats the cache for each of K responses.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    prompts: Prompts [B, P].

  Returns:
    (hidden states of the last token [B * K, D], cache of B * K rows with P + R slots,
    lengths of the prompts [B * K] int32).
  """
  K = definition.num_samples
  hidden, cache, lengths = read_prompts(
    definition,
    params,
    prompts,
    prompts.tokens.shape[1] + definition.options.max_new_tokens,
  )
  return jnp.repeat(hidden, K, axis=0), repeat_cache(definition, cache), jnp.repeat(lengths, K)


def read_prompts(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  places: int,
  whole: bool = False,
) -> tuple[jax.Array, Cache, jax.Array]:
  """Runs the model on the prompts.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    prompts: Prompts [B, P].
    places: the slots of the cache, at least P.
    whole: whether the cache is one segment even where others are several.

  Returns:
    (hidden states of the last token [B, D], cache of B rows, lengths of the prompts [B]
    int32).
  """
  positions = prompt_positions(prompts.mask)
  cache = transformer.empty_cache(
    definition.model.config,
    batch=len(positions),
    places=places,
    stacked=not definition.unroll,
    whole=whole or definition.keeps_one_segment,
  )
  segment_ids = prompts.mask.astype(jnp.int32)
  hidden, cache = definition.model.apply(
    column_blocks.leave_out(params),  # of many rows products with whole matrices are faster
    prompts.tokens,
    positions,
    segment_ids,
    cache,
    places=slice(-1, None),  # padding is on the left
  )  # [B, 1, D]
  return hidden[:, 0], cache, positions[:, -1] + 1


def repeat_cache(definition: Definition, cache: Cache) -> Cache:
  """Repeats each row of a cache K times."""
  repeat = functools.partial(jnp.repeat, repeats=definition.num_samples)
  rows_axis = 0 if definition.unroll else 1  # after the axis of stacked layers
  return dataclasses.replace(
    cache,
    layers=jax.tree.map(functools.partial(repeat, axis=rows_axis), cache.layers),
    segment_ids=repeat(cache.segment_ids, axis=0),
    length=repeat(cache.length, axis=0) if jnp.ndim(cache.length) else cache.length,
    is_long=repeat(cache.is_long, axis=0),
  )


def begin_decoding(
  definition: Definition,
  params: Params,
  hidden: jax.Array,
  cache: Cache,
  uniforms: jax.Array,
) -> DecodeState:
  """Draws the first token of each response.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    hidden: [B * K, D], of the last token of the prompt.
    cache: of the prompts.
    uniforms: [R, B * K, 2] float32, from `draw_uniforms`.

  Returns:
    The state after the first token.
  """
  shape = (hidden.shape[0], definition.options.max_new_tokens)
  done = jnp.zeros(shape[0], bool)
  logits = heads.next_token_logits(definition.model, params, hidden)
  token, logprob = draw(definition, uniforms[0], logits, done)
  tokens = jnp.full(shape, definition.pad_id, jnp.int32)
  return DecodeState(
    place=jnp.int32(1),
    done=is_stop(definition, token),
    token=token,
    cache=cache,
    tokens=tokens.at[:, 0].set(token),
    logprobs=jnp.zeros(shape).at[:, 0].set(logprob),
    mask=jnp.zeros(shape, bool).at[:, 0].set(True),
  )


def decode_step(
  definition: Definition,
  params: Params,
  lengths: jax.Array,
  uniforms: jax.Array,
  state: DecodeState,
) -> DecodeState:
  """Draws one more token of each response.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    lengths: [B * K] int32, tokens of the prompts.
    uniforms: [R, B * K, 2] float32, from `draw_uniforms`.
    state: the state after `place` tokens.

  Returns:
    The state with one more token; rows that had ended get PAD.
  """
  place = state.place
  hidden, cache = definition.model.apply(
    params,
    state.token[:, None],
    (lengths + place - 1)[:, None],  # positions of the tokens drawn last
    jnp.ones((lengths.shape[0], 1), jnp.int32),  # of the same segment as the prompt
    state.cache,
  )
  logits = heads.next_token_logits(definition.model, params, hidden[:, 0])  # [B * K, V]
  token, logprob = draw(definition, uniforms[place], logits, state.done)
  return DecodeState(
    place=place + 1,
    done=state.done | is_stop(definition, token),
    token=token,
    cache=cache,
    tokens=state.tokens.at[:, place].set(token),
    logprobs=state.logprobs.at[:, place].set(logprob),
    mask=state.mask.at[:, place].set(~state.done),  # the end token itself is inside
  )


def decode_drafts(
  definition: Definition,
  params: Params,
  first: jax.Array | int,
  lengths: jax.Array,
  uniforms: jax.Array,
  earlier: jax.Array,
  state: DecodeState,
) -> DecodeState:
  """Draws all further tokens; one pass reads the last token and g drafts of each row.

  The logits after the drafts that were drawn are those of decoding one by one, and so
  is the token after them. Keys and values of the others are overwritten by the next pass.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    first: [] or [N] int32, the slot of the cache of a response's first token.
    lengths: [N] int32, tokens of the prompts.
    uniforms: [R, N, 2] float32, from `draw_uniforms`.
    earlier: [N, M] int32, earlier responses to the same prompt.
    state: the state after the first token.

  Returns:
    The state in which every row has ended.
  """
  R, N = uniforms.shape[:2]
  g = definition.options.drafts
  rows, ahead = jnp.arange(N)[:, None], jnp.arange(g + 1)

  def is_idle(state: DecodeState) -> jax.Array:
    return state.done | (state.place >= R)

  def has_more(state: DecodeState) -> jax.Array:
    return ~jnp.all(is_idle(state))

  def step(state: DecodeState) -> DecodeState:
    place = state.place
    drafts = speculation.find_drafts(state.tokens, place, earlier, g)
    hidden, cache = definition.model.apply(
      params,
      jnp.concatenate([state.token[:, None], drafts], axis=1),  # [N, g + 1]
      (lengths + place - 1)[:, None] + ahead,
      jnp.ones((N, g + 1), jnp.int32),
      dataclasses.replace(state.cache, length=first + place - 1),
    )
    logits = heads.next_token_logits(definition.model, params, hidden)
    columns = place[:, None] + ahead  # [N, g + 1], of the tokens that are drawn
    drawn, logprobs = draw(
      definition,
      uniforms[jnp.minimum(columns, R - 1), rows].reshape(-1, 2),
      logits.reshape(N * (g + 1), -1),
      jnp.zeros(N * (g + 1), bool),
    )
    drawn, logprobs = drawn.reshape(N, -1), logprobs.reshape(N, -1)
    stops = is_stop(definition, drawn)
    has_stopped = jnp.cumsum(stops, axis=1) > stops  # before this token
    is_kept = ahead <= speculation.count_accepted(drafts, drawn)[:, None]
    is_kept &= ~has_stopped & (columns < R) & ~is_idle(state)[:, None]
    count = jnp.sum(is_kept, axis=1)
    columns = jnp.where(is_kept, columns, R)  # R: nowhere
    last = jnp.take_along_axis(drawn, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return DecodeState(
      place=place + count,
      done=state.done | jnp.any(is_kept & stops, axis=1),
      token=jnp.where(count > 0, last, state.token),
      cache=dataclasses.replace(cache, length=state.cache.length),
      tokens=state.tokens.at[rows, columns].set(drawn, mode='drop'),
      logprobs=state.logprobs.at[rows, columns].set(logprobs, mode='drop'),
      mask=state.mask.at[rows, columns].set(True, mode='drop'),
    )

  before = state.place
  state = state.replace(place=jnp.full(N, before))
  return jax.lax.while_loop(has_more, step, state).replace(place=before)


def generate_in_slots(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  uniforms: jax.Array,
) -> Samples:
  """Samples all responses in S slots; one that has ended gives its slot to the next.

  So a rollout takes about the time of the tokens that are drawn, not of N times
  the longest response, and the cache has S rows in place of N. This is continuous
  batching (Yu et al. 2022, Orca, OSDI '22, section 3). Prompts are read once, for
  all K responses. The same random numbers belong to a token as without slots, so
  that it is the same token.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    prompts: Prompts [B, P].
    uniforms: [R, N, 2] float32, from `draw_uniforms`.

  Returns:
    Samples [N, R].
  """
  options, K = definition.options, definition.num_samples
  R, N = uniforms.shape[:2]
  P = prompts.tokens.shape[1]
  # slots are filled several at a time, as each filling takes as long as some tokens
  together = max(1, options.slots // 16)
  hidden, read, lengths = read_prompts(definition, params, prompts, P, whole=True)
  lengths = jnp.repeat(lengths, K)
  first = begin_decoding(definition, params, jnp.repeat(hidden, K, axis=0), read, uniforms)
  state = SlotState(
    next=jnp.int32(0),
    row=jnp.full(options.slots, N, jnp.int32),
    place=jnp.full(options.slots, R, jnp.int32),
    token=jnp.full(options.slots, definition.pad_id, jnp.int32),
    cache=transformer.empty_cache(
      definition.model.config,
      batch=options.slots,
      places=P + R,
      stacked=not definition.unroll,
      whole=definition.keeps_one_segment,
    ),
    samples=Samples(first.tokens, first.mask, first.logprobs, first.done),
  )

  def is_idle(state: SlotState) -> jax.Array:
    # the row N, of slots that were never filled, counts as ended
    return (state.place >= R) | state.samples.ended.at[state.row].get(mode='fill', fill_value=True)

  def can_go_on(state: SlotState) -> jax.Array:
    idle = jnp.sum(is_idle(state))
    is_full = idle < jnp.minimum(together, N - state.next)
    return (is_full | (state.next >= N)) & (idle < options.slots)

  def has_more(state: SlotState) -> jax.Array:
    return (state.next < N) | ~jnp.all(is_idle(state))

  def step(state: SlotState) -> SlotState:
    return decode_slots(definition, params, P, lengths, uniforms, state)

  def fill_and_decode(state: SlotState) -> SlotState:
    state = fill_slots(definition, read, first.token, together, is_idle(state), state)
    # two loops rather than a choice in one of them, for which XLA might copy the cache
    return jax.lax.while_loop(can_go_on, step, state)

  return jax.lax.while_loop(has_more, fill_and_decode, state).samples


def fill_slots(
  definition: Definition,
  read: Cache,
  first_tokens: jax.Array,
  together: int,
  idle: jax.Array,
  state: SlotState,
) -> SlotState:
  """Gives the next responses to idle slots: copies their prompts' keys and values there.

  Args:
    definition: the definition of the sampler.
    read: the cache of the prompts, B rows with P slots in one segment.
    first_tokens: [N] int32, the first token of each response.
    together: the most slots that are filled.
    idle: [S] bool, slots that are free.
    state: the state; rows of its cache have P + R slots.

  Returns:
    The state with filled slots.
  """
  S, N = len(idle), len(first_tokens)
  P = read.segment_ids.shape[1]
  (slots,) = jnp.nonzero(idle, size=together, fill_value=S)
  rows = state.next + jnp.arange(together)
  slots = jnp.where(rows < N, slots, S)  # S: nowhere
  rows = jnp.minimum(rows, N - 1)
  prompts = rows // definition.num_samples

  def put(values: jax.Array, new: jax.Array) -> jax.Array:
    return values.at[slots].set(new, mode='drop')

  def put_part(segment: jax.Array, of_prompts: jax.Array, offset: int) -> jax.Array:
    part = of_prompts[..., offset : min(offset + segment.shape[-2], P), :]
    count = part.shape[-2]
    if not count:
      return segment
    if definition.unroll:  # [S, N, S_i, C] and [B, N, S_i, C]
      return segment.at[slots, :, :count].set(part[prompts], mode='drop')
    return segment.at[:, slots, :, :count].set(part[:, prompts], mode='drop')

  def put_pair(pair: Pair, of_prompts: Pair) -> Pair:
    new = {}
    for name, segments in pair.items():
      offsets = attention.segment_offsets(segments)
      (whole,) = of_prompts[name]
      parts = zip(segments, offsets, strict=True)
      new[name] = tuple(put_part(segment, whole, offset) for segment, offset in parts)
    return new

  if definition.unroll:
    layers: Any = tuple(map(put_pair, state.cache.layers, read.layers))
  else:
    layers = put_pair(state.cache.layers, read.layers)
  segments = jnp.pad(
    read.segment_ids[prompts],
    ((0, 0), (0, state.cache.segment_ids.shape[1] - P)),
  )
  return state.replace(
    next=state.next + jnp.sum(slots < S),
    row=put(state.row, rows),
    place=put(state.place, jnp.ones_like(rows)),
    token=put(state.token, first_tokens[rows]),
    cache=dataclasses.replace(
      state.cache,
      layers=layers,
      segment_ids=put(state.cache.segment_ids, segments),
    ),
  )


def decode_slots(
  definition: Definition,
  params: Params,
  prompt_places: int,
  lengths: jax.Array,
  uniforms: jax.Array,
  state: SlotState,
) -> SlotState:
  """Draws one more token in each slot.

  Args:
    definition: the definition of the sampler.
    params: from `prepare_params`.
    prompt_places: P; a response's keys and values come after its prompt's.
    lengths: [N] int32, tokens of the prompts.
    uniforms: [R, N, 2] float32, from `draw_uniforms`.
    state: the state.

  Returns:
    The state with one more token in each slot that was not idle.
  """
  R, N = uniforms.shape[:2]
  samples, place = state.samples, state.place
  row = jnp.minimum(state.row, N - 1)
  idle = (place >= R) | samples.ended[row] | (state.row >= N)
  # An idle slot reads its last token once more, into the same place.
  before = jnp.minimum(place, R) - 1
  # with exact numerics, rows of a cache begin with their first token
  is_exact = definition.model.config.is_exact
  first = lengths[row] if is_exact else prompt_places
  hidden, cache = definition.model.apply(
    params,
    state.token[:, None],
    (lengths[row] + before)[:, None],
    jnp.ones((len(row), 1), jnp.int32),
    dataclasses.replace(state.cache, length=first + before),
  )
  logits = heads.next_token_logits(definition.model, params, hidden[:, 0])  # [S, V]
  token, logprob = draw(definition, uniforms[jnp.minimum(place, R - 1), row], logits, idle)
  target = jnp.where(idle, N, row)  # N: nowhere
  samples = Samples(
    tokens=samples.tokens.at[target, place].set(token, mode='drop'),
    mask=samples.mask.at[target, place].set(True, mode='drop'),
    logprobs=samples.logprobs.at[target, place].set(logprob, mode='drop'),
    ended=samples.ended.at[target].set(is_stop(definition, token), mode='drop'),
  )
  return state.replace(
    place=jnp.where(idle, place, place + 1),
    token=token,
    cache=dataclasses.replace(cache, length=state.cache.length),
    samples=samples,
  )


def reread_long_rows(
  definition: Definition,
  params: Params,
  prompts: Prompts,
  lengths: jax.Array,
  state: DecodeState,
) -> DecodeState:
  """Reads rows again whose next token makes them long texts of a model with longrope.

  Short and long texts turn by different factors (`rope.short_length`), so all
  keys and values of such a row change at once; transformers reads it again too.

  Args:
    definition: of the sampler.
    params: from `prepare_params`.
    prompts: Prompts [B, P].
    lengths: [B * K] int32, tokens of the prompts.
    state: with `place` places filled, the last of which is not in the cache yet.

  Returns:
    The state, its cache exchanged in those rows.
  """
  config = definition.model.config
  crosses = (lengths + state.place == rope.short_length(config) + 1) & ~state.done

  def reread(cache: Cache) -> Cache:
    rows, R = state.tokens.shape
    repeat = functools.partial(jnp.repeat, repeats=definition.num_samples, axis=0)
    places = jnp.arange(R)
    positions = [repeat(prompt_positions(prompts.mask)), lengths[:, None] + places]
    is_read = jnp.tile(places < state.place - 1, (rows, 1))
    mask = jnp.concatenate([repeat(prompts.mask), is_read], axis=1)
    fresh = transformer.empty_cache(
      config, rows, mask.shape[1], not definition.unroll, definition.keeps_one_segment
    )
    _, fresh = definition.model.apply(
      params,
      jnp.concatenate([repeat(prompts.tokens), state.tokens], axis=1),
      jnp.concatenate(positions, axis=1),
      mask.astype(jnp.int32),
      dataclasses.replace(fresh, is_long=crosses),
    )
    rows_axis = 0 if definition.unroll else 1  # after the axis of stacked layers

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
      shape = [1] * new.ndim
      shape[rows_axis] = rows
      return jnp.where(crosses.reshape(shape), new, old)

    layers = jax.tree.map(choose, fresh.layers, cache.layers)
    return dataclasses.replace(cache, layers=layers)

  cache = jax.lax.cond(jnp.any(crosses), reread, lambda cache: cache, state.cache)
  return state.replace(cache=cache)


def draw(
  definition: Definition,
  uniforms: jax.Array,
  logits: jax.Array,
  done: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Draws a token of each row, with its log-probability.

  The log-probability is that of softmax(logits / temperature) over the whole
  vocabulary, as a forward pass of training computes it: top-k and top-p restrict
  the choice, but do not renormalise the probabilities.

  Args:
    definition: the definition of the sampler.
    uniforms: [N, 2] float32, the random numbers of this token, from `draw_uniforms`.
    logits: [N, V] float32.
    done: [N] bool, rows that have ended.

  Returns:
    (tokens [N] int32, PAD in ended rows; log-probabilities [N] float32, 0 there). Where logits are
    NaN, a token is returned too, but its log-probability is NaN: callers check that.
  """
  options = definition.options
  # greedy decoding reports the log-probabilities of temperature 1
  arithmetic = definition.model.arithmetic
  scaled = arithmetic.rounded(logits / (options.temperature or 1.0))
  peak = arithmetic.peak(scaled)
  if options.temperature == 0:
    tokens = first_true(scaled == peak)
  else:
    allowed = keep_likeliest(scaled, options.top_k, options.top_p)
    tokens = choose_tokens(uniforms, jnp.exp(allowed - peak))
  log_total = heads.log_total(definition.model, scaled - peak)  # [N, 1]
  chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)
  logprobs = (chosen - peak - log_total)[:, 0]
  tokens = jnp.where(done, definition.pad_id, tokens)
  return tokens, jnp.where(done, 0.0, logprobs)


def keep_likeliest(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
  """Rules out all but the likeliest tokens; sorts the vocabulary for top-p only.

  Args:
    logits: [N, V] float32.
    top_k: keep the k likeliest tokens; 0 = all.
    top_p: keep the fewest tokens that together have this probability (nucleus
      sampling: Holtzman et al. 2020, arXiv:1904.09751, section 3.1); 1 = all.

  Returns:
    [N, V] float32, −∞ for tokens that are ruled out.
  """
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]  # [N, 1]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    order = jnp.sort(logits, axis=-1, descending=True)  # the likeliest first
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of likelier tokens
    kept = jnp.where(before < top_p, order, jnp.inf)
    least = jnp.min(kept, axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits


def choose_tokens(uniforms: jax.Array, weights: jax.Array) -> jax.Array:
  """Draws one token for each row by inverting the distribution function, twice.

  First a block of about √V tokens is drawn by the blocks' sums, then a token of
  it. That takes one random number each in place of V of them, as Gumbel noise
  would, and only short cumulative sums. A token's probability is exact to 2^-23
  of its block's, and a block's to 2^-23.

  Args:
    uniforms: [N, 2] float32 in [0, 1).
    weights: [N, V] float32, not negative: probabilities times any factor of the row.

  Returns:
    [N] int32; a token of weight 0 is never drawn.
  """
  V = weights.shape[-1]
  size = 2 ** math.ceil(math.log2(V) / 2)  # tokens in a block
  padded = jnp.pad(weights, ((0, 0), (0, -V % size)))
  blocks = padded.reshape(-1, padded.shape[-1] // size, size)
  block = _invert(uniforms[:, 0], jnp.sum(blocks, axis=-1))
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [N, size]
  return block * size + _invert(uniforms[:, 1], inside)


def _invert(uniforms: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the index [N] at which the cumulative sum of weights [N, M] passes uniforms [N]."""
  up_to = jnp.triu(jnp.ones((weights.shape[-1],) * 2, jnp.float32))
  # a product: XLA's CPU backend computes a cumulative sum an entry at a time
  sums = jnp.matmul(weights, up_to, precision=jax.lax.Precision.HIGHEST)
  is_beyond = sums > uniforms[:, None] * sums[:, -1:]
  # Each sum is rounded for itself, so that they may grow where a weight is 0, or
  # not quite reach the last one.
  is_possible = weights > 0
  places = jnp.arange(weights.shape[-1], dtype=jnp.int32)
  last = jnp.max(jnp.where(is_possible, places, 0), axis=-1)
  return jnp.minimum(first_true(is_beyond & is_possible), last)


def first_true(marks: jax.Array) -> jax.Array:
  """Returns the index of the first True of each row.

  On a CPU this takes an eighth of the time of argmax.

  Args:
    marks: [N, M] bool.

  Returns:
    [N] int32; the last index if there is no True.
  """
  last = marks.shape[-1] - 1
  places = jnp.arange(last + 1, dtype=jnp.int32)
  return jnp.min(jnp.where(marks, places, last), axis=-1)


def draw_uniforms(key: jax.Array, length: int, rows: int) -> jax.Array:
  """Draws the random numbers of all tokens at once.

  Args:
    key: the random key of this batch; those of token n come from fold_in(key, n).
    length: R, the tokens of a response.
    rows: N.

  Returns:
    [R, N, 2] float32 in [0, 1).
  """
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(length))
  return jax.vmap(lambda key: jax.random.uniform(key, (rows, 2)))(keys)


def is_stop(definition: Definition, tokens: jax.Array) -> jax.Array:
  """Tells which tokens end a response.

  Args:
    definition: the definition of the sampler.
    tokens: [N] int32.

  Returns:
    [N] bool.
  """
  return jnp.isin(tokens, jnp.asarray(definition.stop_ids, jnp.int32))


def prompt_positions(mask: jax.Array) -> jax.Array:
  """Returns the positions of left-padded prompts.

  Args:
    mask: [B, P] bool.

  Returns:
    [B, P] int32: 0 at the first real token, and on the padding before it.
  """
  counted = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
  return jnp.maximum(counted - 1, 0)


def join_sequences(prompts: Prompts, samples: Samples) -> Sequences:
  """Joins prompts and their responses into sequences whose targets are the responses.

  Args:
    prompts: Prompts [B, P].
    samples: Samples [B * K, R].

  Returns:
    Sequences [B * K, P + R].
  """
  num_samples = samples.tokens.shape[0] // prompts.tokens.shape[0]
  repeat = functools.partial(jnp.repeat, repeats=num_samples, axis=0)
  no_targets = jnp.zeros_like(prompts.mask)  # prompts are not learned
  tokens = jnp.concatenate([repeat(prompts.tokens), samples.tokens], axis=1)
  mask = jnp.concatenate([repeat(prompts.mask), samples.mask], axis=1)
  targets = jnp.concatenate([repeat(no_targets), samples.mask], axis=1)
  return Sequences(
    tokens=tokens,
    positions=prompt_positions(mask),
    segment_ids=mask.astype(jnp.int32),
    loss_mask=targets.astype(jnp.float32),
  )
