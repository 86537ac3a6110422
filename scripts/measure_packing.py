"""Measures what packed rows save at the quickstart's sizes.

  python scripts/measure_packing.py --packed-rows 0 4 8

Texts of made-up tokens, of which as many places of the padded rows are padding as in the
quickstart's PPO (53%): prompts of 8 to 20 tokens and responses of 6 to 24 in rows of 30
and 32 places. Printed is the processor time, the median of several calls: of scoring 128
responses by the reward model; of PPO's update from them, in four minibatches, with the
passes before it; of DPO's update from eight rankings of eight responses, with its reference; and
of a reward model's from the same rankings, with likelihoods. The responses of a ranking answer one
prompt, which packed rows hold once; those that are scored and PPO's have prompts of their own.

`ideal` is what the same numbers of tokens cost where nothing is padding: in fewer rows, all of
them full and not packed.

With --large only PPO's update is measured, from 1,024 responses of geometric lengths, a quarter of
the maximum on average, in two minibatches.
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


def full_lengths(rows):
  return np.full((rows, 1), P), np.full((rows, 1), R)


def geometric_lengths(rows):
  rng = np.random.default_rng(0)
  said = np.minimum(R, rng.geometric(4 / R, rows))
  return rng.integers(8, 21, rows)[:, None], said[:, None]


def real_share(rows, full_rows, draw=draw_lengths):
  """Returns the tokens of ragged rows over the places of full ones."""
  return sum(int(lengths.sum()) for lengths in draw(rows)) / (full_rows * (P + R))


def make_rollout(rows, draw):
  rng = np.random.default_rng(1)
  asked, said = draw(rows)
  prompt_mask, mask = np.arange(P) >= P - asked, np.arange(R) < said
  tokens = rng.integers(2, SIZES['vocab_size'], (rows, P + R)).astype(np.int32)
  index = np.arange(rows, dtype=np.int32)
  prompts = Prompts(np.where(prompt_mask, tokens[:, :P], 0), prompt_mask, index)
  logprobs = np.where(mask, -4.0, 0.0).astype(np.float32)
  samples = Samples(np.where(mask, tokens[:, P:], 0), mask, logprobs, np.ones(rows, bool))
  return prompts, samples, rng.normal(size=rows).astype(np.float32)


def make_rankings(rows, places, draw):
  rng = np.random.default_rng(1)
  asked, said = (x.reshape(rows, places, 1) for x in draw(rows * places))
  asked[:] = asked[:, :1]  # of one prompt
  inside = np.arange(P + R) < asked + said
  shape = (rows, places)
  tokens = rng.integers(2, SIZES['vocab_size'], inside.shape)
  tokens = np.where(np.arange(P + R) < asked, tokens[:, :1], tokens)
  return Rankings(
    tokens=np.where(inside, tokens, 0).astype(np.int32),
    positions=np.where(inside, np.arange(P + R), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=np.ones(shape, np.int32),
    ranks=np.tile(np.arange(1, places + 1, dtype=np.int32), (rows, 1)),
    index=np.zeros(shape, np.int32),
    begins=asked[..., 0].astype(np.int32),
    confidence=np.ones(shape, np.float32),
    reference_logprobs=np.zeros(shape, np.float32),
  )


def measure_score(layout, packed_rows, turns, rows=128, draw=draw_lengths):
  config = transformer.ModelConfig(**SIZES, head=True, likelihood_head=True)
  model = transformer.build_model(config, layout)
  options = types.SimpleNamespace(parts=1, packed_rows=packed_rows)
  score = reward.build_score(model, layout, options)
  prompts, samples, _ = layout.place(make_rollout(rows, draw))
  params = testing.make_params(model, layout)
  return measure(functools.partial(score, params, prompts, samples), turns)[1]


def measure_ppo(layout, packed_rows, turns, rows=128, draw=draw_lengths, minibatches=4):
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
    epochs=1, minibatches=minibatches, packed_rows=packed_rows, sampling=SamplingOptions(R)
  )
  step = training.compile_train_step(ppo.train_step, definitions, options, donate=False)
  state = testing.make_ppo_state(definitions, options)
  scored = testing.score_samples(*layout.place(make_rollout(rows, draw)))
  reference = testing.make_params(model, layout, seed=5)
  (_, metrics), milliseconds = measure(functools.partial(step, state, scored, reference), turns)
  return milliseconds, metrics.get('packed/padding_share', 1 - real_share(rows, rows, draw))


def measure_dpo(layout, packed_rows, turns, rows=8, draw=draw_lengths):
  model = transformer.build_model(transformer.ModelConfig(**SIZES), layout)
  definitions = training.Definitions(model, testing.make_optimizer(), layout)
  options = preference.Options(packed_rows=packed_rows, max_length=P + R)
  step = training.compile_train_step(preference.train_step, definitions, options, donate=False)
  logprobs = preference.build_logprobs(model, layout, options)
  state, reference = testing.make_state(definitions), testing.make_params(model, layout, seed=5)
  batch = layout.place(make_rankings(rows, 8, draw))
  _, reading = measure(functools.partial(logprobs, reference, batch), turns)
  (_, metrics), milliseconds = measure(functools.partial(step, state, batch), turns)
  unpacked = 1 - real_share(8 * rows, 8 * rows)
  return reading, milliseconds, metrics.get('packed/padding_share', unpacked)


def measure_reward(layout, packed_rows, turns, rows=8, draw=draw_lengths):
  config = transformer.ModelConfig(**SIZES, head=True, likelihood_head=True)
  model = transformer.build_model(config, layout)
  definitions = training.Definitions(model, testing.make_optimizer(), layout)
  options = reward.Options(
    packed_rows=packed_rows, max_length=P + R, likelihood=True, language_model_coefficient=0.5
  )
  step = training.compile_train_step(reward.train_step, definitions, options, donate=False)
  state = testing.make_state(definitions)
  batch = layout.place(make_rankings(rows, 8, draw))
  return measure(functools.partial(step, state, batch), turns)[1]


def say(name, score, ppo_result, dpo_result, reward_update):
  ppo_update, ppo_padding = ppo_result
  reading, dpo_update, dpo_padding = dpo_result
  print(
    f'{name}: score {score:.0f} ms; PPO {ppo_update:.0f} ms, {float(ppo_padding):.1%} padding; '
    f'DPO reference {reading:.0f} ms, update {dpo_update:.0f} ms, {float(dpo_padding):.1%} '
    'padding; '
    f'reward update {reward_update:.0f} ms',
    flush=True,
  )


def measure_ideal(layout, turns):
  """Measures full rows, nearly as many tokens, and says what exactly as many would cost."""
  how = (layout, 0, turns)
  share = real_share(128, 64)
  score = share * measure_score(*how, 64, full_lengths)
  update = share * measure_ppo(*how, 64, full_lengths)[0]
  share = real_share(64, 32)
  dpo = [share * x for x in measure_dpo(*how, 4, full_lengths)[:2]]
  reward_update = share * measure_reward(*how, 4, full_lengths)
  say('ideal', score, (update, 0.0), (*dpo, 0.0), reward_update)


def measure_large(layout, packed_rows, turns):
  """Measures PPO's update from many responses of geometric lengths, padded, packed and ideal."""
  for number in packed_rows:
    update, padding = measure_ppo(layout, number, turns, 1024, geometric_lengths, 2)
    print(f'packed_rows {number}: {update:.0f} ms, {float(padding):.1%} padding', flush=True)
  share = real_share(1024, 256, geometric_lengths)
  update, _ = measure_ppo(layout, 0, turns, 256, full_lengths, 2)
  print(f'ideal: {share * update:.0f} ms')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--packed-rows', type=int, nargs='+', default=[0, 4, 8])
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--large', action='store_true')
  arguments = parser.parse_args()
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  if arguments.large:
    measure_large(layout, arguments.packed_rows, arguments.turns)
    return
  for packed_rows in arguments.packed_rows:
    how = (layout, packed_rows, arguments.turns)
    score = measure_score(*how)
    ppo_result = measure_ppo(*how)
    # A chunk must hold the eight responses of a ranking.
    reads = (layout, packed_rows and max(packed_rows, 8), arguments.turns)
    results = (measure_dpo(*reads), measure_reward(*reads))
    say(f'packed_rows {packed_rows}', score, ppo_result, *results)
  measure_ideal(layout, arguments.turns)


if __name__ == '__main__':
  main()
