"""A base model a hundred times as large, for a world in which size matters.

Two hundred persons to remember, each with three facts and those that follow from them, are more
than a small model holds. small_against_large.py sets a small model with RLHF beside this base.

  python -m rlhf_jax --config=experiments/large_base.py --workdir=runs/large_base

Expected: a validation loss of 0.73 nats per token; docs/tinyworld.md sets it beside the small one.
Time: 57 minutes on one CPU core: 9.8 million parameters, 3.7 million tokens.
Try: --config.pretrain.loop.steps=4800, twice as long.
"""

import ml_collections
import quickstart

WORLD = dict(people=200)


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  config = quickstart.get_config(tiny)
  for stage in config.stages[1:]:
    del config[stage]
  config.stages = ('pretrain',)
  config.evaluation = dict(models={})  # a base alone is compared with nothing
  if not tiny:
    config.model = dict(embed=320, layers=7, heads=10, kv_heads=10, head_dim=32, mlp=960)
    # With the small model's 5e-3 it learns no more than a model of a hundredth of its size.
    config.pretrain.optimizer.learning_rate = 1.5e-3
  in_the_large_world(config)
  return config


def in_the_large_world(config: ml_collections.ConfigDict) -> None:
  """Lets every section of an experiment read the world of many people."""
  for name in ('tokenizer', 'evaluation', *config.stages):
    section = config[name]
    if dict(section.get('data', {})).get('source') == 'jsonl':
      continue  # what an earlier stage has written
    section.data = {**dict(section.get('data', {})), **WORLD}
  if 'reward' in config:
    config.reward.demonstrations = WORLD
