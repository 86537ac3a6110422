"""Compares the bits of the same texts in different programs; prints one JSON for each case.

  python tests/models/exactness.py CASE …

A program of its own, as tests compile without the optimisations that change bits.
"""

import json
import os
import sys

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import testing
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, transformer
from rlhf_jax.stages.shared import packing
from rlhf_jax.types import Prompts

SIZES = dict(vocab_size=97, embed=32, layers=1, heads=4, kv_heads=2, head_dim=8, mlp=48)
CASES = {
  'llama': {},
  'fast': dict(numerics='fast'),
  'gemma': dict(
    layers=2,
    norm='rms_offset',
    post_norm=True,
    activation='gelu_tanh',
    embed_scale=True,
    attention_cap=50.0,
    logit_cap=30.0,
    windows=(9, 0),
    attention_scalar=12.0,
  ),
  'gpt': dict(
    norm='layer',
    activation='gelu',
    gated=False,
    learned_positions=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    heads=3,
    kv_heads=1,
    head_dim=24,
    tied=False,
  ),
  'experts': dict(qk_norm='head', experts=4, experts_per_token=2, pre_norm=True),
  'olmo': dict(pre_norm=False, post_norm=True, qk_norm='all', rope_fraction=0.5),
  'lora': dict(lora_rank=4, lora_targets=('query', 'value', 'down'), kv_heads=1),
}
PROMPT, RESPONSE, SAMPLES = 9, 60, 2
STOPS, PAD = (1,), 0
TEMPERATURE = 0.8  # not a power of 2, so that dividing by it rounds


def make_params(config):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(transformer.build_model(config).init, jax.random.key(0))
  return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), shapes)


def make_prompts():
  rng = np.random.default_rng(1)
  lengths = np.array([9, 1, 6, 4])
  mask = np.arange(PROMPT) >= PROMPT - lengths[:, None]
  tokens = rng.integers(2, SIZES['vocab_size'], mask.shape) * mask
  return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(len(mask)))


def sample(model, params, prompts, layout=None, **options):
  options = sampler.SamplingOptions(RESPONSE, TEMPERATURE, **options)
  generate = sampler.build_sampler(model, options, STOPS, PAD, SAMPLES, layout)
  return generate(params, prompts, jax.random.key(1))


def score(model):
  """Returns (params, sequences) → log-probabilities [B, T − 1] of all tokens but the first."""

  def compute(params, rows):
    hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
    return heads.token_logprobs(model, params, hidden[:, :-1], rows.tokens[:, 1:], TEMPERATURE)[0]

  return compute


def score_in_gradient(model):
  """Returns the same, whose program computes gradients too."""

  def loss(params, rows):
    logprobs = score(model)(params, rows)
    return jnp.sum(logprobs * rows.loss_mask[:, 1:]), logprobs

  return lambda params, rows: jax.grad(loss, has_aux=True)(params, rows)[1]


def compare(name):
  config = transformer.ModelConfig(**{**SIZES, 'numerics': 'exact', **CASES[name]})
  model, params, prompts = transformer.build_model(config), make_params(config), make_prompts()
  samples = sample(model, params, prompts)
  rows = sampler.join_sequences(prompts, samples)
  mask = np.asarray(samples.mask)
  compute = jax.jit(score(model))

  def gap(logprobs, count=None):
    wanted = np.asarray(samples.logprobs)[:count]
    return float(np.abs(np.where(mask[:count], logprobs - wanted, 0)).max())

  def change(function):
    return compute(params, jax.tree.map(function, rows))

  first = PROMPT - 1
  gaps = {
    'training': gap(change(lambda x: x)[:, first:]),
    'gradient': gap(jax.jit(score_in_gradient(model))(params, rows)[:, first:]),
    'alone': gap(change(lambda x: x[:1])[:, first:], 1),
    '64 rows': gap(change(lambda x: jnp.tile(x, (8, 1)))[-8:, first:]),
    'padded': gap(
      change(lambda x: jnp.pad(x, ((0, 0), (11, 30))))[:, first + 11 : first + 11 + RESPONSE]
    ),
    'slots': gap(sample(model, params, prompts, slots=3).logprobs),
  }

  def compute_packed(packed):
    hidden, _ = model.apply(params, *packed_fields(packed.sequences))
    targets = jnp.roll(packed.sequences.tokens, -1, axis=1)
    logprobs, _ = heads.token_logprobs(model, params, hidden, targets, TEMPERATURE)
    return packed.at_responses(logprobs)

  layout = testing.make_layout()
  chunks = packing.open_chunks(rows, RESPONSE, 2, model, layout)
  gaps['packed'] = gap(packing.map_chunks(compute_packed, chunks))
  layout = testing.make_layout('data 4, fsdp 2')
  model = transformer.build_model(config, layout)
  sharded = jax.device_put(params, layout.shardings(model.axes, params))
  gaps['8 devices'] = gap(jax.jit(score(model))(sharded, layout.place(rows))[:, first:])
  return gaps


def packed_fields(rows):
  return rows.tokens, rows.positions, rows.segment_ids


if __name__ == '__main__':
  for name in sys.argv[1:]:
    print(json.dumps({'case': name, **compare(name)}), flush=True)
