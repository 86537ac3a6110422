"""Every number of every section has a range, and a setting that has no effect is refused."""

import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from rlhf_jax import options, stages
from rlhf_jax.errors import UserErrors
from rlhf_jax.experiment import config as configs
from rlhf_jax.experiment import final_table, pipeline


def all_sections():
  """Yields (name, options class) of the common sections, all stages and their losses."""
  yield 'common', pipeline.CommonOptions
  for kind in stages.kinds():
    stage = stages.find(kind)
    yield kind, stage.options
    for settings in stage.choices.values():
      for choice, settings_class in settings.items():
        yield f'{kind}.{choice}', settings_class


def number_fields(options_class):
  """Yields (path, range) of each number of a section, the sections in it included."""
  hints = get_type_hints(options_class, include_extras=True)
  for field in dataclasses.fields(options_class):
    hint = hints[field.name]
    if dataclasses.is_dataclass(hint):
      yield from (([field.name, *path], allowed) for path, allowed in number_fields(hint))
    ranges = [part for part in get_args(hint) if isinstance(part, options.Range)]
    default = field.default
    is_number = type(default) in (int, float) or 'float' in str(hint)
    assert not is_number or ranges, f'{options_class.__name__}.{field.name} has no range'
    if ranges and type(default) in (int, float):
      yield [field.name], ranges[0]


def change(options_class, path, value):
  """Returns the defaults with one value changed."""
  values = options.defaults(options_class)
  table = values
  for name in path[:-1]:
    table = table[name]
  table[path[-1]] = value
  return options.from_section(options_class, values)


CASES = [
  pytest.param(options_class, path, allowed, id=f'{name}.{".".join(path)}')
  for name, options_class in all_sections()
  for path, allowed in number_fields(options_class)
]


def test_every_section_is_looked_at():
  assert len(CASES) > 250


def test_numbers_out_of_their_ranges_are_refused_by_name():
  for case in CASES:
    options_class, path, allowed = case.values
    beyond = [math.nan, math.inf, -math.inf]
    within = []
    for bound, inside, step in (
      (allowed.least, True, -1),
      (allowed.most, True, 1),
      (allowed.above, False, -1),
      (allowed.below, False, 1),
    ):
      if bound is not None:
        beyond += [bound + step] if inside else [bound, bound + step]
        within += [bound] if inside else []
    usual = options_class()
    for value in beyond:
      wrong = change(options_class, path, value)
      mistakes = options.find_mistakes(wrong, usual, 'config.x')
      name = '.'.join(['config.x', *path])
      named = [text.partition(':')[0] for text in mistakes]  # it, or a section without effect
      assert any(name.startswith(text) for text in named), (case.id, value)
    for value in within:
      right = change(options_class, path, value)
      mistakes = options.find_mistakes(right, usual, 'config.x')
      assert not any('expected' in text for text in mistakes), (case.id, value, mistakes)


@pytest.mark.parametrize(
  'kind, section, name',
  [
    ('ppo', {'kl_horizon': 5.0}, 'kl_horizon'),
    ('ppo', {'pretraining': {'count': 5}}, 'pretraining'),
    ('ppo', {'missing_eos': False, 'missing_eos_score': 0.0}, 'missing_eos_score'),
    ('ppo', {'sampling': {'temperature': 0.0, 'top_k': 5}}, 'sampling.top_k'),
    ('ppo', {'reward_server': {'retries': 1}}, 'reward_server'),
    ('policy_gradient', {'kl_estimator': 'k1'}, 'kl_estimator'),
    ('policy_gradient', {'kl_coefficient': 0.0, 'kl_place': 'loss'}, 'kl_place'),
    ('policy_gradient', {'loss': 'reinforce', 'clip_low': 0.1}, 'clip_low'),
    ('sft', {'lora': {'alpha': 3.0}}, 'lora.alpha'),
    ('sft', {'optimizer': {'schedule': 'constant', 'final_scale': 0.5}}, 'optimizer.final_scale'),
    ('sft', {'data': {'fields': {'text': 'body'}}}, 'data.fields'),
    ('sft', {'data': {'source': 'jsonl', 'people': 30}}, 'data.people'),
    ('sft', {'data': {'source': 'my:rows', 'path': ('a',)}}, 'data.path'),
    ('reward', {'centre': False, 'centre_records': 5}, 'centre_records'),
    ('feedback', {'source': 'reward', 'annotators': 9}, 'annotators'),
    ('feedback', {'ai': {'pairs': 2}}, 'ai'),
    ('feedback', {'source': 'ai', 'ai': {'weights': (2.0,)}}, 'ai.weights'),
    ('feedback', {'source': 'ai', 'ai': {'endpoint': {'retries': 1}}}, 'ai.endpoint'),
    ('critique', {'chat': True, 'revision': 'Again: {request}'}, 'revision'),
    ('sft', {'shown_responses': 0, 'sampling': {'top_k': 5}}, 'sampling'),
    ('policy_gradient', {'clip_high': 0.3}, 'clip_high'),
    ('ppo', {'epochs': 1, 'minibatches': 1, 'value_clip': 0.5}, 'value_clip'),
    ('ppo', {'weight_limit': 0.0, 'weight_rule': 'mask'}, 'weight_rule'),
    ('frozen_reward', {'data': {'fields': {'text': 'body'}}}, 'data.fields'),
    ('evaluation', {'num_samples': 4}, 'num_samples'),
    ('evaluation', {'models': {'a': 'sft'}, 'reward': 'rm'}, 'reward'),
    ('evaluation', {'models': {'a': 'sft'}, 'scorer': {'ending': '?'}}, 'scorer'),
  ],
)
def test_a_setting_without_effect_is_refused(kind, section, name):
  common = {'evaluation': final_table.Options}  # which is no stage
  options_class = common.get(kind) or stages.find(kind).options
  values = options.defaults(options_class)
  for key, value in section.items():
    values[key] = {**values[key], **value} if isinstance(value, dict) else value
  given = options.from_section(options_class, values)
  mistakes = options.find_mistakes(given, options_class(), 'config.x')
  assert [text.partition(':')[0] for text in mistakes] == [f'config.x.{name}']
  assert 'it has no effect' in mistakes[0]


def test_all_mistakes_of_a_config_are_named_together(tmp_path):
  path = tmp_path / 'experiment.py'
  path.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    '  sft = dict(optimizer=dict(clip_norm=-1.0), loop=dict(steps=0))\n'
    "  return ml_collections.ConfigDict(dict(stages=('sft',), seed=-1, sft=sft))\n"
  )
  with pytest.raises(UserErrors) as caught:
    pipeline.load_config(str(path))
  assert len(caught.value.messages) == 3
  text = str(caught.value)
  assert 'config.seed: expected a number from 0 and below' in text and 'got -1' in text
  assert 'config.sft.optimizer.clip_norm: expected a number from 0, got -1.0' in text
  assert 'config.sft.loop.steps: expected a number from 1, got 0' in text
  with pytest.raises(UserErrors) as caught:
    pipeline.load_config(str(path), ['sft.bach_size=3', 'sft.loop=4', "seed='a'"])
  assert [text.partition(':')[0] for text in caught.value.messages] == [
    '--config.sft.bach_size=3',
    '--config.sft.loop=4',
    "--config.seed='a'",
  ]
  configs.raise_mistakes([])  # none
