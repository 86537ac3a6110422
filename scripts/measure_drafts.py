"""Measures what drafts from earlier responses save in the second epoch of prompts.

  python scripts/measure_drafts.py runs/quickstart/ppo/export --rows 8 --drafts 3

The model responds to the same prompts of TinyWorld twice, with other random numbers.
Printed for the second time, without and with drafts: processor time of a rollout (the
median of several), passes of the model, and whether the responses are the same.
"""

import argparse
import dataclasses
import resource
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data import batches, encode, sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.generation import sampler, speculation
from rlhf_jax.interop import pretrained
from rlhf_jax.models import transformer
from rlhf_jax.runtime import mesh


def processor_seconds():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def measure(generate, turns):
  """Returns (samples, the median of processor seconds)."""
  samples = jax.block_until_ready(generate())
  seconds = []
  for _ in range(turns):
    before = processor_seconds()
    jax.block_until_ready(generate())
    seconds.append(processor_seconds() - before)
  return samples, statistics.median(seconds)


def count_passes(tokens, mask, earlier, drafts):
  """Counts the passes after the first token, which the slowest row decides."""
  rows, R = tokens.shape
  most = 0
  for row in range(rows):
    length, place, passes = int(mask[row].sum()), 1, 0
    while place < length:
      guess = speculation.find_drafts(
        tokens[row : row + 1], jnp.array([place]), earlier[row : row + 1], drafts
      )
      said = jnp.pad(tokens[row], (0, drafts))[None, place : place + drafts]
      place += 1 + int(speculation.count_accepted(guess, said)[0])
      passes += 1
    most = max(most, passes)
  return most


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('model')
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--drafts', type=int, default=3)
  parser.add_argument('--temperature', type=float, default=1.0)
  parser.add_argument('--numerics', default='fast')
  parser.add_argument('--turns', type=int, default=9)
  options = parser.parse_args()
  opened = pretrained.open_pretrained(options.model)
  tokenizer = opened.tokenizer
  config = dataclasses.replace(opened.config, numerics=options.numerics)
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  model = transformer.build_model(config, layout)
  params = jax.device_put(opened.load(), layout.sharding())
  records = sources.load_records(DataOptions(), 'prompt', 'train')[: 4 * options.rows]
  examples = encode.prompts(records, tokenizer, 30, 'drop')[: options.rows]
  prompts = layout.place(next(iter(batches.prompts_once(examples, options.rows))))

  def build(drafts):
    sampling = sampler.SamplingOptions(32, options.temperature, drafts=drafts)
    return sampler.build_sampler(
      model, sampling, tokenizer.stop_ids, tokenizer.pad_id, layout=layout
    )

  plain, drafted = build(0), build(options.drafts)
  earlier = np.asarray(plain(params, prompts, jax.random.key(1)).tokens)
  key = jax.random.key(2)
  wanted, without = measure(lambda: plain(params, prompts, key), options.turns)
  got, seconds = measure(lambda: drafted(params, prompts, key, earlier), options.turns)
  lengths = np.asarray(wanted.mask).sum(1)
  passes = count_passes(wanted.tokens, wanted.mask, jnp.asarray(earlier), options.drafts)
  same = np.array_equal(wanted.tokens, got.tokens)
  bits = np.array_equal(wanted.logprobs, got.logprobs)
  print(
    f'without drafts {1e3 * without:.1f} ms, {lengths.max() - 1} passes; with {options.drafts} '
    f'{1e3 * seconds:.1f} ms, {passes} passes; same tokens {same}, same bits {bits}; '
    f'{lengths.mean():.1f} tokens a response'
  )


if __name__ == '__main__':
  main()
