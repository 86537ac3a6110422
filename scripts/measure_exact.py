"""Measures the processor time of exact numerics beside fast ones, at the quickstart's sizes.

  python scripts/measure_exact.py

Prints for each: a rollout of 64 prompts of 8 to 30 tokens with 32 new tokens each, the forward
pass over these rows, and its gradient; medians of several.
"""

import argparse
import resource
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import Prompts

B, P, R, V = 64, 30, 32, 1536
SIZES = dict(vocab_size=V, embed=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384)
TURNS = 9


def processor_milliseconds(function):
  """Returns the median processor time of a call, after a first one that compiles."""
  jax.block_until_ready(function())
  times = []
  for _ in range(TURNS):
    before = resource.getrusage(resource.RUSAGE_SELF)
    jax.block_until_ready(function())
    after = resource.getrusage(resource.RUSAGE_SELF)
    times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
  return 1e3 * statistics.median(times)


def measure(numerics):
  rng = np.random.default_rng(0)
  mask = np.arange(P) >= P - rng.integers(8, P + 1, B)[:, None]
  tokens = jnp.asarray(rng.integers(2, V, (B, P)) * mask, jnp.int32)
  prompts = Prompts(tokens, jnp.asarray(mask), jnp.arange(B))
  model = transformer.build_model(ModelConfig(**SIZES, numerics=numerics))
  params = jax.jit(model.init)(jax.random.key(0))
  generate = sampler.build_sampler(model, sampler.SamplingOptions(max_new_tokens=R), (), 0)
  rows = sampler.join_sequences(prompts, generate(params, prompts, jax.random.key(1)))

  def loss(params):
    hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
    logprobs, _ = heads.token_logprobs(model, params, hidden[:, P - 1 : -1], rows.tokens[:, P:])
    return jnp.sum(logprobs)

  forward, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
  return {
    'rollout': processor_milliseconds(lambda: generate(params, prompts, jax.random.key(2))),
    'forward': processor_milliseconds(lambda: forward(params)),
    'gradient': processor_milliseconds(lambda: gradient(params)),
  }


if __name__ == '__main__':
  argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  ).parse_args()
  fast, exact = measure('fast'), measure('exact')
  for name, time in fast.items():
    print(f'{name}: fast {time:.0f} ms, exact {exact[name]:.0f} ms ({exact[name] / time:.2f})')
