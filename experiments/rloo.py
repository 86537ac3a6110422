"""RLOO on TinyWorld: policy gradient with the mean of a prompt's other responses as baseline.

No value model, unlike PPO. Ahmadian et al. 2024, arXiv:2402.14740; docs/methods/rloo.md.

  python -m rlhf_jax --config=experiments/rloo.py --workdir=runs/rloo

Expected: on the test split of seed 0 it wins against SFT by substance in 58.0% (55.1 – 61.2)
  sampled and 58.5% (54.9 – 62.4) greedy, at a KL of 0.28 nats. docs/methods.md has all methods.
Time: 86 s on one CPU core, after the quickstart's first four stages (6 minutes on two cores).
Try: --config.rloo.num_samples=8 --config.rloo.batch_size=8, fewer prompts with more responses to
  each.
On the models of a finished quickstart: scripts/compare_methods.py.
"""

from typing import Any

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return policy_gradient_experiment(
    'rloo',
    tiny,
    advantage='leave_one_out',
    loss='reinforce',
    reduce='sequence_sum',
    kl_coefficient=0.25,
  )


def policy_gradient_experiment(name: str, tiny: bool, **changes: Any) -> ml_collections.ConfigDict:
  """Returns RLOO's experiment with other choices: 64 responses a step, as in the quickstart's PPO.

  Args:
    name: of the stage, and of its row in the final table.
    tiny: whether to shrink every stage, for tests.
    changes: fields of the policy_gradient stage's section.
  """
  section = dict(
    kind='policy_gradient',
    batch_size=16,
    num_samples=4,
    max_length=30,
    optimizer=dict(learning_rate=2e-4),
    loop=dict(steps=60, eval_every=30, save_every=30),
  )
  stages = ('pretrain', 'sft', 'feedback', 'reward')
  return quickstart.continue_with(name, tiny, stages, **{name: section | changes})
