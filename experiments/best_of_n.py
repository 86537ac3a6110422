"""Best-of-N on the embedded world: no training, of 16 answers of the SFT model the one the reward model likes best.

  python -m rlhf_jax --config=experiments/best_of_n.py --workdir=runs/best_of_n

Its KL in the table is log N − (N − 1)/N, an upper bound. What to expect: docs/methods.md.
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  config = quickstart.then('sft', tiny, ('pretrain', 'sft', 'feedback', 'reward'))
  config.evaluation.models = dict(config.evaluation.models, best_of_4='sft', best_of_16='sft')
  config.evaluation.best_of = dict(best_of_4=4, best_of_16=16)
  return config
