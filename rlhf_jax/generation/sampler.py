"""Prompts → responses: prefill and decode in one compiled call.

Left out: beam search, speculative decoding, continuous batching.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.errors import UserError
from rlhf_jax.models import heads, transformer
from rlhf_jax.types import Prompts, Samples, Sequences

DEFAULTS = dict(
    max_new_tokens=32,  # a response is cut there, without an end token
    temperature=1.0,  # 0 = greedy
    top_k=0,  # choose among the k likeliest tokens; 0 = all
    top_p=1.0,  # choose among the fewest tokens with this probability; 1 = all
)


def choose_tokens(key, logits, temperature, top_k, top_p):
  """One token for each row of logits [B, V] float32 → [B] int32."""
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k:
    logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
  if top_p < 1:
    order = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
    least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def build_sampler(model, sampling, stop_ids, pad_id, samples: int = 1, unroll: bool | None = None, layout=None):
  """A sampler for a model.

  Args:
    model: the policy's definition.
    sampling: a config like DEFAULTS.
    stop_ids: tokens that end a response; they belong to it.
    pad_id: what follows the end.
    samples: K responses to each prompt.
    unroll: unrolled layers decode faster on a CPU, where None chooses them.
    layout: the mesh's; decoding then lays parameters and rows in its own way (runtime/mesh.py: Layout.decoding), inside
      the compiled call, and gives samples as training has them.

  Returns:
    generate(params, prompts: Prompts [B, P], key) → Samples [B * K, R]. Stops as soon as every row has ended.
  """
  if sampling.max_new_tokens < 1 or sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
    raise UserError('sampling: expected max_new_tokens from 1, temperature and top_k from 0, 0 < top_p ≤ 1; got '
                    + ', '.join(f'{name} {sampling[name]}' for name in DEFAULTS))
  R, stops = sampling.max_new_tokens, jnp.asarray(stop_ids, jnp.int32)
  platform = layout.platform if layout else jax.default_backend()
  if unroll is None:
    unroll = platform == 'cpu' and not (layout and layout.abstract)
  scale, axes = sampling.temperature or 1.0, model.axes
  if layout is not None:
    model = transformer.build_model(model.config, layout.decoding)

  def lay(params):
    params = transformer.cast_for_compute(params, model.config.dtype)
    return params if layout is None else layout.reshard_for_decoding(params, axes)

  def draw(key, logits, place, done):
    tokens = choose_tokens(jax.random.fold_in(key, place), logits, sampling.temperature, sampling.top_k, sampling.top_p)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits / scale, axis=-1), tokens[:, None], axis=-1)[:, 0]
    return jnp.where(done, pad_id, tokens), jnp.where(done, 0.0, chosen)

  def run(params, prompts, key):
    params = params if unroll else lay(params)
    B, P = prompts.tokens.shape
    rows = B * samples
    positions = prompt_positions(prompts.mask)
    cache = transformer.empty_cache(model.config, B, P + R, stacked=not unroll)
    hidden, cache = model.apply(params, prompts.tokens, positions, prompts.mask.astype(jnp.int32), cache)
    repeat = lambda axis: lambda x: jnp.repeat(x, samples, axis=axis)
    cache = cache.replace(layers=jax.tree.map(repeat(0 if unroll else 1), cache.layers),
                          segment_ids=repeat(0)(cache.segment_ids))
    lengths = repeat(0)(positions[:, -1]) + 1
    done = jnp.zeros(rows, bool)
    token, logprob = draw(key, heads.next_token_logits(model, params, repeat(0)(hidden[:, -1])), 0, done)
    tokens = jnp.full((rows, R), pad_id, jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((rows, R)).at[:, 0].set(logprob)
    mask = jnp.zeros((rows, R), bool).at[:, 0].set(True)
    done = jnp.isin(token, stops)

    def more(state):
      return (state[0] < R) & ~jnp.all(state[1])

    def step(state):
      place, done, token, cache, tokens, logprobs, mask = state
      hidden, cache = model.apply(params, token[:, None], (lengths + place - 1)[:, None],
                                  jnp.ones((rows, 1), jnp.int32), cache)
      token, logprob = draw(key, heads.next_token_logits(model, params, hidden[:, 0]), place, done)
      tokens, logprobs = tokens.at[:, place].set(token), logprobs.at[:, place].set(logprob)
      mask = mask.at[:, place].set(~done)
      return place + 1, done | jnp.isin(token, stops), token, cache, tokens, logprobs, mask

    state = (jnp.int32(1), done, token, cache, tokens, logprobs, mask)
    _, done, _, _, tokens, logprobs, mask = jax.lax.while_loop(more, step, state)
    made = Samples(tokens=tokens, mask=mask, logprobs=logprobs, ended=done)
    return made if layout is None else jax.tree.map(lambda x: layout.constrain(x, ('batch', None)[:x.ndim]), made)

  compiled = jax.jit(run)
  if not unroll:
    return compiled
  unstack = jax.jit(lambda params: transformer.unstack_layers(lay(params)))
  return lambda params, prompts, key: compiled(unstack(params), prompts, key)


def prompt_positions(mask):
  """Positions [B, P] int32 of left-padded prompts: 0 at the first real token, and on the padding before it."""
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def join_sequences(prompts: Prompts, samples: Samples) -> Sequences:
  """Prompts and their responses as sequences [B * K, P + R] whose targets are the responses."""
  repeat = lambda x: jnp.repeat(x, samples.tokens.shape[0] // prompts.tokens.shape[0], axis=0)
  mask = jnp.concatenate([repeat(prompts.mask), samples.mask], axis=1)
  return Sequences(
      tokens=jnp.concatenate([repeat(prompts.tokens), samples.tokens], axis=1),
      positions=prompt_positions(mask),
      segment_ids=mask.astype(jnp.int32),
      loss_mask=jnp.concatenate([repeat(jnp.zeros_like(prompts.mask)), samples.mask], axis=1).astype(jnp.float32))
