"""Every kind of step, ten times, on one device, on meshes of eight, and on two processes of four.

The numbers are the same everywhere. Run as a program it is one of the processes: test_meshes.py
ADDRESS PROCESS FILE.
"""

import functools
from pathlib import Path
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.runtime import hosts, mesh
from rlhf_jax.stages import online_preference, policy_gradient, ppo, preference, reward, sft
from rlhf_jax.stages.shared import off_policy, training
from rlhf_jax.stages.shared.rollout import RolloutParts
from rlhf_jax.types import Rankings, Sequences

B, K, P, R, T = 8, 2, 5, 6, 12
KINDS = ('supervised', 'reward', 'preference', 'ppo', 'policy_gradient', 'online_preference')
MESHES = {
  'fsdp 8': 'fsdp 8',
  'tensor': 'data 4, tensor 2',
  'context': 'data 2, context 4',
  'data, fsdp, tensor': 'data 2, fsdp 2, tensor 2',
  'fsdp 8, decoding over 2': 'fsdp 8, rollout_tensor 2',
}
MIXED = 'processes mixed'  # neighbours on an axis are of different processes


def make_layout(name):
  if name == MIXED:
    devices = np.asarray(jax.devices()).reshape(2, 4).T.reshape(2, 2, 1, 1, 2)
    return mesh.Layout(jax.sharding.Mesh(devices, tuple(mesh.AXES)))
  return testing.make_layout(MESHES.get(name, name))


