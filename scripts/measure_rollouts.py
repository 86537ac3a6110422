"""Measures rollouts whose responses end at different lengths: what they cost per token.

  python scripts/measure_rollouts.py --slots 64 --rows 512 --mean 32

Responses end by chance, so that their lengths are geometric with this mean, in a model of the
shape `tiny` of scripts/benchmark.py or, with `--model gpu`, one for an accelerator. Each line of
JSON is a rollout:

  equal      every response has the mean length, all of them at once
  equal, S   the same in slots
  all, 4     ragged responses of at most 4 times the mean, all at once
  S, 4       the same in slots
  S, 8       a maximum of 8 times the mean, which hardly any response reaches
  S, 32      a maximum of 32 times the mean

`ratio` is the time of a token relative to `equal` or `equal, S`, whichever is less; `cache` is the
size of the decoding cache in MiB, `temporary` that of all buffers of the program. Rollouts take
turns, and the median of the turns counts.
"""

import argparse
from collections.abc import Callable
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.types import Prompts

MODELS = {
  'tiny': dict(
    vocab_size=4096,
    embed=256,
    layers=6,
    heads=4,
    kv_heads=4,
    head_dim=64,
    mlp=704,
  ),
  'gpu': dict(  # eight layers of the shape of SmolLM2-360M
    vocab_size=49152,
    embed=960,
    layers=8,
    heads=15,
    kv_heads=5,
    head_dim=64,
    mlp=2560,
    dtype='bfloat16',
  ),
}
PROMPT = 64  # tokens of each prompt

Clock = Callable[[], float]


def make_rollout(
  args: argparse.Namespace,
  params: Any,
  longest: int,
  slots: int,
  is_ragged: bool,
) -> tuple[Callable[[int], Any], dict[str, float]]:
  """Compiles a rollout.

  Args:
    args: the parsed arguments.
    params: the parameters of the model.
    longest: R.
    slots: as in SamplingOptions.
    is_ragged: whether responses end by chance, rather than at R.

  Returns:
    (seed → samples, its sizes of memory in MiB).
  """
  config = transformer.ModelConfig(**MODELS[args.model])
  model = transformer.build_model(config)
  # the model is random and its predictions nearly uniform, so one of every `mean` tokens ends
  stops = tuple(range(1, 1 + config.vocab_size // args.mean)) if is_ragged else ()
  definition = sampler.Definition(
    model=model,
    axes=model.axes,
    options=SamplingOptions(max_new_tokens=longest, slots=slots),
    stop_ids=stops,
    pad_id=0,
    num_samples=args.samples,
    layout=None,
    unroll=True,
  )
  prepared = jax.jit(functools.partial(sampler.prepare_params, definition))(params)
  generate = jax.jit(functools.partial(sampler.generate, definition))
  rng = np.random.default_rng(0)
  shape = (args.rows // args.samples, PROMPT)
  tokens = rng.integers(2, config.vocab_size, shape).astype(np.int32)
  fields: tuple[Any, ...] = (tokens, np.ones(shape, bool), np.arange(shape[0]))
  prompts = jax.device_put(Prompts(*fields))
  compiled = generate.lower(prepared, prompts, jax.random.key(0)).compile()
  cached = (slots or args.rows) * (PROMPT + longest) * config.kv_heads * config.head_dim
  memory: Any = compiled.memory_analysis()
  sizes = dict(
    cache=2 * jnp.dtype(config.dtype).itemsize * config.layers * cached / 2**20,
    temporary=memory.temp_size_in_bytes / 2**20,
  )
  return lambda seed: compiled(prepared, prompts, jax.random.key(seed)), sizes


def measure(rollout: Callable[[int], Any], seed: int, clock: Clock) -> tuple[float, int]:
  """Returns the seconds of a rollout, and its tokens."""
  began = clock()
  samples = jax.block_until_ready(rollout(seed))
  seconds = clock() - began
  return seconds, int(samples.mask.sum())


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--model', default='tiny', choices=MODELS, help='the shape of the model')
  add('--rows', type=int, default=512, help='responses of a rollout')
  add('--samples', type=int, default=8, help='responses to each prompt')
  add('--slots', type=int, default=64, help='responses decoded at a time')
  add('--mean', type=int, default=32, help='mean length of responses in tokens')
  add('--turns', type=int, default=3, help='times that each rollout is measured')
  add('--clock', default='wall', choices=('wall', 'process'), help='what the seconds are of')
  args = parser.parse_args()
  clock = time.perf_counter if args.clock == 'wall' else time.process_time
  config = transformer.ModelConfig(**MODELS[args.model])
  params = transformer.build_model(config).init(jax.random.key(0))
  variants = {
    'equal': (args.mean, 0, False),
    'equal, S': (args.mean, args.slots, False),
    'all, 4': (4 * args.mean, 0, True),
    'S, 4': (4 * args.mean, args.slots, True),
    'S, 8': (8 * args.mean, args.slots, True),
    'S, 32': (32 * args.mean, args.slots, True),
  }
  rollouts = {name: make_rollout(args, params, *values) for name, values in variants.items()}
  turns: dict[str, list[float]] = {name: [] for name in variants}
  tokens: dict[str, int] = {}
  for turn in range(args.turns + 1):
    for name, (rollout, _) in rollouts.items():
      seconds, tokens[name] = measure(rollout, 1, clock)
      if turn:  # the first one warms up
        turns[name].append(seconds / tokens[name])
  per_token = {name: statistics.median(values) for name, values in turns.items()}
  ideal = min(per_token['equal'], per_token['equal, S'])
  for name, (_, sizes) in rollouts.items():
    row = dict(
      what=name,
      longest=variants[name][0],
      tokens=tokens[name],
      seconds=per_token[name] * tokens[name],
      ratio=per_token[name] / ideal,
      **sizes,
    )
    rounded = {key: round(x, 4) if key != 'what' else x for key, x in row.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == '__main__':
  main()
