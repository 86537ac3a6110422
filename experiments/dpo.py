"""DPO on TinyWorld: learns from the quickstart's rankings in one stage, without a reward model.

Rafailov et al. 2023, arXiv:2305.18290; docs/methods/dpo.md.

  python -m rlhf_jax --config=experiments/dpo.py --workdir=runs/dpo

Expected: on the test split of seed 0 it wins against SFT by substance in 59.8% (56.7 – 63.1)
  sampled and 58.6% (54.4 – 63.1) greedy, at a KL of 2.47 nats. docs/methods.md has all methods.
Time: 79 s on one CPU core, after the quickstart's first three stages (5.5 minutes on two cores).
Try: --config.dpo.beta=0.05, which lets the policy move further from the reference.
On the models of a finished quickstart: scripts/compare_methods.py.
"""

from typing import Any

import ml_collections
import quickstart


def get_config(tiny: bool = False) -> ml_collections.ConfigDict:
  """Returns the experiment; tiny takes a few steps, for tests."""
  return preference_experiment('dpo', tiny, loss='dpo', beta=0.1)


def preference_experiment(name: str, tiny: bool, **changes: Any) -> ml_collections.ConfigDict:
  """Returns DPO's experiment with another loss or other settings.

  Args:
    name: of the stage, and of its row in the final table.
    tiny: whether to shrink every stage, for tests.
    changes: fields of the preference stage's section.
  """
  section = dict(
    kind='preference',
    batch_size=8,
    responses_per_row=8,  # one ranking of eight responses
    max_length=62,
    packed_rows=8,  # half of the places would be padding
    data=quickstart.RANKINGS,
    loop=dict(steps=150, eval_every=75, save_every=75),
    optimizer=dict(learning_rate=4e-4),
  )
  stages = ('pretrain', 'sft', 'feedback')
  return quickstart.continue_with(name, tiny, stages, **{name: section | changes})
