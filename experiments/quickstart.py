"""The four steps of RLHF on TinyWorld, from nothing to a table, on a laptop's CPU.

Pre-training, SFT, rankings by simulated annotators, a reward model, PPO.

  python -m rlhf_jax --config=experiments/quickstart.py --workdir=runs/quickstart

Expected: on the test split of seed 0, sampled / greedily, helpful responses are
  20.2% / 46.1% (base), 30.5% / 59.7% (SFT) and 68.6% / 83.6% (PPO).
  PPO wins against SFT by substance in 70.3% (67.0 – 73.9) and 63.0% (59.0 – 68.0).
  docs/tinyworld.md has intervals, other seeds and controls.
Time: 8 min 28 s to 10 min 45 s on two CPU cores, compilation included.
Try: --config.seed=1, another world; --config.evaluation.split=test, the test split.
"""

from collections.abc import Sequence
from typing import Any

import ml_collections

SAMPLING = dict(max_new_tokens=32)
RANKINGS = dict(source='jsonl', path=('{workdir}/feedback/{split}.jsonl',))  # of the feedback stage
TINY_LOOP = dict(steps=4, eval_every=2, save_every=2, log_every=1)
TINY_MODEL = dict(embed=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64)

# What the tiny form changes in a stage, by its kind. An untrained model's responses are long once
# encoded again, hence the lengths.
TINY_STAGES = dict(
  pretrain=dict(batch_size=8, eval_records=8),
  sft=dict(batch_size=8, eval_records=8),
  feedback=dict(batch_size=16, data=dict(count=16)),
  critique=dict(batch_size=16, data=dict(count=16), helpful=dict(count=16)),
  reward=dict(batch_size=8, max_length=128, packed_rows=0),
  ppo=dict(batch_size=8, minibatches=2, packed_rows=0, eval_records=8),
  preference=dict(batch_size=8, max_length=128, eval_records=8),
  policy_gradient=dict(batch_size=8, eval_records=8),
  online_preference=dict(batch_size=8, eval_records=8),
)


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny runs every stage in seconds, and its table means nothing."""
  config = ml_collections.ConfigDict()
  config.stages = ('pretrain', 'sft', 'feedback', 'reward', 'ppo')
  config.tokenizer = dict(vocab_size=1536)
  config.model = dict(embed=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384)
  config.pretrain = dict(
    batch_size=16,
    max_length=96,
    loop=dict(steps=2400, eval_every=1200, save_every=600),
    optimizer=dict(learning_rate=5e-3),
    sampling=SAMPLING,
  )
  config.sft = dict(
    batch_size=16,
    max_length=96,
    loop=dict(steps=90, eval_every=45, save_every=90),
    optimizer=dict(learning_rate=3e-4),
    sampling=SAMPLING,
    data=dict(count=400),
  )
  config.feedback = dict(
    # The base model too: what only it says, PPO would else find unranked.
    policies=('sft', 'pretrain'),
    num_samples=4,
    max_length=30,
    # Not 1: people learn little from comparing slips of the pen.
    sampling=dict(SAMPLING, temperature=0.7),
  )
  config.reward = dict(
    batch_size=8,
    responses_per_row=8,  # all samples of a prompt
    max_length=62,  # a prompt of 30 tokens and a response of 32
    packed_rows=8,  # half of the places would be padding, and a prompt is read once
    likelihood=True,  # what the model knows to be so counts, ranked or not
    language_model_coefficient=0.5,
    loop=dict(steps=240, eval_every=120, save_every=120),
    data=RANKINGS,
    optimizer=dict(learning_rate=5e-4, warmup_steps=10),
  )
  config.ppo = dict(
    batch_size=128,
    max_length=30,
    epochs=1,
    minibatches=4,
    packed_rows=8,  # half of the places would be padding
    kl_coefficient=0.04,
    sampling=SAMPLING,
    loop=dict(steps=150, eval_every=75, save_every=75),
    optimizer=dict(learning_rate=2.5e-4),
  )
  config.evaluation = dict(
    models=dict(base='pretrain', sft='sft', ppo='ppo'),
    num_samples=8,
    controls=True,
    max_length=30,
    sampling=SAMPLING,
  )
  if tiny:
    _shrink(config)
  return config


def continue_with(
  name: str,
  tiny: bool,
  before: Sequence[str],
  **sections: dict[str, Any],
) -> ml_collections.ConfigDict:
  """Returns an experiment that goes on from the quickstart's models with other stages.

  Args:
    name: the stage whose model the final table shows beside base and SFT.
    tiny: whether to shrink every stage, for tests.
    before: the quickstart's stages that run first.
    sections: name of each further stage → its section, in the order in which they run.
  """
  config = get_config(tiny)
  for stage in {*config.stages} - {*before}:
    del config[stage]
  config.stages = (*before, *sections)
  config.evaluation.models = {'base': 'pretrain', 'sft': 'sft', name: name}
  config.evaluation.controls = False  # the quickstart's own table has them
  for stage, section in sections.items():
    config[stage] = _merge(section, _shared_changes(section.get('kind', stage), tiny))
  return config


def _shared_changes(kind: str, tiny: bool) -> dict[str, Any]:
  """Returns what every further stage of a kind has in common."""
  changes: dict[str, Any] = {}
  if kind != 'reward':  # a reward model samples nothing
    changes['sampling'] = SAMPLING
  if tiny:
    changes |= TINY_STAGES[kind]
    if kind not in ('feedback', 'critique'):  # these do not train
      changes['loop'] = TINY_LOOP
  return changes


def _merge(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
  """Returns a section with changes over it, one level deep."""
  merged = dict(section)
  for key, value in changes.items():
    if isinstance(value, dict):
      value = {**section.get(key, {}), **value}
    merged[key] = value
  return merged


def _shrink(config: ml_collections.ConfigDict) -> None:
  """Makes the experiment one that tests can run in seconds."""
  config.model = TINY_MODEL
  for name in ('pretrain', 'sft', 'reward', 'ppo'):
    config[name].loop = TINY_LOOP
    config[name].update(TINY_STAGES[name])
  config.pretrain.data = dict(count=400)
  config.tokenizer.documents = 400
  config.feedback.data = dict(count=16)
  config.feedback.batch_size = 16
  config.evaluation.data = dict(count=16)
  config.evaluation.batch_size = 16
