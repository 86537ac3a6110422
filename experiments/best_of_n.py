"""Best-of-N on TinyWorld: of 16 responses of the SFT model, the one with the highest reward.

The reward model chooses, and the policy is not trained further: its KL is not measured, but at most
log N − (N − 1)/N. Stiennon et al. 2020, arXiv:2009.01325; docs/methods/best_of_n.md.

  python -m rlhf_jax --config=experiments/best_of_n.py --workdir=runs/best_of_n

Expected: on the test split of seed 0 it wins against SFT by substance in 75.3% (73.0 – 77.5)
  sampled, at a KL of 1.84 nats. docs/methods.md has all methods.
Time: the quickstart's first four stages (6 minutes on two CPU cores), then at most 50 s for the
  final table: that is the time with models that never end a response before the limit of 32 tokens.
Try: --config.evaluation.num_samples=4, for narrower intervals.
"""

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  config = quickstart.continue_with('sft', tiny, ('pretrain', 'sft', 'feedback', 'reward'))
  config.evaluation.models = dict(config.evaluation.models, best_of_4='sft', best_of_16='sft')
  config.evaluation.best_of = dict(best_of_4=4, best_of_16=16)
  return config
