"""Every kind of step, ten times, on one device, on meshes of eight, and on two processes of four devices each: the same
numbers. Run as a program it is one of the processes: test_meshes.py ADDRESS PROCESS FILE."""

import importlib.util
from pathlib import Path
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax.generation import sampler
from rlhf_jax.runtime import hosts, mesh
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import online_preference, policy_gradient, ppo, preference, reward
from rlhf_jax.stages.shared import supervised
from rlhf_jax.types import Prompts, Rankings, Sequences

B, K, P, R, T, EOS = 8, 2, 5, 6, 12, 1
KINDS = ('supervised', 'reward', 'preference', 'ppo', 'policy_gradient', 'online_preference')
MESHES = {
    'fsdp 8': dict(data=1, fsdp=8), 'tensor': dict(tensor=2), 'context': dict(context=4),
    'data, fsdp, tensor': dict(data=2, fsdp=2, tensor=2), 'fsdp 8, decoding over 2': dict(data=1, fsdp=8, rollout_tensor=2)}
MIXED = 'processes mixed'  # neighbours on an axis are of different processes


def layout(name):
  if name == 'one device':
    return mesh.make_layout(mesh.DEFAULTS, jax.devices()[:1])
  if name == MIXED:
    devices = np.asarray(jax.devices()).reshape(2, 4).T.reshape(2, 2, 1, 1, 2)
    return mesh.Layout(jax.sharding.Mesh(devices, tuple(mesh.AXES)))
  return mesh.make_layout({**mesh.DEFAULTS, **MESHES[name]})


def texts(rng):
  inside = np.arange(T) < rng.integers(3, T + 1, (B, 1))
  return Sequences(np.where(inside, rng.integers(2, 64, (B, T)), 0).astype(np.int32),
                   np.where(inside, np.arange(T), 0).astype(np.int32), inside.astype(np.int32),
                   (inside & (np.arange(T) > 0)).astype(np.float32))


def orders(rng):
  inside = np.arange(T) < rng.integers(P + 1, T + 1, (B, K, 1))
  full = lambda value, kind: np.full((B, K), value, kind)
  return Rankings(
      tokens=np.where(inside, rng.integers(2, 64, (B, K, T)), 0).astype(np.int32),
      positions=np.where(inside, np.arange(T), 0).astype(np.int32), segment_ids=inside.astype(np.int32),
      group=full(1, np.int32), ranks=np.tile(np.int32([1, 2]), (B, 1)), index=full(0, np.int32),
      begins=full(P, np.int32), confidence=full(1, np.float32), reference_logprobs=full(-20, np.float32))


def prompts(rng):
  asked = np.arange(P) >= P - rng.integers(1, P + 1, B)[:, None]
  return Prompts(np.where(asked, rng.integers(2, 64, (B, P)), 0).astype(np.int32), asked, np.arange(B, dtype=np.int32))