def make_texts(rng):
  inside = np.arange(T) < rng.integers(3, T + 1, (B, 1))
  return Sequences(
    tokens=np.where(inside, rng.integers(2, 64, (B, T)), 0).astype(np.int32),
    positions=np.where(inside, np.arange(T), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    loss_mask=(inside & (np.arange(T) > 0)).astype(np.float32),
  )


def make_orders(rng):
  inside = np.arange(T) < rng.integers(P + 1, T + 1, (B, K, 1))

  def full(value, kind):
    return np.full((B, K), value, kind)

  return Rankings(
    tokens=np.where(inside, rng.integers(2, 64, (B, K, T)), 0).astype(np.int32),
    positions=np.where(inside, np.arange(T), 0).astype(np.int32),
    segment_ids=inside.astype(np.int32),
    group=full(1, np.int32),
    ranks=np.tile(np.int32([1, 2]), (B, 1)),
    index=full(0, np.int32),
    begins=full(P, np.int32),
    confidence=full(1, np.float32),
    reference_logprobs=full(-20, np.float32),
  )


def make_prompts(rng):
  return testing.make_prompts(B, P, int(rng.integers(2**31)))


@jax.jit
def below_32(prompts, samples):
  good = jnp.sum(samples.mask & (samples.tokens < 32), 1)
  return good / jnp.sum(samples.mask, 1), {}


def build_simple(module, options, batch, layout):
  """A stage of one model: (state, step(state, rng))."""
  definitions = testing.make_definitions(layout, learning_rate=1e-3)
  step = training.compile_train_step(module.train_step, definitions, options)
  state = testing.make_state(definitions)
  return state, lambda state, rng: step(state, batch(rng))


def build_rollout(module, layout, num_samples):
  """A stage that learns from its own responses: (state, step(state, rng))."""
  options = module.Options(
    num_samples=num_samples,
    batch_size=B,
    minibatches=1,
    sampling=SamplingOptions(max_new_tokens=R),
  )
  make = testing.make_ppo_definitions if module is ppo else testing.make_rollout_definitions
  definitions = make(layout, learning_rate=1e-3)
  reference = testing.make_params(definitions.model, layout, seed=5)
  parts = RolloutParts(
    definitions,
    None,
    sampler.build_sampler(
      definitions.model, options.sampling, (testing.EOS_ID,), 0, num_samples, layout=layout
    ),
    training.compile_train_step(module.train_step, definitions, options),
    None,
    None,
  )
  iterate = functools.partial(
    module.iterate, parts=parts, score=below_32, reference_params=reference, layout=layout
  )
  if module is ppo:
    state = testing.make_ppo_state(definitions, options)
    return state, lambda state, rng: iterate(state, (make_prompts(rng), None))
  state = testing.make_state(definitions)
  if module is policy_gradient:
    state = off_policy.SamplerState(**vars(state), sampler_trained={})
    iterate = functools.partial(iterate, options=options)
  else:
    order = functools.partial(
      online_preference.order_responses, definitions=definitions, options=options
    )
    iterate = functools.partial(iterate, order=jax.jit(order))
  return state, lambda state, rng: iterate(state, make_prompts(rng))


def build(kind, layout):
  """(state, step(state, generator of numbers) → (state, metrics))."""
  if kind == 'supervised':
    return build_simple(sft, sft.Options(), make_texts, layout)
  if kind == 'reward':
    return build_simple(reward, reward.Options(), make_orders, layout)
  if kind == 'preference':
    return build_simple(preference, preference.Options(), make_orders, layout)
  modules = {
    'ppo': ppo,
    'policy_gradient': policy_gradient,
    'online_preference': online_preference,
  }
  return build_rollout(modules[kind], layout, 1 if kind == 'ppo' else K)


def run(kind, name):
  """What is trained, and the metrics, after one step and after ten: two flat dicts of arrays."""
  layout = make_layout(name)
  rng = np.random.default_rng(0)
  replicate = jax.jit(lambda tree: tree, out_shardings=layout.sharding())
  state, step = build(kind, layout)
  results = []
  for number in range(1, 11):
    state, metrics = step(state, rng)
    if number in (1, 10):
      # The accuracy is of ratios that are all 0.
      metrics = {key: value for key, value in metrics.items() if 'accuracy' not in key}
      tree = dict(params=replicate(state.params), metrics=metrics)
      leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
      results.append({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
  return results


def assert_agree(got, want, message):
  for after, other, tolerance in zip(got, want, (1e-5, 1e-3)):
    assert after.keys() == other.keys()
    for name, value in other.items():
      np.testing.assert_allclose(
        after[name], value, rtol=tolerance, atol=tolerance, err_msg=f'{message}: {name}'
      )


@pytest.fixture(scope='module')
def alone():
  return {kind: run(kind, 'one device') for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
@pytest.mark.parametrize('kind', KINDS)
def test_ten_steps_on_eight_devices(alone, kind, name):
  assert_agree(run(kind, name), alone[kind], name)


@pytest.mark.slow
def test_ten_steps_on_two_processes_of_four_devices(alone, tmp_path):
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{listener.getsockname()[1]}'
  env = {
    'PATH': '/usr/bin:/bin',
    'PYTHONPATH': str(Path(__file__).parents[2]),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  processes = []
  for number in range(2):
    command = [sys.executable, __file__, address, str(number), tmp_path / 'results.npz']
    processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
  try:
    for process in processes:
      _, errors = process.communicate(timeout=900)
      assert process.returncode == 0, errors[-2000:]
  finally:
    for process in processes:
      process.kill()  # each would wait for the other
  with np.load(tmp_path / 'results.npz') as results:
    for name in (*MESHES, MIXED):
      for kind in KINDS:
        got = [pick(results, name, kind, count) for count in ('0', '1')]
        assert_agree(got, alone[kind], f'{name}, two processes, {kind}')


def pick(results, *place):
  """The leaves of one run, of what a process wrote."""
  return {
    key.split('|')[3]: results[key] for key in results.files if key.split('|')[:3] == list(place)
  }


def main(address, number, path):
  """One of two processes; the first writes the results."""
  hosts.initialize(address, '2', number)
  results = {}
  for name in (*MESHES, MIXED):
    for kind in KINDS:
      for count, leaves in enumerate(run(kind, name)):
        for leaf, value in leaves.items():
          results[f'{name}|{kind}|{count}|{leaf}'] = value
  if jax.process_index() == 0:
    np.savez(path, **results)


if __name__ == '__main__':
  main(*sys.argv[1:])
