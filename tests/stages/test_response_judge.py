"""Who judges the responses of a stage's evaluations."""

import ml_collections
import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.sources import DataOptions
from rlhf_jax.stages.shared import response_judge

FILES = DataOptions(source='jsonl', path=('x.jsonl',))


def test_the_oracle_knows_prompts_by_their_conversation(context):
  made = context('sft')
  world = DataOptions(count=3)
  demonstrations = sources.load_records(world, 'demonstration', 'validation')
  prompts = [response_judge.as_prompt(record) for record in demonstrations]
  texts = [[record.response] for record in demonstrations]
  assert response_judge.open_judge(made, prompts, world)(texts)['utility'].shape == (3, 1)
  # Rankings of annotators lie in files, but the final table is about the same world.
  judged = response_judge.open_judge(made, prompts, FILES)(texts)
  assert np.isfinite(judged['utility']).all()
  # Nothing says that these files are of the world.
  made.config.evaluation.models = ml_collections.ConfigDict()
  assert response_judge.open_judge(made, prompts, FILES)(texts) == {}


def test_a_function_judges_and_a_model_does_not(context):
  def open_judge(name, *overrides, **more):
    made = context('sft', f'evaluation.judge={name}', 'evaluation.controls=False', *overrides)
    records = sources.load_records(DataOptions(count=2), 'prompt', 'validation')
    return response_judge.open_judge(made, records, FILES, **more)

  here = 'evaluation.reward_functions.workers=0'
  function = 'rlhf_jax.rewards.builtin.text:length(least=2)'
  texts = [['one two', 'one'], ['one', '']]
  judged = open_judge(function, here)(texts)['utility']
  assert judged.tolist() == [[1.0, 0.5], [0.5, 0.0]]
  assert open_judge(function, here, rewards=(function,))(texts) == {}
  assert open_judge('reward')(texts) == {}
