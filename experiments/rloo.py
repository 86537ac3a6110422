"""RLOO on the embedded world: the quickstart's first steps, then REINFORCE with the mean of a prompt's other answers
as baseline, instead of PPO and its value model.

  python -m rlhf_jax --config=experiments/rloo.py --workdir=runs/rloo

To begin with the models of a quickstart: copy its workdir without ppo/ and results.json, and run there. Other methods
are other choices of four functions: --config.rloo.advantage=standardised … (docs/policy_gradient.md).
"""

import quickstart


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  config = quickstart.get_config(tiny)
  sampling = config.ppo.sampling
  config.stages = ('pretrain', 'sft', 'feedback', 'reward', 'rloo')
  config.rloo = dict(
      kind='policy_gradient', advantage='leave_one_out', loss='reinforce', reduce='sequence_sum',
      batch_size=16, samples=4, length=26, kl_coefficient=0.25, sampling=sampling, optimizer=dict(learning_rate=2e-4),
      loop=dict(steps=60, eval_every=30, save_every=30))
  config.evaluation.models = dict(base='pretrain', sft='sft', rloo='rloo')
  if tiny:
    config.rloo.batch_size = 8
    config.rloo.eval_records = 8
    config.rloo.loop = dict(steps=4, eval_every=2, save_every=2, log_every=1)
  del config.ppo
  return config
