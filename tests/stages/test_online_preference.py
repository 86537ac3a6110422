import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.runtime import step as steps
from rlhf_jax.stages import online_preference, preference
from rlhf_jax.types import Prompts

B, K, P, R, EOS = 8, 4, 6, 7, 1


def settings(rate=1e-2, **changes):
  section = ml_collections.ConfigDict(
      {**online_preference.DEFAULTS, 'batch_size': B, 'num_samples': K, 'missing_eos': False, 'beta': 0.3, **changes})
  section.optimizer.update(learning_rate=rate, schedule='constant', warmup_steps=0, eps=1e-5)  # not all noise
  section.sampling.update(max_new_tokens=R)
  online_preference.check(section, 'config.online')
  return section


@functools.cache
def build(tiny, mesh, parts=1, **changes):
  """(layout, init, step, reference)."""
  on, section = tiny.layout(mesh), settings(**changes)
  model, optimizer = tiny.model(on), steps.make_optimizer(section.optimizer, 100)
  init = lambda: steps.create_train_state(tiny.params(model, on), optimizer, jax.random.key(1), on)
  update = steps.build(preference.build_loss(model, section), optimizer, on, parts)
  score = jax.jit(lambda _, samples: (
      jnp.sum(samples.mask & (samples.tokens < 32), 1) / jnp.sum(samples.mask, 1), {}))
  generate = sampler.build_sampler(model, section.sampling, (EOS,), 0, K)
  step = online_preference.build_step(generate, score, update, model, model, on, section)
  return on, init, step, tiny.params(model, on)


def prompts(seed):
  rng = np.random.default_rng(seed)
  asked = np.arange(P) >= P - rng.integers(1, P + 1, B)[:, None]
  return Prompts(np.where(asked, rng.integers(2, 64, (B, P)), 0).astype(np.int32), asked, np.arange(B, dtype=np.int32))


def test_reward_rises(tiny):
  """Towards tokens below 32, half of what a random policy says; the first loss is that of a policy like its reference."""
  _, init, step, reference = build(tiny, 'one device')
  state, scores = init(), []
  for n in range(15):
    state, metrics = step(state, prompts(n), reference)
    scores.append(float(metrics['reward/score']))
    if n == 0:
      np.testing.assert_allclose([metrics['loss'], metrics['kl'], metrics['margin']], [np.log(2), 0, 0], atol=2e-5)
      assert metrics['policy/sampler_gap'] < 1e-5
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.85, scores


@pytest.mark.parametrize('mesh,parts', [('one device', 4), ('data 2, fsdp 2, tensor 2', 1)])
def test_parts_and_meshes_change_nothing(tiny, mesh, parts):
  def run(*args):
    _, init, step, reference = build(tiny, *args)
    state, metrics = step(init(), prompts(0), reference)
    del metrics['accuracy']  # of ratios that are all 0
    return jax.device_get((state.params, metrics))
  tiny.close(run(mesh, parts), run('one device'), mesh, 3e-5)


@pytest.mark.parametrize('changes,message', [
    (dict(loss='kto'), 'config.online.loss: kto is for'), (dict(num_samples=1), 'num_samples from 2'),
    (dict(loss='dpoo'), "got 'dpoo'")])
def test_wrong_settings(changes, message):
  with pytest.raises(UserError, match=message):
    settings(**changes)
