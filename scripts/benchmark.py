"""Measures the speed of the train step and of the decoder, relative to the limits of the machine.

  python scripts/benchmark.py [--embed=256 --layers=6 --batch=8 --length=128 …]

Training: the FLOP/s (6 × parameters for each token, plus attention) as a share of those of a large
matrix product. Decoding: the bytes of parameters read per second, as a share of the bandwidth of a
large matrix-vector product. Times are medians of several runs; other work on the machine makes them
longer.
"""

import argparse
from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.transformer import Model
from rlhf_jax.runtime import mesh, optimizers
from rlhf_jax.runtime import step as steps
from rlhf_jax.runtime.mesh import Layout, MeshOptions
from rlhf_jax.runtime.optimizers import OptimizerOptions
from rlhf_jax.stages import sft
from rlhf_jax.stages.shared import training
from rlhf_jax.types import Params, Prompts, Sequences

SIZES = dict(
  vocab_size=4096,
  embed=256,
  layers=6,
  heads=4,
  kv_heads=4,
  mlp=704,
  batch=8,
  length=128,
  prompt=64,
  response=64,
  samples=1,
)


def main() -> None:
  """Measures, and prints three lines."""
  sizes = parse_arguments()
  layout = mesh.make_layout(MeshOptions())
  model = make_model(sizes, layout)
  flops, bandwidth = measure_limits(sizes.dtype)
  count = transformer.parameter_count(model)
  print(
    f'{jax.devices()[0].device_kind}: {count / 1e6:.1f}M parameters, '
    f'matrix product {flops / 1e9:.0f} GFLOP/s, matrix-vector {bandwidth / 1e9:.1f} GB/s'
  )

  seconds, params = time_training(sizes, model, layout)
  tokens = sizes.batch * sizes.length
  # For each token 12 · layers · heads · head_dim · length, halved by the causal mask.
  attention_flops = 6 * sizes.layers * sizes.embed * sizes.length
  achieved = (6 * count + attention_flops) * tokens / seconds
  print(
    f'train: {tokens / seconds:,.0f} tokens/s, {achieved / 1e9:.1f} GFLOP/s '
    f'= {achieved / flops:.0%} of the matrix product'
  )

  seconds = time_generation(sizes, model, params)
  new_tokens = sizes.batch * sizes.samples * sizes.response
  read = sizes.response * count * jnp.dtype(sizes.dtype).itemsize / seconds
  print(
    f'generate: {new_tokens / seconds:,.0f} new tokens/s, parameters read at '
    f'{read / 1e9:.1f} GB/s = {read / bandwidth:.0%} of the matrix-vector product'
  )


def parse_arguments() -> argparse.Namespace:
  """Parses the command line: the sizes of the model and of the batches."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for name, value in SIZES.items():
    parser.add_argument(f'--{name}', type=int, default=value, help='default %(default)s')
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  return parser.parse_args()


def make_model(sizes: argparse.Namespace, layout: Layout) -> Model:
  """Makes the definition of the model that is measured."""
  config = ModelConfig(
    vocab_size=sizes.vocab_size,
    embed=sizes.embed,
    layers=sizes.layers,
    heads=sizes.heads,
    kv_heads=sizes.kv_heads,
    head_dim=sizes.embed // sizes.heads,
    mlp=sizes.mlp,
    dtype=sizes.dtype,
  )
  return transformer.build_model(config, layout)


def measure_limits(dtype: str) -> tuple[float, float]:
  """Measures the machine: (FLOP/s of a matrix product, bytes/s of a matrix-vector product)."""
  size = 2048 if jax.default_backend() == 'cpu' else 8192
  square = jnp.ones((size, size), dtype)
  wide = jnp.ones((4 * size, size), dtype)
  multiply = jax.jit(jnp.matmul)
  product_seconds = median_seconds(lambda: multiply(square, square))
  vector_seconds = median_seconds(lambda: multiply(wide, square[0]), repeats=20)
  return 2 * size**3 / product_seconds, wide.nbytes / vector_seconds


def time_training(
  sizes: argparse.Namespace,
  model: Model,
  layout: Layout,
) -> tuple[float, Params]:
  """Times a train step of SFT; returns its seconds and the trained parameters."""
  optimizer = optimizers.make_optimizer(OptimizerOptions(), updates=100)
  definitions = training.Definitions(model=model, optimizer=optimizer, layout=layout)
  train_step = training.compile_train_step(sft.train_step, definitions, sft.Options())
  params = jax.jit(model.init)(jax.random.key(0))
  params = jax.device_put(params, layout.shardings(model.axes, params))
  state = steps.create_train_state(params, optimizer, jax.random.key(0), layout)
  ones = np.ones((sizes.batch, sizes.length), np.int32)
  batch = Sequences(
    tokens=ones,
    positions=np.arange(sizes.length, dtype=np.int32) * ones,
    segment_ids=ones,
    loss_mask=ones.astype(np.float32),
  )

  def train() -> dict[str, jax.Array]:
    nonlocal state  # each step donates the state before it
    state, metrics = train_step(state, batch)
    return metrics

  seconds = median_seconds(train)
  return seconds, state.params


def time_generation(sizes: argparse.Namespace, model: Model, params: Params) -> float:
  """Times the generation of responses, all of which have the maximum length."""
  generate = sampler.build_sampler(
    model,
    SamplingOptions(max_new_tokens=sizes.response),
    (),  # no stop token
    0,
    sizes.samples,
  )
  prompts = Prompts(
    tokens=jnp.ones((sizes.batch, sizes.prompt), jnp.int32),
    mask=jnp.ones((sizes.batch, sizes.prompt), bool),
    index=jnp.arange(sizes.batch),
  )
  return median_seconds(lambda: generate(params, prompts, jax.random.key(1)))


def median_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
  """Returns the median time of a call, after a first call that compiles."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - began)
  return float(np.median(times))


if __name__ == '__main__':
  main()
