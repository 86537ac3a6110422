"""Measures what packed rows save at the quickstart's sizes.

  python scripts/measure_packing.py --packed-rows 0 8

Texts of made-up tokens, of which as many places of the padded rows are padding as in the
quickstart's PPO (53%): prompts of 8 to 20 tokens and responses of 6 to 24 in rows of 30
and 32 places. Printed is the processor time, the median of several calls: of scoring 128
responses by the reward model; of PPO's update from them, in four minibatches, with the
passes before it; and of DPO's update from 16 rows of four responses, with its reference.
"""

import argparse
import functools
import resource
import statistics
import types

import jax
import numpy as np

from rlhf_jax import testing
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.models import transformer
from rlhf_jax.runtime import mesh
from rlhf_jax.stages import ppo, preference, reward
from rlhf_jax.stages.shared import training
from rlhf_jax.types import Prompts, Rankings, Samples

SIZES = dict(
  vocab_size=1536, embed=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384, max_length=96
)
P, R = 30, 32


def processor_seconds():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def measure(function, turns):
  """Returns (the last result, the median of processor milliseconds of a call)."""
  result = jax.block_until_ready(function())  # compiles
  milliseconds = []
  for _ in range(turns):
    before = processor_seconds()
    result = jax.block_until_ready(function())
    milliseconds.append(1e3 * (processor_seconds() - before))
  return result, statistics.median(milliseconds)


def draw_lengths(rows):
  rng = np.random.default_rng(0)
  return rng.integers(8, 21, rows)[:, None], rng.integers(6, 25, rows)[:, None]


def make_rollout(rows):
  rng = np.random.default_rng(1)
  asked, said = draw_lengths(rows)
  prompt_mask, mask = np.arange(P) >= P - asked, np.arange(R) < said
  tokens = rng.integers(2, SIZES['vocab_size'], (rows, P + R)).astype(np.int32)
  index = np.arange(rows, dtype=np.int32)
  prompts = Prompts(np.where(prompt_mask, tokens[:, :P], 0), prompt_mask, index)
  logprobs = np.where(mask, -4.0, 0.0).astype(np.float32)
  samples = Samples(np.where(mask, tokens[:, P:], 0), mask, logprobs, np.ones(rows, bool))
  return prompts, samples, rng.normal(size=rows).astype(np.float32)


def make_rankings(rows, places):
  rng = np.random.default_rng(1)
  asked, said = (x.reshape(rows, places, 1) for x in draw_lengths(rows * places))
  inside = np.arange(P + R) < asked + said
  shape = (rows, places)
  return Rankings(
    tokens=np.where(inside, rng.integers(2, SIZES['vocab_size'], inside.shape), 0).astype(np.int32),
    positions=np.where(inside, np.arange(P + R), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=np.ones(shape, np.int32),
    ranks=np.tile(np.arange(1, places + 1, dtype=np.int32), (rows, 1)),
    index=np.zeros(shape, np.int32),
    begins=asked[..., 0].astype(np.int32),
    confidence=np.ones(shape, np.float32),
    reference_logprobs=np.zeros(shape, np.float32),
  )


def measure_score(layout, packed_rows, turns):
  config = transformer.ModelConfig(**SIZES, head=True, likelihood_head=True)
  model = transformer.build_model(config, layout)
  options = types.SimpleNamespace(parts=1, packed_rows=packed_rows)
  score = reward.build_score(model, layout, options)
  prompts, samples, _ = layout.place(make_rollout(128))
  params = testing.make_params(model, layout)
  return measure(functools.partial(score, params, prompts, samples), turns)[1]


def measure_ppo(layout, packed_rows, turns):
  model = transformer.build_model(transformer.ModelConfig(**SIZES), layout)
  headed = transformer.build_model(transformer.ModelConfig(**SIZES, head=True), layout)
  definitions = ppo.Definitions(
    model=model,
    value_model=headed,
    reference_model=model,
    optimizer=testing.make_optimizer(),
    layout=layout,
  )
  options = ppo.Options(
    epochs=1, minibatches=4, packed_rows=packed_rows, sampling=SamplingOptions(R)
  )
  step = training.compile_train_step(ppo.train_step, definitions, options, donate=False)
  state = testing.make_ppo_state(definitions, options)
  scored = testing.score_samples(*layout.place(make_rollout(128)))
  reference = testing.make_params(model, layout, seed=5)
  (_, metrics), milliseconds = measure(functools.partial(step, state, scored, reference), turns)
  return milliseconds, metrics.get('packed/padding_share')


def measure_dpo(layout, packed_rows, turns):
  model = transformer.build_model(transformer.ModelConfig(**SIZES), layout)
  definitions = training.Definitions(model, testing.make_optimizer(), layout)
  options = preference.Options(packed_rows=packed_rows, max_length=P + R)
  step = training.compile_train_step(preference.train_step, definitions, options, donate=False)
  logprobs = preference.build_logprobs(model, layout, options)
  state, reference = testing.make_state(definitions), testing.make_params(model, layout, seed=5)
  batch = layout.place(make_rankings(16, 4))
  _, reading = measure(functools.partial(logprobs, reference, batch), turns)
  (_, metrics), milliseconds = measure(functools.partial(step, state, batch), turns)
  return reading, milliseconds, metrics.get('packed/padding_share')


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--packed-rows', type=int, nargs='+', default=[0, 8])
  parser.add_argument('--turns', type=int, default=5)
  arguments = parser.parse_args()
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  for packed_rows in arguments.packed_rows:
    how = (layout, packed_rows, arguments.turns)
    score = measure_score(*how)
    ppo_update, ppo_padding = measure_ppo(*how)
    reading, dpo_update, dpo_padding = measure_dpo(*how)
    shares = [0.53 if share is None else float(share) for share in (ppo_padding, dpo_padding)]
    print(
      f'packed_rows {packed_rows}: score {score:.0f} ms; PPO {ppo_update:.0f} ms, '
      f'{shares[0]:.0%} padding; DPO reference {reading:.0f} ms, update {dpo_update:.0f} ms, '
      f'{shares[1]:.0%} padding',
      flush=True,
    )


if __name__ == '__main__':
  main()
