"""Measures the processor time of exact numerics beside fast ones, at the quickstart's sizes.

  python scripts/measure_exact.py

Prints for each: a rollout of 64 prompts of 8 to 30 tokens with 32 new tokens each, the forward
pass over these rows, and its gradient; and whole steps of PPO (128 prompts, rollout, scores
of a reward model with likelihood, four updates from packed rows) and of GRPO (16 prompts, four
responses each, the same scores, one update), whose responses are cut to 6 to 24 tokens before
they are scored, as the quickstart's models end theirs. Fast and exact take turns; medians.
"""

import argparse
import functools
import resource
import statistics
import types

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import testing
from rlhf_jax.generation import sampler
from rlhf_jax.models import heads, transformer
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.runtime import mesh
from rlhf_jax.stages import policy_gradient, ppo, reward
from rlhf_jax.stages.shared import off_policy, rollout, training
from rlhf_jax.types import Prompts

P, R, V = 30, 32, 1536
SIZES = dict(vocab_size=V, embed=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384)
SAMPLING = sampler.SamplingOptions(max_new_tokens=R)
KINDS = ('fast', 'exact')


def processor_seconds():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def make_prompts(rows):
  rng = np.random.default_rng(0)
  mask = np.arange(P) >= P - rng.integers(8, P + 1, rows)[:, None]
  tokens = jnp.asarray(rng.integers(2, V, (rows, P)) * mask, jnp.int32)
  return Prompts(tokens, jnp.asarray(mask), jnp.arange(rows))


def prepare_parts(numerics):
  """Returns {name: a function of no arguments} of rollout, forward and backward pass."""
  prompts = make_prompts(64)
  model = transformer.build_model(ModelConfig(**SIZES, numerics=numerics))
  params = jax.jit(model.init)(jax.random.key(0))
  generate = sampler.build_sampler(model, SAMPLING, (), 0)
  rows = sampler.join_sequences(prompts, generate(params, prompts, jax.random.key(1)))

  def loss(params):
    hidden, _ = model.apply(params, rows.tokens, rows.positions, rows.segment_ids)
    logprobs, _ = heads.token_logprobs(model, params, hidden[:, P - 1 : -1], rows.tokens[:, P:])
    return jnp.sum(logprobs)

  return {
    'rollout': functools.partial(generate, params, prompts, jax.random.key(2)),
    'forward': functools.partial(jax.jit(loss), params),
    'gradient': functools.partial(jax.jit(jax.grad(loss)), params),
  }


def cut_responses(samples):
  """Ends responses where those of a trained policy would end: after 6 to 24 tokens."""
  lengths = np.random.default_rng(1).integers(6, 25, samples.tokens.shape[0])
  mask = jnp.asarray(np.arange(R) < lengths[:, None])
  return samples.replace(
    mask=mask,
    tokens=jnp.where(mask, samples.tokens, 0),
    logprobs=jnp.where(mask, samples.logprobs, 0.0),
    ended=jnp.ones(len(lengths), bool),
  )


def prepare_step(definitions, train_step, options, state, reward_model, rows):
  """Returns a function of no arguments that makes a whole step: rollout, scores, update."""
  model, layout = definitions.model, definitions.layout
  prompts = make_prompts(rows)
  generate = sampler.build_sampler(model, SAMPLING, (), 0, options.num_samples)
  update = training.compile_train_step(train_step, definitions, options, donate=False)
  how = types.SimpleNamespace(parts=options.parts, packed_rows=options.packed_rows)
  score = reward.build_score(reward_model, layout, how)
  reward_params = testing.make_params(reward_model, layout)
  reference = testing.make_params(model, layout, seed=5)

  def make_step():
    samples = cut_responses(generate(state.params, prompts, jax.random.key(2)))
    scores = score(reward_params, prompts, samples)
    return update(state, testing.score_samples(prompts, samples, scores), reference)

  return make_step


def prepare_steps(numerics):
  """Returns {name: a function that makes a whole step} of PPO and GRPO."""
  layout = mesh.make_layout(mesh.MeshOptions(), jax.devices()[:1])
  # Models with a scalar head stay fast, as in every run.
  headed = ModelConfig(**SIZES, head=True)
  reward_model = transformer.build_model(
    ModelConfig(**SIZES, head=True, likelihood_head=True), layout
  )
  model = transformer.build_model(ModelConfig(**SIZES, numerics=numerics), layout)
  common = dict(
    model=model, reference_model=model, optimizer=testing.make_optimizer(), layout=layout
  )
  definitions = ppo.Definitions(**common, value_model=transformer.build_model(headed, layout))
  options = ppo.Options(batch_size=128, epochs=1, minibatches=4, packed_rows=8, sampling=SAMPLING)
  state = testing.make_ppo_state(definitions, options)
  ppo_step = prepare_step(definitions, ppo.train_step, options, state, reward_model, 128)

  definitions = rollout.RolloutDefinitions(**common)
  options = policy_gradient.Options(
    batch_size=16,
    num_samples=4,
    advantage='standardised',
    reduce='sequence_mean',
    kl_place='loss',
    kl_coefficient=0.25,
    sampling=SAMPLING,
  )
  state = testing.make_state(definitions)
  state = off_policy.SamplerState(**vars(state), sampler_trained={})
  grpo_step = prepare_step(
    definitions, policy_gradient.train_step, options, state, reward_model, 16
  )
  return {'PPO step': ppo_step, 'GRPO step': grpo_step}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--turns', type=int, default=9)
  turns = parser.parse_args().turns
  functions = {kind: prepare_parts(kind) | prepare_steps(kind) for kind in KINDS}
  for name in functions['fast']:
    times = {kind: [] for kind in KINDS}
    for turn in range(turns + 1):
      for kind in KINDS:
        before = processor_seconds()
        jax.block_until_ready(functions[kind][name]())
        if turn:  # the first one compiles
          times[kind].append(processor_seconds() - before)
    fast, exact = (1e3 * statistics.median(times[kind]) for kind in KINDS)
    print(f'{name}: fast {fast:.0f} ms, exact {exact:.0f} ms ({exact / fast:.2f})', flush=True)


if __name__ == '__main__':
  main()
