"""RLOO on the embedded world: the quickstart's first four steps, then REINFORCE with the mean of a prompt's other answers
as baseline, instead of PPO and its value model.

  python -m rlhf_jax --config=experiments/rloo.py --workdir=runs/rloo

On a finished quickstart: scripts/compare_methods.py. What to expect: docs/methods.md.
"""

import quickstart


def like(name: str, tiny: bool, **section):
  """RLOO's experiment with other choices, under its own name: 64 answers a step, as the quickstart's PPO."""
  return quickstart.then(name, tiny, ('pretrain', 'sft', 'feedback', 'reward'), **{name: dict(
      dict(kind='policy_gradient', batch_size=16, num_samples=4, max_length=26, optimizer=dict(learning_rate=2e-4),
           loop=dict(steps=60, eval_every=30, save_every=30)), **section)})


def get_config(tiny: bool = False):
  """tiny: a few steps, for tests."""
  return like('rloo', tiny, advantage='leave_one_out', loss='reinforce', reduce='sequence_sum', kl_coefficient=0.25)
