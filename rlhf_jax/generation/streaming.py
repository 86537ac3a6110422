"""Samples one response token by token, so that it can be shown while it grows.

Two programs are compiled, whatever is asked: one reads READ tokens of a prompt, the
other draws a token. Both work on a cache with room for the longest conversation, and
the temperature is an argument of theirs.

Letters: C = READ tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import options as options_lib
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import Definition, SamplingOptions
from rlhf_jax.models import heads, rope, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Cache, Model
from rlhf_jax.types import Params

READ = 64  # tokens of a prompt that are read at once
MAX_PLACES = 4096  # tokens of prompt and response together, in models that could read more


@dataclasses.dataclass(frozen=True)
class Streamer:
  """Streams the responses of one model; made by `build_streamer`.

  Attributes:
    params: as decoding needs them.
    read: (params, cache, tokens [1, C], mask [1, C], position of the first) → cache.
    step: (params, cache, token [1], position, uniforms [1, 2], temperature) → (the next
      token [1], cache).
    make_cache: () → an empty cache.
    stop_ids: tokens that end a response.
    places: tokens of prompt and response together.
    sharding: of the cache and of tokens; always the same, as programs depend on it.
  """

  params: Params
  read: Callable[..., Cache]
  step: Callable[..., tuple[jax.Array, Cache]]
  make_cache: Callable[[], Cache]
  stop_ids: tuple[int, ...]
  places: int
  sharding: Any

  def stream(
    self, prompt: Sequence[int], key: jax.Array, temperature: float, max_new_tokens: int
  ) -> Iterator[int]:
    """Yields the tokens of a response as they are drawn, the end token included.

    Args:
      prompt: token ids, at least one.
      key: the random key of this response.
      temperature: 0 = greedy.
      max_new_tokens: at most so many.

    Raises:
      UserError: the prompt leaves no room for a response.
    """
    room = self.places - len(prompt)
    if not prompt or room < 1:
      raise UserError(
        f'the conversation has {len(prompt)} tokens: expected 1 to {self.places - 1}, what the '
        'model reads less a response'
      )
    count = min(room, max_new_tokens)
    uniforms = sampler.draw_uniforms(key, self.places, 1)
    cache = self._read_all(prompt[:-1])
    # The last token of the prompt is read by the step that draws the first of the response.
    token = jax.device_put(np.array(prompt[-1:], np.int32), self.sharding)
    for number in range(count):
      position = jnp.int32(len(prompt) - 1 + number)
      token, cache = self.step(
        self.params, cache, token, position, uniforms[number], jnp.float32(temperature)
      )
      drawn = int(token[0])
      yield drawn
      if drawn in self.stop_ids:
        return

  def _read_all(self, tokens: Sequence[int]) -> Cache:
    """Reads a prompt chunk by chunk; the first chunk is padded on the left."""
    cache = self.make_cache()
    empty = -len(tokens) % READ
    padded = np.array([0] * empty + list(tokens), np.int32)
    mask = np.arange(len(padded)) >= empty
    for begin in range(0, len(padded), READ):
      chunk = slice(begin, begin + READ)
      first = np.int32(begin - empty)  # negative in padding, which nothing attends to
      cache = self.read(self.params, cache, padded[None, chunk], mask[None, chunk], first)
    return cache


def build_streamer(
  model: Model,
  params: Params,
  stop_ids: Sequence[int],
  layout: Any,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Streamer:
  """Builds the streamer of a model on one device.

  Args:
    model: its definition.
    params: its parameters, as in training.
    stop_ids: tokens that end a response.
    layout: of one device.
    top_k: choose among the k likeliest tokens; 0 = all.
    top_p: choose among the fewest tokens with this probability; 1 = all.
  """
  options = SamplingOptions(top_k=top_k, top_p=top_p)
  options_lib.check_ranges(options, 'sampling')
  definition = Definition(
    model=transformer.build_model(model.config, layout.decoding),
    axes=model.axes,
    options=options,
    stop_ids=tuple(stop_ids),
    pad_id=0,
    num_samples=1,
    layout=layout,
    unroll=layout.platform in ('cpu', 'gpu'),  # as in `build_sampler`
  )
  places = longest_conversation(model.config)
  sharding = layout.sharding()  # of one device

  def compile_program(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return jax.jit(
      functools.partial(function, definition),
      out_shardings=sharding,
      compiler_options=sampler.COMPILER_OPTIONS.get(layout.platform),
      **options,
    )

  return Streamer(
    params=jax.jit(functools.partial(sampler.prepare_params, definition))(params),
    read=compile_program(read_chunk, donate_argnums=1),
    step=compile_program(draw_next, donate_argnums=1),
    make_cache=functools.partial(compile_program(_make_cache, static_argnums=0), places + READ),
    stop_ids=definition.stop_ids,
    places=places,
    sharding=sharding,
  )


def longest_conversation(config: ModelConfig) -> int:
  """Returns how many tokens prompt and response may have together.

  A model with longrope changes its factors at some length, and would have to read all
  again (`sampler.reread_long_rows`); here its texts end before that.
  """
  limits = [MAX_PLACES, config.max_length]
  if rope.short_length(config):
    limits.append(rope.short_length(config))
  return min(limits)


def _make_cache(definition: Definition, places: int) -> Cache:
  """Makes an empty cache whose length is an array, so that one program reads every chunk."""
  cache = transformer.empty_cache(
    definition.model.config,
    batch=1,
    places=places,
    stacked=not definition.unroll,
    whole=definition.keeps_one_segment,
  )
  return dataclasses.replace(cache, length=jnp.int32(0))


def read_chunk(
  definition: Definition,
  params: Params,
  cache: Cache,
  tokens: jax.Array,
  mask: jax.Array,
  first: jax.Array,
) -> Cache:
  """Reads a chunk of a prompt.

  Args:
    definition: of the model.
    params: from `sampler.prepare_params`.
    cache: of what was read before.
    tokens: [1, C] int32.
    mask: [1, C] bool, False = padding.
    first: [] int32, the position of the first token.

  Returns:
    The cache with C more slots filled.
  """
  positions = jnp.maximum(first + jnp.arange(tokens.shape[1]), 0)[None]
  _, cache = definition.model.apply(params, tokens, positions, mask.astype(jnp.int32), cache)
  return cache


def draw_next(
  definition: Definition,
  params: Params,
  cache: Cache,
  token: jax.Array,
  position: jax.Array,
  uniforms: jax.Array,
  temperature: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Reads a token and draws the next one.

  Args:
    definition: of the model, with top-k and top-p.
    params: from `sampler.prepare_params`.
    cache: of all tokens before.
    token: [1] int32.
    position: [] int32, of this token.
    uniforms: [1, 2] float32 in [0, 1).
    temperature: [] float32; 0 = greedy.

  Returns:
    (the next token [1] int32, the cache with one more slot filled).
  """
  hidden, cache = definition.model.apply(
    params, token[:, None], position[None, None], jnp.ones((1, 1), jnp.int32), cache
  )
  logits = heads.next_token_logits(definition.model, params, hidden[:, 0])  # [1, V]
  scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
  peak = jnp.max(scaled, axis=-1, keepdims=True)
  allowed = sampler.keep_likeliest(scaled, definition.options.top_k, definition.options.top_p)
  sampled = sampler.choose_tokens(uniforms, jnp.exp(allowed - peak))
  likeliest = sampler.first_true(scaled == peak)
  return jnp.where(temperature > 0, sampled, likeliest), cache
