r"""Two reward models, each trained on one half of the rankings: how far do they agree?

Where two models that saw different data disagree, neither knows. The final table says how often
they prefer the same response, and how accurate their mean is where they agree most and least.
Gao et al. 2022, arXiv:2210.10760, and Coste et al. 2023, arXiv:2310.02743, measure such ensembles.

  python -m rlhf_jax --config=experiments/reward_halves.py --workdir=runs/reward_halves \
    --from=runs/quickstart

Expected: not measured yet; both halves should agree more often than by chance.
Time: a minute on two CPU cores after the quickstart's first three stages, which are taken over.
Try: --config.reward_odd.data.half=even with --config.reward_odd.optimizer.learning_rate=2e-4, two
  models of the same data.
"""

from typing import Any

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  config = quickstart.get_config(tiny)
  section: dict[str, Any] = config.reward.to_dict()
  for stage in ('reward', 'ppo'):
    del config[stage]
  halves = ('even', 'odd')
  config.stages = ('pretrain', 'sft', 'feedback', *(f'reward_{half}' for half in halves))
  for half in halves:
    own = dict(section, kind='reward', data=dict(quickstart.RANKINGS, half=half))
    config[f'reward_{half}'] = own
  config.evaluation = dict(models={}, controls=False)  # reward models have no responses
  return config
