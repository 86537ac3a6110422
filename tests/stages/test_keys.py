"""Every random key of a run is used once: drawn from once, or the parent of others."""

import collections
import dataclasses
import importlib

import jax
import numpy as np
import pytest

from rlhf_jax import random_keys
from rlhf_jax.runtime import loop

DRAWS = ('permutation', 'uniform', 'normal', 'bits', 'categorical', 'gumbel', 'truncated_normal')
REWARD = 'reward=("rlhf_jax.rewards.builtin.text:length(least=1,most=20)",)'
# kind of stage → its section, the experiment, overrides of the section
STAGES = {
  'ppo': ('ppo', 'quickstart', ['value=', 'reference=random', REWARD, 'epochs=2']),
  'policy_gradient': (
    'grpo',
    'grpo',
    ['kl_coefficient=0.0', 'kl_place=reward', REWARD, 'epochs=2', 'resampling=1', 'minibatches=2'],
  ),
  'online_preference': ('online_dpo', 'online_dpo', ['reference=random', REWARD, 'microbatches=2']),
}


@pytest.fixture
def uses(monkeypatch):
  """(bits of the key, name of the function) → how often, at run time, inside programs too."""
  seen = collections.Counter()

  def note(name):
    def count(bits):
      seen[np.asarray(bits).tobytes(), name] += 1

    return count

  def watch(name):
    original = getattr(jax.random, name)

    def watched(key, *arguments, **options):
      jax.debug.callback(note(name), jax.random.key_data(key))
      return original(key, *arguments, **options)

    monkeypatch.setattr(jax.random, name, watched)

  for name in ('fold_in', 'split', *DRAWS):
    watch(name)
  original = random_keys.host_generator

  def host_generator(key):
    note('host_generator')(jax.random.key_data(key))
    return original(key)

  monkeypatch.setattr(random_keys, 'host_generator', host_generator)
  return seen


def check(uses):
  jax.effects_barrier()
  ways = collections.defaultdict(dict)
  for (bits, name), count in uses.items():
    ways[bits][name] = count
  assert {'fold_in', 'uniform'} <= {name for _, name in uses}
  for bits, counts in ways.items():
    # `split` gives the same keys as `fold_in`, and a draw shows the bits of both.
    assert len(counts) == 1, (np.frombuffer(bits, np.uint32), counts)
    ((name, count),) = counts.items()
    # What is folded in may be the same twice; then its children would be used twice.
    assert name == 'fold_in' or count == 1, (np.frombuffer(bits, np.uint32), counts)


SLOW = pytest.param('online_preference', marks=pytest.mark.slow)


@pytest.mark.parametrize('kind', ['ppo', 'policy_gradient', SLOW])
def test_two_steps_and_an_evaluation(context, uses, tmp_path, kind):
  section, experiment, overrides = STAGES[kind]
  stage = importlib.import_module(f'rlhf_jax.stages.{kind}')
  overrides = [f'{section}.{word}' for word in overrides]
  made = context(section, *overrides, experiment=experiment)
  built = stage.build(made, made.read_options(stage.STAGE))
  first = iter([built.evaluate])

  def evaluate_once(state):  # an evaluation always draws the same, so that policies compare
    evaluate = next(first, None)
    return evaluate(state) if evaluate else ({}, [])

  def init():
    state = built.init()
    jax.effects_barrier()
    uses.clear()  # policy, value and reference are all `random` here: one model, by intent
    return state

  what = dataclasses.replace(built, init=init, evaluate=evaluate_once)
  options = loop.LoopOptions(steps=2, log_every=1, eval_every=2, save_every=0, tensorboard=False)
  loop.run(what, options, tmp_path / 'run', {})
  check(uses)
  assert len({bits for bits, name in uses if name == 'uniform'}) > 30


@pytest.mark.parametrize('name', ['feedback', pytest.param('critique', marks=pytest.mark.slow)])
def test_stages_that_only_respond(context, uses, name):
  stage = importlib.import_module(f'rlhf_jax.stages.{name}')
  experiment = {'critique': 'constitutional_ai', 'feedback': 'quickstart'}[name]
  stage.run(context(name, experiment=experiment))
  jax.effects_barrier()
  # Both splits read the model `random`, which is the same one each time.
  of_parameters = ('split', 'normal')
  check(collections.Counter({use: n for use, n in uses.items() if use[1] not in of_parameters}))
  assert any(way == 'host_generator' for _, way in uses)
