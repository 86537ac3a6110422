"""Makes four steps of small runs with exact numerics; prints policy/sampler_gap of each as JSON.

  python tests/stages/exact_steps.py CASE …

A program of its own, as tests compile without the optimisations that change bits.
"""

import json
import sys

import jax
import jax.numpy as jnp

from rlhf_jax import testing
from rlhf_jax.generation import sampler
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import policy_gradient, ppo
from rlhf_jax.stages.shared import off_policy, rollout, training

SAMPLING = sampler.SamplingOptions(max_new_tokens=24, temperature=0.8)
CASES = {  # fields of the model
  'ppo': {},
  'ppo packed': {},
  'grpo': {},
  'grpo lora': dict(lora_rank=4, lora_targets=('query', 'down')),
  'grpo experts': dict(experts=4, experts_per_token=2),
}


def make_run(name):
  """Returns (definitions, step, state, responses to each prompt)."""
  model, layout = testing.make_model(numerics='exact', **CASES[name]), testing.make_layout()
  parts = dict(
    model=model, reference_model=model, optimizer=testing.make_optimizer(), layout=layout
  )
  params = testing.make_params(model)
  if name.startswith('ppo'):
    definitions = ppo.Definitions(**parts, value_model=model)
    packed_rows = 2 if name == 'ppo packed' else 0
    options = ppo.Options(sampling=SAMPLING, epochs=1, packed_rows=packed_rows)
    value = testing.make_params(model, seed=2)
    state = ppo.create_state(params, value, definitions, jax.random.key(1), options)
    return definitions, training.compile_train_step(ppo.train_step, definitions, options), state, 1
  definitions = rollout.RolloutDefinitions(**parts)
  options = policy_gradient.Options(sampling=SAMPLING, num_samples=2)
  state = steps.create_train_state(params, parts['optimizer'], jax.random.key(1), layout)
  state = off_policy.SamplerState(**vars(state), sampler_trained={})
  step = training.compile_train_step(policy_gradient.train_step, definitions, options)
  return definitions, step, state, 2


def run(name):
  definitions, step, state, samples = make_run(name)
  model = definitions.model
  reference = jax.tree.map(jnp.copy, state.params)
  generate = sampler.build_sampler(model, SAMPLING, (testing.EOS_ID,), testing.PAD_ID, samples)
  gaps, first = [], jax.device_get(jax.tree.leaves(state.trained)[0])
  for number in range(4):
    prompts = jax.tree.map(jnp.asarray, testing.make_prompts(8, 7, number))
    responses = generate(state.params, prompts, jax.random.key(number))
    scores = jnp.mean(responses.tokens < 32, axis=1)
    scored = testing.score_samples(prompts, responses, scores)
    state, metrics = step(state, scored, reference)
    gaps.append(float(metrics['policy/sampler_gap']))
  change = abs(jax.device_get(jax.tree.leaves(state.trained)[0]) - first).max()
  return {'case': name, 'gaps': gaps, 'change': float(change)}


if __name__ == '__main__':
  for name in sys.argv[1:]:
    print(json.dumps(run(name)), flush=True)
