"""How near the train step and the decoder come to what the machine can do, as ratios.

  python scripts/benchmark.py [--embed=256 --layers=6 --batch=8 --length=128 …]

Training: 6 × parameters (without the embedding where it is only looked up) + attention FLOPs per token, over the best
float32 matrix product of this machine. Decoding: bytes of parameters read per step over the bandwidth of a large
matrix-vector product. Medians of several runs; other work on the machine lowers them.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rlhf_jax.generation import sampler
from rlhf_jax.models import transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages.shared import supervised
from rlhf_jax.types import Prompts, Sequences


def seconds(function, repeats=5):
  """Median time of a call, after one that compiles."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def limits(dtype):
  """(FLOP/s of a matrix product, bytes/s of a matrix-vector product)."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  a = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  wide = jnp.ones((4 * size, size), dtype)
  vector = jax.jit(lambda w, x: w @ x)
  return (2 * size**3 / seconds(lambda: product(a)), wide.nbytes / seconds(lambda: vector(wide, a[0]), 20))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, value in dict(vocab_size=4096, embed=256, layers=6, heads=4, kv_heads=4, mlp=704, batch=8, length=128,
                          prompt=64, response=64, samples=1).items():
    parser.add_argument(f'--{name}', type=int, default=value, help='default %(default)s')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  o = parser.parse_args()
  config = transformer.ModelConfig(o.vocab_size, o.embed, o.layers, o.heads, o.kv_heads, o.embed // o.heads, o.mlp,
                                   dtype=o.dtype)
  layout = mesh.make_layout(mesh.DEFAULTS)
  model = transformer.build_model(config, layout)
  params = jax.jit(model.init)(jax.random.key(0))
  flops, bandwidth = limits(o.dtype)
  count = transformer.parameter_count(model)
  print(f'{jax.devices()[0].device_kind}: {count / 1e6:.1f}M parameters, matrix product {flops / 1e9:.0f} GFLOP/s, '
        f'matrix-vector {bandwidth / 1e9:.1f} GB/s')

  optimizer = steps.make_optimizer(ml_collections.ConfigDict(steps.OPTIMIZER), 100)
  state = steps.create_train_state(jax.device_put(params, layout.shardings(model.axes, params)), optimizer, jax.random.key(0),
                           layout)
  step = steps.build(supervised.build_loss(model), optimizer, layout)
  ones = np.ones((o.batch, o.length), np.int32)
  batch = Sequences(ones, np.arange(o.length, dtype=np.int32) * ones, ones, ones.astype(np.float32))
  keep = {'state': state}

  def train():
    keep['state'], metrics = step(keep['state'], batch)
    return metrics
  taken = seconds(train)
  per_token = 6 * count + 6 * o.layers * o.heads * (o.embed // o.heads) * o.length  # causal half of 12·L·H·C·T
  done = per_token * o.batch * o.length / taken
  print(f'train: {o.batch * o.length / taken:,.0f} tokens/s, {done / 1e9:.1f} GFLOP/s = {done / flops:.0%} of the product')

  sampling = ml_collections.ConfigDict({**sampler.DEFAULTS, 'max_new_tokens': o.response})
  generate = sampler.build_sampler(model, sampling, (), 0, o.samples)
  prompts = Prompts(jnp.ones((o.batch, o.prompt), jnp.int32), jnp.ones((o.batch, o.prompt), bool), jnp.arange(o.batch))
  taken = seconds(lambda: generate(keep['state'].params, prompts, jax.random.key(1)))
  rate = o.response * count * jnp.dtype(o.dtype).itemsize / taken
  print(f'generate: {o.batch * o.samples * o.response / taken:,.0f} new tokens/s, parameters read at '
        f'{rate / 1e9:.1f} GB/s = {rate / bandwidth:.0%} of the matrix-vector product')


if __name__ == '__main__':
  main()
