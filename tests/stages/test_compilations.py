"""Every program of a stage is compiled once: nothing compiles after the first step."""

import collections
import dataclasses
import importlib

import jax
import pytest

from rlhf_jax.runtime import loop

COMPILED = '/jax/core/compile/backend_compile_duration'
REWARD = 'reward=("rlhf_jax.rewards.builtin.text:length(least=1,most=20)",)'
SIMULATED = ('data.source=tinyworld', 'data.path=()')  # rankings that no earlier stage has to write
# kind of stage → its section, the experiment, overrides of the section
STAGES = {
  'pretrain': ('pretrain', 'quickstart', []),
  'sft': ('sft', 'quickstart', []),
  'reward': ('reward', 'quickstart', [*SIMULATED, 'centre=False']),
  'preference': (
    'dpo',
    'dpo',
    ['reference=random', *SIMULATED, 'reference_logprobs=live'],
  ),
  'ppo': ('ppo', 'quickstart', ['value=random', 'reward=("random",)']),
  'policy_gradient': ('grpo', 'grpo', ['reference=random', REWARD]),
  'online_preference': ('online_dpo', 'online_dpo', ['reference=random', REWARD]),
}


@pytest.fixture
def compiled():
  """The names of what is compiled, in order."""
  names = []

  def note(event, seconds, **values):
    if event == COMPILED:
      names.append(values['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(note)
  yield names
  jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize('kind', STAGES)
def test_later_steps_compile_nothing(context, compiled, tmp_path, kind):
  section, experiment, overrides = STAGES[kind]
  stage = importlib.import_module(f'rlhf_jax.stages.{kind}')
  overrides = [f'{section}.{word}' for word in overrides]
  made = context(section, *overrides, experiment=experiment)
  what = stage.build(made, made.read_options(stage.STAGE))
  marks = []  # compilations at the beginning of each step

  def step(state, batch):
    marks.append(len(compiled))
    return what.step(state, batch)

  # Three steps with all that happens between them: nothing after the fourth begins counts.
  options = loop.LoopOptions(steps=4, log_every=1, eval_every=0, save_every=0, tensorboard=False)
  loop.run(dataclasses.replace(what, step=step, evaluate=None), options, tmp_path / 'run', {})
  first, later = compiled[: marks[1]], compiled[marks[1] : marks[3]]
  assert later == []
  programs = collections.Counter(name for name in first if 'step' in name or 'generate' in name)
  assert programs and set(programs.values()) == {1}, programs