def build(tiny, kind, on):
  """(state, step(state, generator of numbers) → (state, metrics))."""
  module = dict(ppo=ppo, policy_gradient=policy_gradient, online_preference=online_preference,
                preference=preference).get(kind)
  model, optimizer = tiny.model(on), steps.make_optimizer(
      ml_collections.ConfigDict({**steps.OPTIMIZER, 'learning_rate': 1e-3, 'schedule': 'constant', 'eps': 1e-5}), 100)
  state = steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  if kind in ('supervised', 'reward'):
    loss = supervised.build_loss(model) if kind == 'supervised' else reward.build_loss(model, 'pairwise')
    step, batch = steps.build(loss, optimizer, on), texts if kind == 'supervised' else orders
    return state, lambda state, rng: step(state, batch(rng))
  samples = 1 if kind == 'ppo' else K
  section = ml_collections.ConfigDict({**module.DEFAULTS, 'num_samples': samples, 'batch_size': B, 'minibatches': 1})
  section.sampling.update(max_new_tokens=R)
  if kind == 'preference':
    step = steps.build(preference.build_loss(model, section), optimizer, on)
    return state, lambda state, rng: step(state, orders(rng))
  reference = tiny.params(model, on, 5)
  generate = sampler.build_sampler(model, section.sampling, (EOS,), 0, samples, layout=on)
  score = jax.jit(lambda _, given: (jnp.sum(given.mask & (given.tokens < 32), 1) / jnp.sum(given.mask, 1), {}))
  if kind == 'ppo':
    both = steps.create_train_state({'policy': state.params, 'value': tiny.params(model, on, 2)}, optimizer,
                            jax.random.key(1), on)
    state = ppo.PPOState(
        step=both.step, trained=both.params['policy'], opt_state=both.opt_state, key=both.key,
        value_trained=both.params['value'],
        kl_coefficient=jax.jit(lambda: jnp.float32(0.05), out_shardings=on.sharding())())
    update = ppo.build_update(model, model, model, optimizer, on, section)
    step = ppo.build_step(generate, score, update, on)
    return state, lambda state, rng: step(state, (prompts(rng), None), reference)
  if kind == 'policy_gradient':
    state = policy_gradient.SamplerState(**vars(state), sampler_trained={})
    update = policy_gradient.build_update(model, model, optimizer, on, section)
    step = policy_gradient.build_step(generate, score, update, on, section)
  else:
    update = steps.build(preference.build_loss(model, section), optimizer, on)
    step = online_preference.build_step(generate, score, update, model, model, on, section)
  return state, lambda state, rng: step(state, prompts(rng), reference)


def run(tiny, kind, name):
  """What is trained, and the metrics, after one step and after ten: two flat dicts of arrays."""
  on, rng, found = layout(name), np.random.default_rng(0), []
  whole = jax.jit(lambda tree: tree, out_shardings=on.sharding())
  state, step = build(tiny, kind, on)
  for number in range(1, 11):
    state, metrics = step(state, rng)
    if number in (1, 10):
      metrics = {name: value for name, value in metrics.items() if 'accuracy' not in name}  # of ratios that are all 0
      tree = dict(params=whole(state.params), metrics=metrics)
      leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
      found.append({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
  return found


def agree(got, want, said):
  for one, other, tolerance in zip(got, want, (1e-5, 1e-3)):
    assert one.keys() == other.keys()
    for name, value in other.items():
      np.testing.assert_allclose(one[name], value, rtol=tolerance, atol=tolerance, err_msg=f'{said}: {name}')


@pytest.fixture(scope='module')
def alone(tiny):
  return {kind: run(tiny, kind, 'one device') for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
@pytest.mark.parametrize('kind', KINDS)
def test_ten_steps_on_eight_devices(tiny, alone, kind, name):
  agree(run(tiny, kind, name), alone[kind], name)


@pytest.mark.slow
def test_ten_steps_on_two_processes_of_four_devices(alone, tmp_path):
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{one.getsockname()[1]}'
  env = {'PATH': '/usr/bin:/bin', 'PYTHONPATH': str(Path(__file__).parents[2]), 'JAX_PLATFORMS': 'cpu',
         'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  both = [subprocess.Popen([sys.executable, __file__, address, str(number), tmp_path / 'found.npz'], env=env,
                           stderr=subprocess.PIPE, text=True) for number in range(2)]
  for process in both:
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-2000:]
  with np.load(tmp_path / 'found.npz') as found:
    for name in (*MESHES, MIXED):
      for kind in KINDS:
        of = lambda count: {key.split('|')[3]: found[key] for key in found.files
                            if key.split('|')[:3] == [name, kind, str(count)]}
        agree([of(0), of(1)], alone[kind], f'{name}, two processes, {kind}')


def main(address, number, path):
  """One of two processes; the first writes what it found."""
  hosts.initialize(address, '2', number)
  spec = importlib.util.spec_from_file_location('tiny', Path(__file__).with_name('conftest.py'))
  tiny = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tiny)
  found = {f'{name}|{kind}|{count}|{leaf}': value for name in (*MESHES, MIXED) for kind in KINDS
           for count, leaves in enumerate(run(tiny, kind, name)) for leaf, value in leaves.items()}
  if jax.process_index() == 0:
    np.savez(path, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
