"""RLHF on a small model against a base a hundred times as large: does alignment beat size?

Ouyang et al. 2022 (arXiv:2203.02155, section 1): people prefer InstructGPT with 1.3 billion
parameters to GPT-3 with 175 billion. Here in a world where size matters: the large base remembers
more of it. First large_base.py; then, with the same seed:

  python -m rlhf_jax --config=experiments/small_against_large.py --workdir=runs/small \
    --config.evaluation.models.large=runs/large_base/pretrain

Expected: sampled, PPO is preferred to the large base, as it says that it does not know; greedily
  it is not. docs/tinyworld.md has the figures.
Time: 6 minutes on one CPU core.
Try: --config.model.embed=64, four times as large a model.
"""

import large_base
import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  config = quickstart.get_config(tiny)
  config.model = dict(embed=32, layers=3, heads=2, kv_heads=2, head_dim=16, mlp=96)
  large_base.in_the_large_world(config)
  if not tiny:
    config.evaluation.models.large = 'runs/large_base/pretrain'
    config.evaluation.versus = ('large',)  # win_rate_vs_large, in either decoding
  return config
