import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import testing
from rlhf_jax.errors import UserError
from rlhf_jax.generation import sampler
from rlhf_jax.generation.sampler import SamplingOptions
from rlhf_jax.objectives.preference import DPOSettings
from rlhf_jax.stages import online_preference
from rlhf_jax.stages.shared import training
from rlhf_jax.stages.shared.rollout import RolloutParts

B, K, P, R = 8, 4, 6, 7


def make_options(**changes):
  values = {
    'batch_size': B,
    'num_samples': K,
    'missing_eos': False,
    'settings': DPOSettings(beta=0.3),
    'sampling': SamplingOptions(max_new_tokens=R),
    **changes,
  }
  options = online_preference.Options(**values)
  online_preference.check_options(options, 'config.online')
  return options


@functools.cache
def make_iterate(mesh='one device', parts=1, packed_rows=0):
  """iterate(state, host prompts) towards tokens below 32, and its definitions."""
  layout = testing.make_layout(mesh)
  definitions = testing.make_rollout_definitions(layout, learning_rate=1e-2)
  options = make_options(microbatches=parts, packed_rows=packed_rows)
  reference = testing.make_params(definitions.model, layout)

  @jax.jit
  def score(prompts, samples):
    good = jnp.sum(samples.mask & (samples.tokens < 32), 1)
    return good / jnp.sum(samples.mask, 1), {}

  order = jax.jit(
    functools.partial(online_preference.order_responses, definitions=definitions, options=options)
  )
  rollout_parts = RolloutParts(
    definitions,
    None,
    sampler.build_sampler(definitions.model, options.sampling, (testing.EOS_ID,), 0, K),
    training.compile_train_step(online_preference.train_step, definitions, options),
    None,
    None,
  )

  def iterate(state, prompts):
    return online_preference.iterate(state, prompts, rollout_parts, score, order, reference, layout)

  return iterate, definitions


def test_reward_rises():
  """The first loss is that of a policy like its reference."""
  iterate, definitions = make_iterate()
  state = testing.make_state(definitions)
  scores = []
  for n in range(15):
    state, metrics = iterate(state, testing.make_prompts(B, P, n))
    scores.append(float(metrics['reward/score']))
    if n == 0:
      got = [metrics['loss'], metrics['kl'], metrics['margin']]
      np.testing.assert_allclose(got, [np.log(2), 0, 0], atol=2e-5)
      assert metrics['policy/sampler_gap'] < 1e-5
  assert np.mean(scores[:2]) < 0.7 and np.mean(scores[-3:]) > 0.85, scores


@pytest.mark.parametrize(
  'mesh,parts,packed_rows',
  [('one device', 4, 0), ('one device', 1, 4), ('data 2, fsdp 2, tensor 2', 1, 0)],
)
def test_parts_packing_and_meshes_change_nothing(mesh, parts, packed_rows):
  def run(*how):
    iterate, definitions = make_iterate(*how)
    state, metrics = iterate(testing.make_state(definitions), testing.make_prompts(B, P, 0))
    del metrics['accuracy']  # of ratios that are all 0
    metrics.pop('packed/padding_share', None)
    metrics.pop('packed/shared_share', None)
    return jax.device_get((state.params, metrics))

  testing.assert_trees_close(run(mesh, parts, packed_rows), run('one device'), mesh, 3e-5)


@pytest.mark.parametrize(
  'changes,message',
  [
    (dict(loss='kto'), 'config.online.loss: kto is for'),
    (dict(num_samples=1), 'num_samples from 2'),
    (dict(loss='dpoo'), "got 'dpoo'"),
  ],
)
def test_wrong_options(changes, message):
  with pytest.raises(UserError, match=message):
    make_options(**changes)
